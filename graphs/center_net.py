"""CenterNet as a graph; compare detectors/center_net.py."""

from graphs.postprocess import as_float, rescale, rows_where, stack, top_k
from postprocess import Detections


def center_net(graph):
    """Return the Detections in the graph's picture."""
    op, head, picture = graph.op, graph.settings.head, graph.picture
    heatmap, size, offset = graph.networks["model.onnx"](picture.blob, graph.record)
    largest = op.MaxPool(heatmap, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    scores = op.Reshape(op.Where(op.Equal(heatmap, largest), heatmap, 0.0), [-1])
    kept = top_k(op, scores, head.max_per_img)
    (kept,) = rows_where(op, op.Greater(op.Gather(scores, kept), head.score_threshold), kept)
    map_size, input_size = op.Shape(heatmap, start=2), op.Shape(picture.blob, start=2)  # height and width
    cells = op.ReduceProd(map_size, keepdims=1)
    labels = kept / cells
    cell = kept - labels * cells
    width = op.Gather(map_size, [1])
    y = cell / width
    corners = as_float(op, stack(op, cell - y * width, y))
    of_cells = [op.Transpose(op.Gather(op.Reshape(values, [2, -1]), cell, axis=1)) for values in (offset, size)]
    centers, half_sizes = corners + of_cells[0], of_cells[1] / 2.0
    stride = op.Gather(as_float(op, input_size) / as_float(op, map_size), [1, 0, 1, 0])
    resized = op.Concat(centers - half_sizes, centers + half_sizes, axis=1) * stride
    if graph.settings.preprocess.canvas:  # the picture is in the middle of the input, see in_the_middle
        begin = op.Floor(as_float(op, input_size) / 2.0) - op.Floor(picture.image_size / 2.0)
        resized = resized - op.Gather(begin, [1, 0, 1, 0])
    boxes = rescale(op, resized, picture, head)
    found = Detections(boxes, op.Gather(scores, kept), labels)
    graph.record("detect", candidates=boxes, resized=resized, scores=found.scores, labels=labels)
    return found
