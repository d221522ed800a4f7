"""Export a trained detector as plain ONNX networks, and prove that nothing was lost.

python export.py                        Faster R-CNN R50-FPN 1x COCO, downloaded into ckpt/ if it is not there
python export.py CONFIG CHECKPOINT      your own; CONFIG is a file, or the name of a config that MMDetection ships
python export.py torchvision:BUILDER [CHECKPOINT]    torchvision's; without CHECKPOINT, with the weights it offers

Every network runs in PyTorch and in ONNX Runtime, and every output is compared (True: they differ by less than 1e-4,
or by less than 2e-6 of the largest value); then the detections in a picture. The files are moved to --out only when
all is True. Exit status: 0 all True, 1 something differs, 2 nothing could be exported, 130 interrupted. A CONFIG is
Python and is run.
"""

import argparse
import contextlib
import copy
import hashlib
import inspect
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

warnings.filterwarnings("ignore")  # about deprecations and tracing: the verification says what matters
logging.disable(logging.WARNING)  # about a missing GPU, and pretrained weights that are not needed
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read when cv2 is imported

try:
    import cv2
    import numpy as np
    import onnx
    import torch

    import sources
    from detectors import FIRST, ModelError, load, one_line, rle
    from detectors.preprocess import preprocess
    from detectors.settings import changed, write
    from pictures import name_and_value, read_picture, run_program
except ImportError as error:  # --help works all the same
    MISSING = error
else:
    MISSING = None

HERE = Path(__file__).resolve().parent
OUTPUT_TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 2e-6  # the latter is some twenty units in the last place of a float32
BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # boxes in pixels
MASK_IOU, MASK_PIXELS = 0.999, 3  # masks are equal at this IoU, or if no more pixels differ


# ---------------------------------------------------------------------- write


@contextlib.contextmanager
def silent_stdout():
    """Keep stdout clean, even of what compiled code prints: when the exporter fails, it prints its whole graph."""
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def to_onnx(network, path, opset):
    """Write a sources.Network to a file and return it as onnx.ModelProto; sources.SourceError if that fails."""
    legacy = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    axes = {**network.inputs, **network.outputs}
    names = {"input_names": list(network.inputs), "output_names": list(network.outputs), "dynamic_axes": axes}
    try:
        with torch.no_grad(), silent_stdout():
            torch.onnx.export(network.module, (network.example,), str(path), opset_version=opset, **names, **legacy)
    except Exception as error:  # the exporter's errors have no common base class
        reason = one_line(error).split(" Please feel free")[0].rstrip(".")[:500]  # to contact PyTorch's developers
        raise sources.SourceError(f"PyTorch cannot export {path.name} at opset {opset}: {reason}") from error
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise sources.SourceError(f"these operators are not standard ONNX: {', '.join(sorted(foreign))}")
    return model


def write_networks(source, folder, opset):
    """Write the networks of a Source to a folder, each with the settings in its metadata."""
    models = {name: to_onnx(network, folder / name, opset) for name, network in source.networks.items()}
    settings = changed(source.settings, "networks", tuple(models))
    digest = hashlib.sha256(write(settings).encode())
    for model in models.values():
        digest.update(model.SerializeToString(deterministic=True))
    settings = changed(settings, "pair", digest.hexdigest()[:16])  # the same content has the same id
    for name, model in models.items():
        onnx.helper.set_model_props(model, {"detector": write(settings)})
        onnx.save(model, str(folder / name))


# ---------------------------------------------------------------------- verify


def replayed(array, axes, preprocess):
    """Return two inputs of different sizes for a network, made from the one that a picture gave.

    array [N, C, H, W]; axes: those that are dynamic; preprocess: the settings that say which sizes pictures have.
    """
    if 3 not in axes:  # not a picture
        return [array[:7], array[:100]]
    if preprocess.pad_to_square or not preprocess.keep_ratio:  # all pictures have the same size
        return [np.concatenate([array[..., ::-1], array]), array]
    half = array[..., ::2, ::2].swapaxes(2, 3)  # upright where the first one lies
    half = np.pad(half, [(0, 0), (0, 0), *[(0, -side % preprocess.pad_divisor) for side in half.shape[2:]]])
    return [np.ascontiguousarray(np.concatenate([half, half[..., ::-1]])), array]


def compare_outputs(network, run, inputs):
    """Return, for each output, its shape, largest difference between PyTorch and ONNX Runtime, and largest value."""
    rows = []
    for array in inputs:
        with torch.no_grad():
            expected = [output.numpy() for output in network.module(torch.from_numpy(array))]
        rows.append([
            (list(a.shape), np.abs(a - b).max() if a.shape == b.shape else np.inf, np.abs(a).max())
            for a, b in zip(expected, run(array))
        ])  # fmt: skip
    return [(row[-1][0], max(r[1] for r in row), max(r[2] for r in row)) for row in zip(*rows)]


def verify_outputs(source, detector, stages):
    """Print a line for every output of every network, on what it got in a picture; return the names of what differs."""
    different, outputs = [], Counter(output for network in source.networks.values() for output in network.outputs)
    for name, network in source.networks.items():
        ((tensor, axes),) = network.inputs.items()
        array = stages[Path(name).stem][tensor]
        if len(array) == 0:
            raise sources.SourceError(
                f"in this picture nothing reaches {name}, so it cannot be compared: name another --picture"
            )
        inputs = replayed(array, axes, source.settings.preprocess)
        rows = compare_outputs(network, detector.networks[name], inputs)
        for output, (shape, difference, magnitude) in zip(network.outputs, rows):
            equal = bool(difference < max(OUTPUT_TOLERANCE, RELATIVE_TOLERANCE * magnitude))
            label = output if outputs[output] == 1 else f"{Path(name).stem}.{output}"  # of several heads
            print(f"{label:8} {shape!s:22} {difference:.1e} of {magnitude:.1e}  {equal}")
            different += [] if equal else [label]
    return different


def pair_detections(ours, reference):
    """Pair Detections one to one, each with the nearest of the same label that is left; return both, in this order."""
    left, pairs = np.ones(len(reference.boxes), bool), []
    for i, (box, label) in enumerate(zip(ours.boxes, ours.labels)):
        candidates = np.flatnonzero(left & (reference.labels == label))
        if len(candidates):
            twin = candidates[np.abs(reference.boxes[candidates] - box).max(axis=1).argmin()]
            left[twin] = False
            pairs.append((i, twin))
    chosen, twins = np.array(pairs, int).reshape(-1, 2).T
    return ours.where(chosen), reference.where(twins)


def mask_overlap(first, second):
    """Return the IoU of two run-length encoded masks; 1 if they differ in MASK_PIXELS pixels or fewer."""
    first, second = rle.decode(first), rle.decode(second)
    if first.shape != second.shape:
        return 0.0
    different, union = np.count_nonzero(first ^ second), np.count_nonzero(first | second)
    return 1.0 if different <= MASK_PIXELS else 1 - different / union


def verify_detections(title, ours, reference):
    """Print a line for the whole detector against the framework's own; return whether it is True."""
    first, second = pair_detections(ours, reference)
    box_difference = np.abs(first.boxes - second.boxes).max(initial=0)
    score_difference = np.abs(first.scores - second.scores).max(initial=0)
    equal = len(first.boxes) == len(ours.boxes) == len(reference.boxes)
    equal &= bool(box_difference <= BOX_TOLERANCE and score_difference <= SCORE_TOLERANCE)
    text = f"largest difference {box_difference:.1e} px, {score_difference:.1e} in score"
    if ours.masks is not None:
        overlap = min(map(mask_overlap, first.masks, second.masks), default=1.0)
        equal &= overlap >= MASK_IOU
        text += f", smallest IoU of masks {overlap:.4f}"
    counts = f"{len(ours.boxes)}, the framework's own: {len(reference.boxes)}, paired: {len(first.boxes)}"
    print(f"{title}: {counts}, {text}  {equal}")
    return equal


def verify(source, detector, picture):
    """Compare every output of every network, and the detections in a picture; return the names of what differs.

    The detections are compared twice: at the detector's own score threshold, and at 0, where there is always
    something to compare.
    """
    image, stages = read_picture(picture), {}
    anything = copy.copy(detector)
    anything.settings = changed(detector.settings, "head.score_threshold", 0.0)
    found = anything(image, lambda stage, **arrays: stages.update({stage: arrays}))
    different = verify_outputs(source, detector, stages)
    equal = verify_detections("detections", detector(image), source.detect(picture))
    equal &= verify_detections("with any score", found, source.detect(picture, 0.0))
    return different if equal else [*different, "detections"]


# ---------------------------------------------------------------------- the command line


def export(source, out, opset, picture):
    """Write the networks of a Source, verify them and move them to the folder `out`; return whether all was True."""
    try:
        preprocess(read_picture(picture), source.settings.preprocess)
    except (ValueError, MemoryError, cv2.error) as error:
        raise sources.SourceError(f"{picture}: {one_line(error)}") from error
    others = [name for name in FIRST if name not in source.networks and (out / name).exists()]
    if others:
        raise sources.SourceError(f"{out} holds another export, with {others[0]}: name another folder with --out")
    if opset is not None and opset < source.opset:
        raise sources.SourceError(f"--opset {opset}: this detector has an operator of opset {source.opset}")
    if opset is None and source.opset > sources.OPSET:
        print(f"opset {source.opset}: the first that has all operators of this detector")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        write_networks(source, Path(folder), opset or source.opset)
        different = verify(source, load(folder), picture)
        if different:
            names = ", ".join(different)
            print(f"export.py: ONNX Runtime and PyTorch differ in {names}: nothing was written to {out}",
                  file=sys.stderr)  # fmt: skip
            return False
        for name in source.networks:
            os.replace(Path(folder) / name, out / name)
    print(f"written: {', '.join(str(out / name) for name in source.networks)}")
    return True


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG",
        help="a file, the name of a config in MMDetection, or torchvision:BUILDER")  # fmt: skip
    add("checkpoint", nargs="?", metavar="CHECKPOINT", help="the .pth file with its weights")
    add("--classes", metavar="FILE", type=Path, help="names of the classes, one a line, instead of the checkpoint's")
    add("--set", metavar="NAME=VALUE", dest="options", action="append", default=[],
        type=None if MISSING else name_and_value,
        help="an argument of torchvision's builder, such as min_size=600; may be repeated")  # fmt: skip
    add("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[],
        help="changes of MMDetection's config, such as model.test_cfg.rcnn.score_thr=0.1")  # fmt: skip
    add("--out", metavar="DIR", default=HERE / "ckpt", type=Path, help="folder for the networks (default: ckpt)")
    add("--opset", metavar="N", type=int, help="of ONNX (default: 13, or the first that has all operators)")
    add("--picture", metavar="FILE", default=HERE / "asset" / "shapes.png", type=Path,
        help="the picture on which detections are compared (default: the bundled picture)")  # fmt: skip
    add("--trust-checkpoint", action="store_true",
        help="load a checkpoint that holds more than tensors; it can run any code")  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def read_names(path):
    """Return the names in a file, a name a line; sources.SourceError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise sources.SourceError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise sources.SourceError(f"{path} is not a list of names: {one_line(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise sources.SourceError(f"{path} holds no names")
    return names


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        classes = read_names(args.classes) if args.classes else None
        options = {"--set": args.options, "--cfg-options": args.cfg_options}
        source = sources.load(args.config, args.checkpoint, args.trust_checkpoint, classes, options)
        return 0 if export(source, args.out, args.opset, args.picture) else 1
    except (sources.SourceError, ModelError, OSError) as error:
        print(f"export.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if MISSING:
        read_arguments(None)
        hint = ": uv run --extra torchvision, or --extra export for MMDetection, installs it"
        hint = hint if isinstance(MISSING, ModuleNotFoundError) else ""
        print(f"export.py: {MISSING}{hint}", file=sys.stderr)
        sys.exit(2)
    sys.unraisablehook = lambda _: None  # mmcv loses a temporary file when a config fails, and Python complains
    run_program(main)
