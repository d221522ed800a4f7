"""Write a detector as one ONNX file: its networks and everything between and after them, in standard operators.

python whole.py FOLDER [OUT.onnx]       the export in FOLDER; without OUT.onnx, to FOLDER/detector.onnx

For where there is no NumPy: a program in another language, a phone, a browser. Inputs are what detectors/preprocess.py
makes of a picture: `image` [1, 3, H, W] float32, `image_size` [2] (height, width) and `scale_factor` [4], both float32;
with --from-picture, the picture itself: `picture` [h, w, 3] uint8, BGR. Outputs are `boxes` [d, 4], `scores` [d] and
`labels` [d], best first, and of a detector with masks `masks` [d, s, s], the scores of the cells of each box.
All settings, such as thresholds, are built in. What it finds in a picture is compared with what the networks and NumPy
find. Exit status: 0 the same, 1 something else (then nothing is written), 2 nothing could be done, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # read when cv2 is imported, as in demo.py
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

try:
    import cv2
    import numpy as np
    import onnx
    import onnx_ir
    import onnxruntime
    import onnxscript.optimizer

    import graphs
    from compare import any_score, verify_detections
    from detectors import FIRST, Detections, ModelError, load_folder, one_line
    from detectors.mask_rcnn import paste_all
    from detectors.preprocess import preprocess
    from detectors.settings import write
    from pictures import name_and_value, number_of, read_picture, run_program, write_file
    from sources.onnx_files import check_standard
except ImportError as error:  # --help works all the same
    MISSING = error
else:
    MISSING = None

HERE = Path(__file__).resolve().parent


def refuse(settings):
    """Refuse what cannot be written with standard operators: ModelError."""
    if settings.type not in graphs.FAMILIES:
        raise ModelError(f"{settings.type}: not written as one file; these are: {', '.join(graphs.FAMILIES)}")
    for name in ("proposals", "head"):
        if getattr(getattr(settings, name, None), "soft_min_score", None) is not None:
            raise ModelError(f"{name}.soft_min_score: Soft-NMS is no operator of ONNX; whole.py FOLDER "
                             f"--set {name}.soft_min_score=null writes NMS in its place")  # fmt: skip


def build(detector, simplify=True, **options):
    """Return a detector as onnx.ModelProto; options: those of graphs.build. ModelError if that fails."""
    try:
        model = graphs.build(detector, **options)
        model = onnx_ir.to_proto(onnxscript.optimizer.optimize(model) if simplify else model)
        onnx.helper.set_model_props(model, {"detector": write(detector.settings)})
        check_standard(model)
    except Exception as error:  # those of onnx and onnxscript have no common base class
        raise ModelError(f"it cannot be written as one file: {one_line(error)}") from error
    return model


def start(model):
    """Return an onnxruntime.InferenceSession of an onnx.ModelProto."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; onnxruntime would print them as well
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session, image, settings):
    """Return the outputs of a detector in one file for an image [h, w, 3], by their names."""
    blob, image_size, scale_factor = preprocess(image, settings.preprocess)[:3]
    inputs = {"image": blob, "image_size": np.float32(image_size), "scale_factor": scale_factor, "picture": image}
    arrays = session.run(None, {tensor.name: inputs[tensor.name] for tensor in session.get_inputs()})
    return {tensor.name: array for tensor, array in zip(session.get_outputs(), arrays)}


def detections(outputs, image, settings):
    """Return the Detections that outputs of `run` mean."""
    if "num_dets" in outputs:
        count = int(outputs["num_dets"][0, 0])
        outputs = {name: values[0, :count] for name, values in outputs.items() if name != "num_dets"}
    found = Detections(**outputs)
    if found.masks is None:
        return found
    picture = preprocess(image, settings.preprocess)
    return found._replace(masks=paste_all(found.masks, found.boxes, picture, settings.masks))


def outputs_of(model, image, settings):
    """Return what `run` returns for a model; ModelError if onnxruntime cannot run it."""
    try:
        return run(start(model), image, settings)
    except Exception as error:  # onnxruntime's errors have no common base class
        raise ModelError(f"onnxruntime fails with the whole detector: {one_line(error)}") from error


def verify(title, detector, outputs, image):
    """Print a line for a detector in one file against its networks and NumPy; return whether it is True."""
    expected = detector(image)
    if "num_dets" in outputs:
        expected = expected.where(slice(outputs["scores"].shape[1]))
    return verify_detections(title, detections(outputs, image, detector.settings), expected, "with NumPy")


def write_whole(detector, out, image, **options):
    """Write a detector to the file `out`, if it finds the same in an image; return whether it does.

    They are compared twice, as in export.py: at the detector's own score threshold, and at 0. options: those of
    graphs.build.
    """
    refuse(detector.settings)
    model, other = build(detector, **options), any_score(detector)
    models = (model, build(detector, False, **options), build(other, **options))
    outputs, unsimplified, of_any_score = (outputs_of(each, image, detector.settings) for each in models)
    for name, values in outputs.items():
        if not np.array_equal(values, unsimplified[name]):
            raise ModelError(f"simplified, the graph gives other {name}: please report it")
    equal = verify("in one file", detector, outputs, image)
    equal &= verify("in one file, with any score", other, of_any_score, image)
    if equal:
        write_file(out, model.SerializeToString())
        print(f"written: {out} ({len(model.graph.node)} operators, opset {model.opset_import[0].version})")
    return equal


# ---------------------------------------------------------------------- the command line


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="whole.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="of an export")
    add("out", metavar="OUT.onnx", type=Path, nargs="?", help="the file (default: FOLDER/detector.onnx)")
    add("--from-picture", action="store_true", help="it also resizes and normalises: its input is the picture itself")
    add("--end-to-end-fixed", metavar="D", dest="fixed",
        type=None if MISSING else number_of("detections"),
        help="outputs of fixed size, as TensorRT's users know them: num_dets [1, 1], boxes [1, D, 4], ...")  # fmt: skip
    add("--set", metavar="NAME=VALUE", dest="options", action="append", default=[],
        type=None if MISSING else name_and_value,
        help="another value for a setting, such as head.score_threshold=0.3; may be repeated")  # fmt: skip
    add("--picture", metavar="FILE", type=Path, default=HERE / "asset" / "shapes.png",
        help="in which detections are compared (default: the bundled picture)")  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def checked_picture(path, settings):
    """Return the image in a file; ModelError if the detector cannot take it."""
    try:
        image = read_picture(path)
        preprocess(image, settings.preprocess)
    except (ValueError, MemoryError, cv2.error) as error:
        raise ModelError(f"{path}: {one_line(error)}") from error
    return image


def check_out(out, folder, settings):
    """Refuse a file that cannot be written, or that the export in the folder would be lost by: ModelError."""
    if out.is_dir() or not out.parent.is_dir():
        raise ModelError(f"{out}: " + ("a folder: name a file in it" if out.is_dir() else "there is no such folder"))
    if not os.access(out.parent, os.W_OK):
        raise ModelError(f"{out.parent}: this folder may not be written")
    if out.suffix != ".onnx":
        raise ModelError(f"{out}: name a file that ends in .onnx")
    if out.resolve() in [(folder / name).resolve() for name in {*settings.networks, *FIRST}]:
        raise ModelError(f"{out} is a name of the export's networks: choose another one")


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    out = args.out or args.folder / "detector.onnx"
    try:
        detector = load_folder(args.folder, args.options)
        check_out(out, args.folder, detector.settings)
        image = checked_picture(args.picture, detector.settings)
        if write_whole(detector, out, image, from_picture=args.from_picture, fixed=args.fixed):
            return 0
        print(f"whole.py: in one file, other objects are found: {out} was not written", file=sys.stderr)
        return 1
    except (ModelError, OSError) as error:
        print(f"whole.py: {one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("whole.py: interrupted", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    if MISSING:
        read_arguments(None)
        print(f"whole.py: {MISSING}: uv run --extra whole installs it, or pip install '.[whole]'", file=sys.stderr)
        sys.exit(2)
    run_program(main)
