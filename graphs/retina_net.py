"""One-stage detectors with anchors as a graph; compare detectors/retina_net.py."""

import numpy as np

from graphs.one_stage import one_stage, sizes_of, values_of
from graphs.postprocess import columns, constant, decode_boxes, grid_anchors, map_stride


def retina_net(graph):
    """Return the Detections in the graph's picture."""
    return one_stage(graph, decode)


def decode(graph, level, levels, priors):
    """Return the boxes [n, 4] that a level's map of deltas makes of some anchors."""
    op, settings = graph.op, graph.settings
    boxes, deltas = anchors_and_values(graph, level, levels, priors)
    if settings.max_shift is not None:
        sizes = columns(op, boxes, 2, 4) - columns(op, boxes, 0, 2)
        limits = settings.max_shift / sizes
        mean, std = (constant(op, np.float32(values[:2])) for values in (settings.deltas.means, settings.deltas.stds))
        shifts = op.Min(op.Max(columns(op, deltas, 0, 2), (-limits - mean) / std), (limits - mean) / std)
        deltas = op.Concat(shifts, columns(op, deltas, 2, 4), axis=1)
    return decode_boxes(op, boxes, deltas, settings.deltas, graph.picture.image_size)


def anchors_and_values(graph, level, levels, priors):
    """Return some anchors [n, 4] of a level, and what the network says of them [n, 4]."""
    op, anchors, sizes = graph.op, graph.settings.anchors, sizes_of(graph.op, levels)
    base = np.float32(anchors.boxes[level])
    boxes = grid_anchors(op, base, sizes[level], map_stride(op, level, sizes, anchors), priors)
    return boxes, values_of(op, levels[level]["reg"], len(base), priors)
