"""Print what 8 bits cost, a row of DETECTORS.md's table for each detector: uv run --extra export tests/eight_bits.py.

A NAME is that of a folder of ckpt, of a builder of torchvision, or of a config that MMDetection ships; without any, it
is those of the table. What is not bundled has seeded weights. Each is calibrated on 24 parts of photographs; on four
others, both versions of each network get the same inputs.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import seeded_mmdetection  # noqa: E402
import seeded_torchvision  # noqa: E402
import skimage.data  # noqa: E402
import zoo  # noqa: E402

import export  # noqa: E402
import quantize  # noqa: E402
from detectors import load  # noqa: E402
from sources import mmdetection, torchvision  # noqa: E402

NAMES = (
    "faster_rcnn_r50_fpn_1x_coco", "cascade_rcnn_r50_fpn_1x_coco", "mask_rcnn_r50_fpn_1x_coco",
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_r50_fpn_1x_coco",
    "atss_r50_fpn_1x_coco", "fcos_r50_caffe_fpn_gn-head_1x_coco", "ssd300_coco", "yolox_s_8x8_300e_coco",
    "shapes", "shapes_mask", "shapes_atss",
)  # fmt: skip
CALIBRATING, MEASURING = 24, 4


def write_pictures(folder):
    """Write parts of photographs, every other one mirrored, to a folder; return their paths."""
    photographs = (skimage.data.coffee(), skimage.data.chelsea(), skimage.data.astronaut())
    rng, paths = np.random.default_rng(0), [folder / f"{i}.png" for i in range(CALIBRATING + MEASURING)]
    for i, path in enumerate(paths):
        image = photographs[i % 3][..., ::-1]
        height, width = (round(side * rng.uniform(0.6, 1)) for side in image.shape[:2])
        y, x = rng.integers(0, image.shape[0] - height + 1), rng.integers(0, image.shape[1] - width + 1)
        part = image[y : y + height, x : x + width]
        cv2.imwrite(str(path), np.ascontiguousarray(part[:, ::-1] if i % 2 else part))
    return paths


def write_export(name, folder):
    """Write the export of a detector to a folder."""
    image = np.ascontiguousarray(skimage.data.coffee()[..., ::-1])
    if (export.HERE / "ckpt" / name).is_dir():
        for path in (export.HERE / "ckpt" / name).glob("*.onnx"):
            shutil.copy(path, folder)
        return
    checkpoint = folder / "seeded.pth"
    if name in torchvision.BUILDERS:
        seeded_torchvision.write_checkpoint(name, checkpoint, image)
        fixed = "320" in name or "ssd" in name
        smaller = [] if fixed else [("min_size", str(zoo.SCALE[1])), ("max_size", str(zoo.SCALE[0]))]
        source = torchvision.load(name, checkpoint, options=smaller)
    else:
        cfg = zoo.on_small_pictures(next(zoo.CONFIGS.rglob(f"{name}.py")))
        cfg.dump(str(folder / "config.py"))
        seeded_mmdetection.write_checkpoint(cfg, checkpoint, image)
        source = mmdetection.load(folder / "config.py", checkpoint)
    export.write_networks(source, folder, source.opset)


def write_int8(folder, pictures):
    """Write the export in a folder in 8 bits to its folder int8, whatever it is worth."""
    detector = load(folder)
    (folder / "int8").mkdir()
    files = quantize.record_inputs(detector, pictures, folder / "int8")
    models = {name: quantize.to_int8(folder / name, files[name], quantize.saturates()) for name in files}
    quantize.save_set(models, detector, {"int8": True}, folder / "int8")


def compare(folder, pictures):
    """Return the size and the time of 8 bits, as parts of float32's, and by how much each output differs.

    An output differs by the root mean square of the difference, as a part of its standard deviation.
    """
    usual, smaller = load(folder).networks, load(folder / "int8").networks
    seconds, differences, taken = np.zeros(2), defaultdict(list), []
    for picture in pictures:
        load(folder)(cv2.imread(str(picture)), lambda stage, **arrays: taken.append((f"{stage}.onnx", arrays)))
    for name, arrays in [(name, arrays) for name, arrays in taken if name in usual]:
        array = next(iter(arrays.values()))
        start = time.perf_counter()
        usual[name](array)
        middle = time.perf_counter()
        outputs = smaller[name](array)
        seconds += (middle - start, time.perf_counter() - middle)
        for tensor, output in zip([*arrays][1:], outputs):
            deviation = np.sqrt(np.square(arrays[tensor] - output).mean()) / arrays[tensor].std()
            differences[f"{Path(name).stem}.{tensor.rstrip('_0123456789')}"].append(deviation)
    size = sum((folder / "int8" / name).stat().st_size for name in usual)
    size /= sum((folder / name).stat().st_size for name in usual)
    return size, seconds[1] / seconds[0], {tensor: np.mean(values) for tensor, values in differences.items()}


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a detector")
    for name in parser.parse_args().names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            pictures = write_pictures(Path(folder))
            write_export(name, Path(folder))
            write_int8(Path(folder), pictures[:CALIBRATING])
            size, part, differences = compare(Path(folder), pictures[CALIBRATING:])
        text = ", ".join(f"{tensor} {difference:.2f}" for tensor, difference in differences.items())
        print(f"| {name} | {size:.2f} | {part:.2f} | {text} |", flush=True)


if __name__ == "__main__":
    main()
