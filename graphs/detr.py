"""DETR as a graph; compare detectors/detr.py."""

from graphs.postprocess import clip_boxes, columns, rescale, rows_where, top_k
from postprocess import Detections


def detr(graph):
    """Return the Detections in the graph's picture."""
    op, head, picture = graph.op, graph.settings.head, graph.picture
    cls, reg = (op.Squeeze(output, [0]) for output in graph.networks["model.onnx"](picture.blob, graph.record))
    every = columns(op, op.Softmax(cls, axis=1), 0, len(graph.settings.classes))
    labels, scores = op.ArgMax(every, axis=1, keepdims=0), op.ReduceMax(every, [1], keepdims=0)
    centers, sizes = columns(op, reg, 0, 2), columns(op, reg, 2, 4)
    resized = op.Concat(centers - sizes / 2.0, centers + sizes / 2.0, axis=1)
    resized = clip_boxes(op, resized * op.Gather(picture.image_size, [1, 0, 1, 0]), picture.image_size)
    boxes = rescale(op, resized, picture, head)
    kept = top_k(op, scores, head.max_per_img)
    (kept,) = rows_where(op, op.Greater(op.Gather(scores, kept), head.score_threshold), kept)
    graph.record("detect", candidates=boxes, resized=resized, scores=scores, labels=labels, kept=kept)
    return Detections(op.Gather(boxes, kept), op.Gather(scores, kept), op.Gather(labels, kept))
