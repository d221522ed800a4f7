"""Cascade R-CNN as a graph; compare detectors/cascade_rcnn.py."""

from graphs.faster_rcnn import find_proposals, pool
from graphs.postprocess import columns, decode_boxes, detect


def cascade_rcnn(graph):
    """Return the Detections in the graph's picture."""
    features, proposals = find_proposals(graph)
    return find_after_stages(graph, features, proposals)


def find_after_stages(graph, features, proposals):
    """Return the Detections among the proposals [r, 4], after moving them from stage to stage."""
    settings, rois, logits = graph.settings, proposals, []
    for stage, refinement in enumerate([*settings.refinements, None]):
        roi_feats = pool(graph, features, rois, settings.rois, f"align_{stage}")
        cls, reg = graph.networks[f"model2_{stage}.onnx"](roi_feats, graph.record)
        logits.append(cls)
        if refinement:
            rois = refine(graph.op, cls, reg, rois, graph.picture.image_size, refinement)
            graph.record(f"refine_{stage}", rois=rois)
    total = logits[0]
    for cls in logits[1:]:
        total = total + cls
    mean = total / float(len(logits))
    return detect(graph.op, mean, reg, rois, graph.picture, settings.head, graph.record)


def refine(op, cls, reg, rois, image_size, settings):
    """Return RoIs [r, 4], each moved by the deltas of its best class and clipped to image_size."""
    if not settings.class_agnostic:
        num_classes = cls.shape[1] - 1
        best = op.ArgMax(columns(op, cls, 0, num_classes), axis=1, keepdims=1)
        reg = op.GatherND(op.Reshape(reg, [-1, num_classes, 4]), best, batch_dims=1)
    return decode_boxes(op, rois, reg, settings, image_size)
