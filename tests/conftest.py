"""What several tests share: real photographs, and detectors of MMDetection beside their export."""

import logging
import resource
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "ckpt" / "shapes")]

logging.disable(logging.INFO)  # mmcv lists every initialised weight

SHAPES = ROOT / "ckpt" / "shapes"
TABLES = defaultdict(list)  # title -> rows of cells, printed when all tests are done


def pytest_terminal_summary(terminalreporter):
    """Print the tables that the tests filled, and the peak of memory."""
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
        for row in rows:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if TABLES:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        terminalreporter.write_line(f"peak memory of the tests: {peak:.1f} GiB")


@pytest.fixture(scope="session")
def photographs():
    """Return four photographs of different shapes, BGR: upright, lying, square and small."""
    import skimage.data

    pictures = {
        "astronaut": skimage.data.astronaut(),
        "coffee": skimage.data.coffee(),
        "cat": skimage.data.chelsea(),
        "motorcycle": np.rot90(skimage.data.stereo_motorcycle()[0]),
    }
    return {name: np.ascontiguousarray(picture[..., ::-1]) for name, picture in pictures.items()}


@pytest.fixture(scope="session")
def shapes_detector():
    """Return MMDetection's detector with the weights of the bundled model."""
    import export

    return export.load_detector(SHAPES / "config.py", SHAPES / "shapes.pth")


@pytest.fixture(scope="session")
def drawn_pictures():
    """Return 50 drawn pictures, boxes and labels that training did not see."""
    import dataset

    return [dataset.draw_picture(seed) for seed in range(2_000_000, 2_000_050)]


@pytest.fixture(scope="session")
def coco_checkpoint(tmp_path_factory, photographs):
    """Return the path of a checkpoint of Faster R-CNN R50-FPN with seeded weights."""
    import mmcv
    import seeded

    import export

    cfg = mmcv.Config.fromfile(str(export.find_config(export.DEFAULT_CONFIG)))
    return seeded.write_checkpoint(cfg, tmp_path_factory.mktemp("coco") / "seeded.pth", photographs["astronaut"])


@pytest.fixture(scope="session")
def coco_detector(coco_checkpoint):
    """Return MMDetection's R50-FPN detector with the seeded weights."""
    import export

    return export.load_detector(export.find_config(export.DEFAULT_CONFIG), coco_checkpoint)


@pytest.fixture(scope="session")
def coco_pair(tmp_path_factory, coco_detector):
    """Return the folder of the seeded R50-FPN detector's export."""
    import export

    folder = tmp_path_factory.mktemp("coco_pair")
    export.write_pair(coco_detector, folder, {}, opset=13)
    return folder
