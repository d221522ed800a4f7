"""What several tests share: real photographs, and detectors of MMDetection beside their export."""

import contextlib
import io
import logging
import resource
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "ckpt" / "shapes")]

logging.disable(logging.INFO)  # mmcv lists every initialised weight

SHAPES = ROOT / "ckpt" / "shapes"
MMDETECTION = "needs MMDetection: uv run --extra export pytest"  # why a test is skipped
TORCHVISION = "needs torchvision: uv run --extra torchvision --extra test pytest"
TABLES = defaultdict(list)  # title -> rows of cells, printed when all tests are done


def pytest_addoption(parser):
    """Add options to pytest's."""
    add = parser.addoption
    add("--all", action="store_true", help="also try the configs that compute the same as another")
    add("--write-passed", metavar="FILE", help="add the tests that pass to a file")
    add("--leave-out", metavar="FILE", help="leave out those that an earlier run wrote with --write-passed")


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that passed in an earlier run."""
    if config.getoption("--leave-out"):
        passed = {*Path(config.getoption("--leave-out")).read_text(encoding="utf-8").splitlines()}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_terminal_summary(terminalreporter, config):
    """Print the tables that the tests filled, and the peak of memory; write which tests passed."""
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
        for row in rows:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if TABLES:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        terminalreporter.write_line(f"peak memory of the tests: {peak:.1f} GiB")
    if config.getoption("--write-passed"):
        with open(config.getoption("--write-passed"), "a", encoding="utf-8") as file:
            file.writelines(f"{report.nodeid}\n" for report in terminalreporter.stats.get("passed", []))


def default_sigint():
    """Let Ctrl-C interrupt this process: the preexec_fn of one that a test interrupts.

    A shell lets its background jobs ignore SIGINT, and what they start inherits that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def call_program(main, *arguments, encoding="utf-8"):
    """Run a program's main in this process, which is quicker than another; return what subprocess.run would."""
    from pictures import run_program

    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        with pytest.raises(SystemExit) as end:
            run_program(lambda: main([str(argument) for argument in arguments]))
        printed = []
        for stream in (stdout, stderr):
            stream.flush()
            printed.append(stream.buffer.getvalue().decode(encoding))
    return subprocess.CompletedProcess(arguments, end.value.code, *printed)


@pytest.fixture(scope="session")
def photographs():
    """Return four photographs of different shapes, BGR: upright, lying, square and small."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image: uv run --extra test pytest")
    pictures = {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "cat": data.chelsea(),
        "motorcycle": np.rot90(data.stereo_motorcycle()[0]),
    }
    return {name: np.ascontiguousarray(picture[..., ::-1]) for name, picture in pictures.items()}


@pytest.fixture(scope="session")
def drawn_pictures():
    """Return 50 drawn pictures, boxes and labels that training did not see."""
    import dataset

    return [dataset.draw_picture(seed) for seed in range(2_000_000, 2_000_050)]


@pytest.fixture(scope="session")
def mmdetection():
    """Return sources.mmdetection; skip where its framework is not installed."""
    pytest.importorskip("mmdet", reason=MMDETECTION)
    import sources.mmdetection

    return sources.mmdetection


@pytest.fixture(scope="session")
def shapes_detector(mmdetection):
    """Return MMDetection's detector with the weights of the bundled model."""
    return mmdetection.load_detector(SHAPES / "config.py", SHAPES / "shapes.pth")


@pytest.fixture(scope="session")
def shapes_source(mmdetection, shapes_detector):
    """Return the Source of the bundled model."""
    return mmdetection.as_source(shapes_detector, SHAPES / "config.py", SHAPES / "shapes.pth")


@pytest.fixture(scope="session")
def coco_config(mmdetection):
    """Return the path of Faster R-CNN R50-FPN's config."""
    return mmdetection.find_config(mmdetection.DEFAULT_CONFIG)


@pytest.fixture(scope="session")
def coco_checkpoint(tmp_path_factory, coco_config, photographs):
    """Return the path of a checkpoint of Faster R-CNN R50-FPN with seeded weights."""
    import mmcv
    import seeded_mmdetection

    cfg = mmcv.Config.fromfile(str(coco_config))
    return seeded_mmdetection.write_checkpoint(
        cfg, tmp_path_factory.mktemp("coco") / "seeded.pth", photographs["astronaut"]
    )


@pytest.fixture(scope="session")
def coco_detector(mmdetection, coco_config, coco_checkpoint):
    """Return MMDetection's R50-FPN detector with the seeded weights."""
    return mmdetection.load_detector(coco_config, coco_checkpoint)


@pytest.fixture(scope="session")
def coco_source(mmdetection, coco_detector, coco_config, coco_checkpoint):
    """Return the Source of the seeded R50-FPN detector."""
    return mmdetection.as_source(coco_detector, coco_config, coco_checkpoint)


@pytest.fixture(scope="session")
def coco_pair(tmp_path_factory, coco_source):
    """Return the folder of the seeded R50-FPN detector's export."""
    import export

    folder = tmp_path_factory.mktemp("coco_pair")
    export.write_networks(coco_source, folder, opset=13)
    return folder


def draw_shapes(folder, seeds):
    """Draw a picture of shapes for each seed; return their paths."""
    import cv2
    import dataset

    folder.mkdir(exist_ok=True)
    paths = [folder / f"{seed}.png" for seed in seeds]
    for path, seed in zip(paths, seeds):
        cv2.imwrite(str(path), dataset.draw_picture(seed)[0])
    return paths
