"""Export a trained detector as plain ONNX networks, and prove that nothing was lost.

python export.py                        Faster R-CNN R50-FPN 1x COCO, downloaded into ckpt/ if it is not there
python export.py CONFIG CHECKPOINT      your own; CONFIG is a file, or the name of a config that MMDetection ships
python export.py torchvision:BUILDER [CHECKPOINT]    torchvision's; without CHECKPOINT, with the weights it offers

Every network runs in PyTorch and in ONNX Runtime, and every output is compared (True: they differ by less than 1e-4,
or by less than 2e-6 of the largest value); then the detections in a picture. The files are moved to --out only when
all is True. After that, --int8 and --fp16 write the same networks with smaller numbers, and measure what that costs;
--whole writes the whole detector as one file, which is compared with them.
Exit status: 0 all True, 1 something differs, or could not be written in another way, 2 nothing could be exported, 130
interrupted. A CONFIG is Python and is run.
"""

import argparse
import contextlib
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
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # read when cv2 is imported, as in demo.py
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

try:
    import cv2
    import numpy as np
    import onnx
    import torch

    import quantize
    import sources
    import whole
    from compare import any_score, verify_detections
    from detectors import CKPT, FIRST, ModelError, load, one_line
    from detectors.preprocess import preprocess
    from pictures import find_pictures, is_annotated, name_and_value, number_of, read_picture, run_program
    from sources.onnx_files import check_standard, save_networks
except ImportError as error:  # --help works all the same
    MISSING = error
else:
    MISSING = None

HERE = Path(__file__).resolve().parent
OUTPUT_TOLERANCE, RELATIVE_TOLERANCE = 1e-4, 2e-6  # the latter is some twenty units in the last place of a float32


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
    check_standard(model)
    return model


def write_networks(source, folder, opset):
    """Write the networks of a Source to a folder, each with the settings in its metadata."""
    models = {name: to_onnx(network, folder / name, opset) for name, network in source.networks.items()}
    save_networks(models, source.settings, folder)


# ---------------------------------------------------------------------- verify


def replayed(array, axes, preprocess):
    """Return two inputs of different sizes for a network, made from the one that a picture gave.

    array [N, C, H, W]; axes: those that are dynamic; preprocess: the settings that say which sizes pictures have.
    """
    if 3 not in axes:  # not a picture
        return [array[:7], array[:100]]
    square = preprocess.pad_to_square and preprocess.scale is not None and len(set(preprocess.scale)) == 1
    if square or not preprocess.keep_ratio:  # all pictures have the same size
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


def verify(source, detector, picture):
    """Compare every output of every network, and the detections in a picture; return the names of what differs.

    The detections are compared twice: at the detector's own score threshold, and at 0, where there is always
    something to compare.
    """
    image, stages = read_picture(picture), {}
    found = any_score(detector)(image, lambda stage, **arrays: stages.update({stage: arrays}))
    different = verify_outputs(source, detector, stages)
    equal = verify_detections("detections", detector(image), source.detect(picture))
    equal &= verify_detections("with any score", found, source.detect(picture, 0.0))
    return different if equal else [*different, "detections"]


# ---------------------------------------------------------------------- the command line


@contextlib.contextmanager
def made(folder):
    """Make a folder, unless it is there, and remove it at the end if nothing is in it."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it
            if is_new:
                folder.rmdir()


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
    with made(out), tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        write_networks(source, Path(folder), opset or source.opset)
        different = verify(source, load(folder), picture)
        if different:
            names = ", ".join(different)
            print(f"export.py: ONNX Runtime and PyTorch differ in {names}: nothing was written to {out}",
                  file=sys.stderr)  # fmt: skip
            return False
        for name in source.networks:
            os.replace(Path(folder) / name, out / name)
        quantize.remove_sets(out)
        (out / "detector.onnx").unlink(missing_ok=True)  # see whole.py
    print(f"written: {', '.join(str(out / name) for name in source.networks)}")
    return True


def read_change(text):
    """Return a change of MMDetection's config, KEY=VALUE; what comes behind such an option belongs to it."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE; CONFIG and CHECKPOINT come before --cfg-options")
    return text


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
    add("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[], type=read_change,
        help="changes of MMDetection's config, such as model.test_cfg.rcnn.score_thr=0.1")  # fmt: skip
    add(
        "--out",
        metavar="DIR",
        default=None if MISSING else CKPT,
        type=Path,
        help="folder for the networks (default: ckpt)",
    )
    add("--opset", metavar="N", type=int, help="of ONNX (default: 13, or the first that has all operators)")
    add("--picture", metavar="FILE", default=HERE / "asset" / "shapes.png", type=Path,
        help="the picture on which detections are compared (default: the bundled picture)")  # fmt: skip
    add("--int8", metavar="FOLDER",
        help="also write them in 8 bits to --out/int8; FOLDER (or a glob): pictures such as they will see")  # fmt: skip
    add("--calibrate", metavar="N", type=None if MISSING else number_of("pictures"), default=48,
        help="how many of these pictures say which numbers occur; others measure what is lost")  # fmt: skip
    add("--fp16", action="store_true", help="also write them in half precision, for GPUs, to --out/fp16")
    add("--whole", action="store_true", help="also write the whole detector as one file, --out/detector.onnx")
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


def divide_pictures(path, count):
    """Return the pictures of a folder or glob that calibrate 8 bits, `count` at most, and those to measure on."""
    found, problems = find_pictures([path])
    if problems:
        raise sources.SourceError(f"--int8 {problems[0]}")
    originals = [picture for picture in found if not is_annotated(picture)]
    if len(originals) < len(found):
        print(f"left out, annotated by demo.py: {len(found) - len(originals)}")
    return quantize.divide(originals, count)


def write_also(write, *arguments):
    """Write an export in another way, too; return whether it is as good. An error is printed: the export is there."""
    try:
        return write(*arguments)
    except (sources.SourceError, ModelError, OSError) as error:
        print(f"export.py: {one_line(error)}", file=sys.stderr)
        return False


def write_whole(folder, picture):
    """Write the export in a folder as one file, detector.onnx; return whether it finds the same in a picture."""
    out = folder / "detector.onnx"
    equal = whole.write_whole(load(folder), out, read_picture(picture))
    if not equal:
        print(f"export.py: in one file, other objects are found: {out} was not written", file=sys.stderr)
    return equal


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        if args.whole and whole.MISSING:
            raise sources.SourceError(f"--whole: {whole.MISSING}: uv run --extra whole installs it")
        classes = read_names(args.classes) if args.classes else None
        options = {"--set": args.options, "--cfg-options": args.cfg_options}
        divided = None if args.int8 is None else divide_pictures(args.int8, args.calibrate)
        source = sources.load(args.config, args.checkpoint, args.trust_checkpoint, classes, options)
        if args.whole:
            whole.refuse(source.settings)
        if not export(source, args.out, args.opset, args.picture):
            return 1
        good = [write_also(quantize.write_int8, args.out, *divided)] if divided else []
        good += [write_also(quantize.write_fp16, args.out, args.picture)] if args.fp16 else []
        good += [write_also(write_whole, args.out, args.picture)] if args.whole else []
        return 0 if all(good) else 1
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
