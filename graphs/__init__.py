"""Whole detectors as one ONNX graph of standard operators: build(detector) returns it."""

from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
from onnxscript import GraphBuilder

from graphs.cascade_rcnn import cascade_rcnn
from graphs.center_net import center_net
from graphs.detr import detr
from graphs.faster_rcnn import faster_rcnn
from graphs.fcos import fcos
from graphs.mask_rcnn import cascade_mask_rcnn, mask_rcnn
from graphs.networks import Network, opset_of
from graphs.paa import paa
from graphs.preprocess import Picture, preprocess
from graphs.retina_net import retina_net
from graphs.tood import tood
from graphs.yolo import yolo
from sources.onnx_files import check_standard

OPSET = 18  # of ONNX, the first that has all operators of graphs/, unless a network needs a later one

FAMILIES = {
    "faster_rcnn": faster_rcnn,
    "cascade_rcnn": cascade_rcnn,
    "mask_rcnn": mask_rcnn,
    "cascade_mask_rcnn": cascade_mask_rcnn,
    "retina_net": retina_net,
    "paa": paa,
    "fcos": fcos,
    "tood": tood,
    "yolo": yolo,
    "detr": detr,
    "center_net": center_net,
}


class Graph(NamedTuple):
    """What a family needs to add itself to a graph."""

    op: Any  # adds nodes, see graphs/postprocess.py
    networks: Any  # {file name: Network}
    family: Any  # its class in detectors/
    settings: Any
    picture: Picture

    def record(self, stage, **values):
        """Give values the names that the stages of a detector record, such as "propose.proposals"."""
        for name, value in values.items():
            if not value.is_graph_input() and "stage" not in value.meta:  # the first name stays
                value.name, value.meta["stage"] = f"{stage}.{name}", stage


def build(detector, from_picture=False, fixed=None):
    """Return an exported detector as ir.Model.

    Its inputs are what preprocess returns or, with `from_picture`, the picture itself: [h, w, 3] uint8 BGR. Its outputs
    are Detections or, with a number `fixed`, what padded returns.
    """
    models = {name: onnx.load(str(network.path)) for name, network in detector.networks.items()}
    for model in models.values():
        check_standard(model)
    opset = max([OPSET, *map(opset_of, models.values())])
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="detector")
    builder = GraphBuilder(graph)
    op = builder.op
    tensors = detector.tensors(detector.settings)
    networks = {name: Network(Path(name).stem, model, tensors[name], op) for name, model in models.items()}
    before = ir.set_value_magic_handler(op)  # +, -, * and / of values
    try:
        picture = add_inputs(builder, detector.settings.preprocess, from_picture)
        whole = Graph(op, networks, type(detector), detector.settings, picture)
        whole.record("preprocess", **picture._asdict())
        found = FAMILIES[detector.settings.type](whole)
        outputs = found._asdict() if fixed is None else padded(op, found, fixed)
    finally:
        ir.set_value_magic_handler(before)
    for name, value in outputs.items():
        if value is not None:
            builder.add_output(value, name)
    return ir.Model(graph, ir_version=10)


def add_inputs(builder, settings, from_picture):
    """Add the inputs to a graph and return its Picture."""
    if from_picture:
        return preprocess(builder.op, builder.input("picture", ir.DataType.UINT8, ["h", "w", 3]), settings)
    return Picture(
        builder.input("image", ir.DataType.FLOAT, [1, 3, "H", "W"]),
        builder.input("image_size", ir.DataType.FLOAT, [2]),
        builder.input("scale_factor", ir.DataType.FLOAT, [4]),
    )


def padded(op, found, count):
    """Return the best `count` Detections of one picture as TensorRT's users know them: a batch, padded with zeros."""
    parts = {name: values for name, values in found._asdict().items() if values is not None}
    found = {name: op.Slice(values, [0], [count], [0]) for name, values in parts.items()}
    length = op.Shape(found["scores"])
    outputs = {"num_dets": op.Cast(op.Unsqueeze(length, [0]), to=ir.DataType.INT32)}
    for name, values in found.items():
        outputs[name] = op.Unsqueeze(op.Pad(values, op.Concat([0], count - length, axis=0), None, [0]), [0])
    outputs["labels"] = op.Cast(outputs["labels"], to=ir.DataType.INT32)
    return outputs
