"""YOLO as a graph; compare detectors/yolo.py."""

from graphs.one_stage import one_stage
from graphs.postprocess import columns, sigmoid
from graphs.retina_net import anchors_and_values


def yolo(graph):
    """Return the Detections in the graph's picture."""
    return one_stage(graph, decode)


def decode(graph, level, levels, priors):
    """Return the boxes [n, 4] of some anchors of a level; they may leave the picture."""
    op, settings = graph.op, graph.settings
    boxes, values = anchors_and_values(graph, level, levels, priors)
    shifts = columns(op, values, 0, 2)
    shifts = sigmoid(op, shifts) - 0.5 if settings.within_cell else shifts
    centers = (columns(op, boxes, 0, 2) + columns(op, boxes, 2, 4)) * 0.5
    centers = centers + shifts * float(settings.anchors.strides[level])
    half_sizes = (columns(op, boxes, 2, 4) - columns(op, boxes, 0, 2)) * 0.5 * op.Exp(columns(op, values, 2, 4))
    return op.Concat(centers - half_sizes, centers + half_sizes, axis=1)
