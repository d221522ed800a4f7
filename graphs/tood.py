"""TOOD as a graph; compare detectors/tood.py."""

from onnx import TensorProto

from graphs.fcos import grid_points
from graphs.one_stage import one_stage, sizes_of, values_of
from graphs.postprocess import as_float, columns, stack


def tood(graph):
    """Return the Detections in the graph's picture."""
    return one_stage(graph, decode)


def decode(graph, level, levels, priors):
    """Return the boxes [n, 4] of some points of a level; they may leave the picture."""
    op, points, maps = graph.op, graph.settings.points, levels[level]
    size = sizes_of(op, levels)[level]
    every = grid_points(op, size, 1.0, points.offset, op.Range(0, op.ReduceProd(size, keepdims=0), 1))
    reg = op.Transpose(op.Reshape(maps["reg"], [4, -1]))
    sides = op.Concat(every - columns(op, reg, 0, 2), every + columns(op, reg, 2, 4), axis=1)  # [cells, 4]
    offsets = values_of(op, maps["offset"], 1, priors)  # of each side, y before x
    cells = op.Gather(every, priors) - float(points.offset)
    read_sides = []
    for side in range(4):
        x = columns(op, offsets, 2 * side + 1, 2 * side + 2)
        y = columns(op, offsets, 2 * side, 2 * side + 1)
        values = op.Reshape(op.Gather(sides, side, axis=1), size)
        read_sides.append(read(op, values, cells + op.Concat(x, y, axis=1)))
    boxes, own = stack(op, *read_sides), op.Gather(sides, priors)
    wrong = op.Cast(op.Greater(columns(op, boxes, 0, 2), columns(op, boxes, 2, 4)), to=TensorProto.FLOAT)
    swapped = op.Greater(op.ReduceMax(wrong, [1], keepdims=1), 0.0)
    return op.Where(swapped, own, boxes) * float(graph.settings.points.strides[level])


def read(op, values, places):
    """Return what a map [h, w] holds at places [n, 2], x and y in cells, between its cells; outside, it is zero."""
    padded, size = op.Pad(values, [1, 1, 1, 1]), op.Gather(op.Shape(values), [1, 0])  # width and height
    place = op.Min(op.Max(places + 1.0, 0.0), as_float(op, size + 1))
    first = op.Min(op.Cast(place, to=TensorProto.INT64), size)
    part = place - as_float(op, first)
    x, y, right, below = (op.Gather(v, axis, axis=1) for v in (first, part) for axis in (0, 1))

    def at(row, column):
        return op.GatherND(padded, stack(op, row, column))

    upper = at(y, x) * (1.0 - right) + at(y, x + 1) * right
    lower = at(y + 1, x) * (1.0 - right) + at(y + 1, x + 1) * right
    return upper * (1.0 - below) + lower * below
