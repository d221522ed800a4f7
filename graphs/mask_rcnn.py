"""Mask R-CNN as a graph; compare detectors/mask_rcnn.py. Masks stay as the head gives them: nothing is pasted."""

from graphs.cascade_rcnn import find_after_stages
from graphs.faster_rcnn import find_objects, find_proposals, pool
from graphs.postprocess import sigmoid, stack


def mask_rcnn(graph):
    """Return the Detections in the graph's picture, with their masks [d, s, s]."""
    features, proposals = find_proposals(graph)
    found = find_objects(graph, features, proposals)
    return found._replace(masks=mask_scores(graph, found, features))


def cascade_mask_rcnn(graph):
    """Return the Detections in the graph's picture, with their masks [d, s, s]."""
    features, proposals = find_proposals(graph)
    found = find_after_stages(graph, features, proposals)
    return found._replace(masks=mask_scores(graph, found, features))


def mask_scores(graph, found, features):
    """Return the scores [d, s, s], 0 to 1, of the cells of each of the Detections' boxes."""
    op, settings = graph.op, graph.settings.masks
    rois = found.boxes * graph.picture.scale_factor
    roi_feats = pool(graph, features, rois, settings.rois, "align_masks")
    channel = op.Mul(found.labels, 0) if settings.class_agnostic else found.labels
    total, heads = None, [network for name, network in graph.networks.items() if name.startswith("mask")]
    for head in heads:
        (mask,) = head(roi_feats, graph.record)
        scores = sigmoid(op, op.GatherND(mask, stack(op, channel), batch_dims=1))
        total = scores if total is None else total + scores
    return total / float(len(heads))  # a cascade has several heads
