"""One-stage detectors without anchors as a graph; compare detectors/fcos.py."""

import numpy as np

from graphs.one_stage import one_stage, sizes_of, values_of
from graphs.postprocess import as_float, clip_boxes, columns, constant, map_stride, stack


def fcos(graph):
    """Return the Detections in the graph's picture."""
    return one_stage(graph, decode)


def decode(graph, level, levels, priors):
    """Return the boxes [n, 4] around some points of a level."""
    op, points, sizes = graph.op, graph.settings.points, sizes_of(graph.op, levels)
    distances = values_of(op, levels[level]["reg"], 1, priors)
    if points.bins:
        shares = op.Softmax(op.Reshape(distances, [-1, 4, points.bins]), axis=2)
        distances = op.MatMul(shares, constant(op, np.arange(points.bins, dtype=np.float32)))
    elif points.exponential:
        distances = op.Exp(distances)
    distances = distances * float(points.units[level])
    centers = grid_points(op, sizes[level], map_stride(op, level, sizes, points), points.offset, priors)
    boxes = op.Concat(centers - columns(op, distances, 0, 2), centers + columns(op, distances, 2, 4), axis=1)
    return clip_boxes(op, boxes, graph.picture.image_size, float(points.last_pixel))


def grid_points(op, feature_size, stride, offset, indices):
    """Return some points [n, 2] of a level; feature_size is a value [2]."""
    width = op.Gather(feature_size, [1])
    y = indices / width
    x = indices - y * width
    stride = stride if isinstance(stride, float) else op.Slice(stride, [0], [2])
    return as_float(op, stack(op, x, y)) * stride + stride * float(offset)
