"""Smaller numbers for an export's networks: 8 bits for processors, half precision for GPUs, and what they cost.

write_int8 and write_fp16 take the folder of an export and write another one into it, which every program runs as it
runs the first. No training framework is needed.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from tqdm import tqdm

from compare import any_score, mask_iou
from detectors import load, one_line, rle
from detectors.settings import changed
from pictures import read_picture
from postprocess import ignore, pairwise_iou
from sources import SourceError
from sources.onnx_files import check_standard, save_networks

OPERATORS = (  # the others stay float32
    "Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "Sigmoid", "Mul", "MaxPool", "Resize", "Concat",
)  # fmt: skip
SMALL = 2**12  # a product with fewer weights gains nothing
PASS_ON = ("Sigmoid", "Softmax", "Exp", "Transpose", "Reshape", "Gather", "Slice", "Split", "Squeeze", "Unsqueeze")
KEPT = 2**22  # bytes of what a network takes of one picture that calibrate it
FEWEST = 10  # pictures are needed
MEASURED = 100  # pictures on which the accuracy is measured, at most
SCORE, IOU = 0.3, 0.8  # a detection above this score should have a twin: the same label, and at least this IoU
SHARE = 0.9  # so many must have one
HALF_SCORE = 1e-2  # how far apart the scores of twins may be in half precision


# ---------------------------------------------------------------------- calibrate


def saturates():
    """Return whether sums of 8-bit products end at 16 bits here, as on processors without VNNI or its like."""
    shapes = {"a": (TensorProto.UINT8, 255), "b": (TensorProto.INT8, 127), "sums": (TensorProto.INT32, 0)}
    a, b, sums = (helper.make_tensor_value_info(name, kind, [64, 64]) for name, (kind, _) in shapes.items())
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["sums"])], "product", [a, b], [sums])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": np.full((64, 64), 255, np.uint8), "b": np.full((64, 64), 127, np.int8)})
    return bool((found != 64 * 255 * 127).any())


class Inputs(CalibrationDataReader):
    """What a network takes, one input after the other, as onnxruntime.quantization asks for it."""

    def __init__(self, tensor, files, title):
        self.feeds = ({tensor: np.load(file)} for file in tqdm(files, desc=title, unit="input"))

    def get_next(self):
        """Return the next input, or None."""
        return next(self.feeds, None)


@contextlib.contextmanager
def of_picture(picture):
    """Turn what can be wrong with the picture in a file into a SourceError that names it."""
    try:
        yield
    except (ValueError, MemoryError, cv2.error) as error:
        raise SourceError(f"{picture}: {one_line(error)}") from error


def detect(detector, picture, record=ignore):
    """Return the Detections in the picture of a file."""
    with of_picture(picture):
        return detector(read_picture(picture), record)


def described(pictures):
    """Return the names of pictures as text, the first of many."""
    return ", ".join(map(str, pictures[:3])) + (", ..." if pictures[3:] else "")


def record_inputs(detector, pictures, folder, score=SCORE):
    """Detect in pictures and save what each network takes there to a folder; return {network: [files]}.

    Of many RoIs some are kept, evenly spread: the best come first.
    """
    files, confident = {name: [] for name in detector.networks}, 0

    def keep(stage, **arrays):
        saved, array = files.get(f"{stage}.onnx"), next(iter(arrays.values()))
        if saved is not None and len(array):
            most = max(1, KEPT // array[0].nbytes)
            saved.append(folder / f"{stage}-{len(saved)}.npy")
            np.save(saved[-1], array[:: -(-len(array) // most)])

    for picture in tqdm(pictures, desc="calibrate", unit="picture"):
        confident += np.count_nonzero(detect(detector, picture, keep).scores > score)
    if not confident or not all(files.values()):
        raise SourceError(f"the detector finds nothing above {score} in {described(pictures)}, so it says nothing "
                          "about it: take pictures such as it will see")  # fmt: skip
    return files


# ---------------------------------------------------------------------- convert


def stay_float32(model):
    """Return the names of nodes that lose more in 8 bits than they gain.

    They are last layers of 1 x 1 cell, which cost little, and what only passes their outputs on: a score or a delta has
    more than 256 values. And sums with a constant, products of two maps other than swish, x * sigmoid(x), and products
    with few weights.
    """
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    outputs = {tensor.name for tensor in model.graph.output}
    sigmoids = {node.output[0] for node in model.graph.node if node.op_type in ("Sigmoid", "HardSigmoid")}
    names = []
    for node in reversed(model.graph.node):
        weights = [dims[name] for name in node.input if name in dims]
        last, layer = not outputs.isdisjoint(node.output), node.op_type in ("Conv", "Gemm", "MatMul")
        alone = (node.op_type == "Add" and weights) or (node.op_type == "Mul" and sigmoids.isdisjoint(node.input))
        few = node.op_type == "MatMul" and (not weights or np.prod(weights[0]) < SMALL)
        if last and (alone or node.op_type in PASS_ON):
            outputs.update(node.input)
            names.append(node.name)
        elif alone or few or (last and layer and all(np.prod(sides[2:]) == 1 for sides in weights)):
            names.append(node.name)
    return names


def give_own_biases(model):
    """Copy the biases that several layers share: onnxruntime 1.19 scales them for one of the layers."""
    biases, taken = {tensor.name: tensor for tensor in model.graph.initializer}, set()
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2] in biases:
            if node.input[2] in taken:
                copied = model.graph.initializer.add()
                copied.CopyFrom(biases[node.input[2]])
                copied.name = node.input[2] = f"{node.input[2]}_{len(taken)}"
            taken.add(node.input[2])


def converted(name, step, *arguments):
    """Return what a step in the conversion of a network returns; SourceError with the network's name if it fails."""
    try:
        return step(*arguments)
    except Exception as error:  # the errors of the libraries have no common base class
        raise SourceError(f"{name} cannot be converted: {type(error).__name__}: {one_line(error)}") from error


def to_int8(path, files, reduce_range):
    """Return the network in a file in 8 bits; files: its inputs, by which it is calibrated."""
    with tempfile.TemporaryDirectory(dir=files[0].parent) as folder:
        prepared, out = (Path(folder) / name for name in ("prepared.onnx", "int8.onnx"))
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(str(prepared))
        give_own_biases(model)
        onnx.save(model, str(prepared))
        quantize_static(
            str(prepared), str(out), Inputs(model.graph.input[0].name, files, path.name),
            op_types_to_quantize=list(OPERATORS), nodes_to_exclude=stay_float32(model),
            quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduce_range,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(str(out))


def to_fp16(path):
    """Return the network in a file in half precision; its input and outputs stay float32."""
    model = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
    OnnxModel(model).topological_sort()  # it leaves the conversion of the input at the end
    return model


def overflows(model, array):
    """Return the names of what is not finite in a network in half precision, where its input is `array`.

    A CPU computes in float32 all the same; only as outputs are the numbers what a GPU has.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    halves = [value for value in inferred.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT16]
    inferred.graph.output.extend(halves)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; onnxruntime would print them as well
    session = onnxruntime.InferenceSession(inferred.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in halves]
    found = session.run(names, {model.graph.input[0].name: array})
    return [name for name, values in zip(names, found) if not np.isfinite(values).all()]


# ---------------------------------------------------------------------- measure


class Likeness(NamedTuple):
    """How alike the detections of two detectors are, in some pictures."""

    counts: Tuple[int, int]  # detections above a score, of the first and of the second
    shares: Tuple[float, float]  # how many of these have a twin in the other
    iou: float  # the mean of twins
    score: float  # how far apart the scores of twins are, in the mean
    worst: float  # and at most
    mask_iou: Optional[float]  # the mean of twins, if they have masks


def twins(first, second):
    """Return the positions of twins [t] in two Detections, one to one, and the IoU [t] of their boxes."""
    overlaps, pairs = np.nan_to_num(pairwise_iou(first.boxes, second.boxes)), []
    overlaps[first.labels[:, None] != second.labels] = 0
    for i in range(len(overlaps)):
        j = overlaps[i].argmax() if len(second.boxes) else None
        if j is not None and overlaps[i, j] >= IOU:
            pairs.append((i, j, overlaps[i, j]))
            overlaps[:, j] = 0
    here, there, iou = np.float64(pairs).reshape(-1, 3).T
    return here.astype(int), there.astype(int), iou


def likeness(first, second, pictures, score=SCORE):
    """Return the Likeness of two detectors in pictures."""
    counts, with_twin, ious, apart, overlaps = np.zeros(2, int), np.zeros(2, int), [], [], []
    for picture in tqdm(pictures, desc="measure", unit="picture"):
        ours, theirs = (detect(detector, picture) for detector in (first, second))
        here, there, iou = twins(ours, theirs)
        scores = ours.scores[here], theirs.scores[there]
        sure = scores[0] > score
        counts += [np.count_nonzero(found.scores > score) for found in (ours, theirs)]
        with_twin += [np.count_nonzero(part > score) for part in scores]
        ious += iou[sure].tolist()
        apart += np.abs(scores[0] - scores[1])[sure].tolist()
        if ours.masks is not None:
            pairs = zip(ours.masks[here[sure]], theirs.masks[there[sure]])
            overlaps += [mask_iou(*map(rle.decode, pair)) for pair in pairs]
    means = [float(np.mean(values)) if values else None for values in (ious, apart, overlaps)]
    shares = with_twin / np.maximum(counts, 1)
    return Likeness(tuple(counts.tolist()), tuple(shares.tolist()), *means[:2], max(apart, default=None), means[2])


def describe(alike, name, pictures):
    """Return a Likeness as a line."""
    (ours, theirs), (here, there) = alike.counts, alike.shares
    plural = "" if len(pictures) == 1 else "s"
    text = f"{name}: in {len(pictures)} picture{plural} {here:.1%} of {ours} detections in float32 have a twin"
    text += f", and {there:.1%} of {theirs} in {name}"
    if alike.iou is not None:
        text += f"; mean IoU {alike.iou:.3f}, scores {alike.score:.4f} apart, {alike.worst:.4f} at most"
    return text if alike.mask_iou is None else f"{text}, mean IoU of masks {alike.mask_iou:.3f}"


# ---------------------------------------------------------------------- write


def divide(pictures, count):
    """Return the pictures, evenly spread, that calibrate, `count` at most, and those of the others to measure on."""
    if len(pictures) < FEWEST:
        raise SourceError(f"8 bits need at least {FEWEST} pictures, some to calibrate, and others to measure what it "
                          f"costs; found: {len(pictures)}")  # fmt: skip
    chosen = evenly(range(len(pictures)), min(count, len(pictures) * 4 // 5))
    others = [picture for i, picture in enumerate(pictures) if i not in chosen]
    return [pictures[i] for i in chosen], evenly(others, MEASURED)


def evenly(items, count):
    """Return so many of the items, evenly spread; all if there are no more."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def drop_unused_domains(model):
    """Remove the sets of operators that a model imports and does not use; onnxruntime's optimiser leaves all it has."""
    used = {node.domain for node in model.graph.node} | {"", "ai.onnx"}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)


def save_set(models, detector, note, folder):
    """Save the networks of another export of a detector to a folder; note: what was done to them."""
    for name, model in models.items():
        drop_unused_domains(model)
        converted(name, check_standard, model)
    save_networks(models, changed(detector.settings, "source", {**detector.settings.source, **note}), folder)


def remove_sets(folder):
    """Remove what was made of an export in a folder that has been replaced."""
    for kind in ("int8", "int8-rejected", "fp16", "fp16-rejected"):
        for path in (folder / kind).glob("*.onnx"):
            path.unlink()
        with contextlib.suppress(OSError):
            (folder / kind).rmdir()  # if nothing else is in it


def place(names, work, folder, kind, good):
    """Move files to a folder named after their kind, or aside, so that one such set is there and no part of another."""
    out, other = (folder / name for name in (kind, f"{kind}-rejected")[:: 1 if good else -1])
    out.mkdir(exist_ok=True)
    for name in names:
        os.replace(work / name, out / name)
    for path in [*out.glob("*.onnx"), *other.glob("*.onnx")]:
        if path.parent == other or path.name not in names:
            path.unlink()
    with contextlib.suppress(OSError):
        other.rmdir()  # if nothing else is in it
    print(f"written: {', '.join(str(out / name) for name in names)}")


def compared(first, second, pictures, kind, score=SCORE):
    """Print how alike two detectors are in pictures; return their Likeness. SourceError if nothing is found there."""
    alike = likeness(first, second, pictures, score)
    if not any(alike.counts):
        raise SourceError(f"nothing is found in {described(pictures)}, "
                          f"so {kind} cannot be compared: take other pictures, or more")  # fmt: skip
    print(describe(alike, kind, pictures), end="  ")
    return alike


def write_int8(folder, calibrating, measuring):
    """Write the export in a folder in 8 bits to its folder int8; return whether it finds the same objects.

    Some pictures calibrate it; others, which were not seen before, say how alike the detections are. Where these
    differ, it is written to int8-rejected. SourceError if the pictures cannot do that.
    """
    for picture in measuring:  # one that is broken is better found now than after everything else
        with of_picture(picture):
            read_picture(picture)
    detector = load(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".int8-") as work:
        work = Path(work)
        files, reduce_range = record_inputs(detector, calibrating, work), saturates()
        models = {name: converted(name, to_int8, folder / name, files[name], reduce_range) for name in files}
        note = {"pictures": len(calibrating), "weights": 7 if reduce_range else 8}
        save_set(models, detector, {"int8": note}, work)
        good = min(compared(detector, load(work), measuring, "int8").shares) >= SHARE
        print(good)
        place(models, work, folder, "int8", good)
    return good


def write_fp16(folder, picture):
    """Write the export in a folder in half precision to its folder fp16; return whether it finds the same in a picture.

    Compared are detections of any score, as in export.py. Inputs and outputs stay float32. Where the detections
    differ, or a number is too large for half precision, it is written to fp16-rejected.
    """
    detector = load(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fp16-") as work:
        work = Path(work)
        files = record_inputs(any_score(detector), [picture], work, score=0)
        models = {name: converted(name, to_fp16, folder / name) for name in detector.networks}
        inputs = {name: np.load(files[name][0]) for name in models}
        infinite = [tensor for name in models for tensor in converted(name, overflows, models[name], inputs[name])]
        save_set(models, detector, {"fp16": True}, work)
        alike = compared(any_score(detector), any_score(load(work)), [picture], "fp16", score=0)
        good = min(alike.shares) >= SHARE and alike.worst <= HALF_SCORE and not infinite
        print(good if not infinite else f"{good}: too large for half precision: {', '.join(infinite[:3])}")
        place(models, work, folder, "fp16", good)
    return good
