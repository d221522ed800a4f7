"""Faster R-CNN from a picture to detections, as a graph; compare detectors/faster_rcnn.py."""

from graphs.postprocess import align_levels, assign_levels, detect, propose


def faster_rcnn(graph):
    """Return the Detections in the graph's picture."""
    features, proposals = find_proposals(graph)
    return find_objects(graph, features, proposals)


def find_proposals(graph):
    """Return the features of every level, and the proposals [r, 4]."""
    # Where could something be? Scores and deltas for the anchors of every level.
    maps = graph.networks["model1.onnx"](graph.picture.blob, graph.record)
    n = len(maps) // 3
    cls, reg, features = maps[:n], maps[n : 2 * n], maps[2 * n :]
    return features, propose(graph.op, cls, reg, graph.picture.image_size, graph.settings.proposals, graph.record)


def find_objects(graph, features, proposals):
    """Return the Detections among the proposals [r, 4]."""
    # What is it, and where exactly? A score for every class, and deltas for every class.
    roi_feats = pool(graph, features, proposals, graph.settings.rois)
    cls, reg = graph.networks["model2.onnx"](roi_feats, graph.record)
    return detect(graph.op, cls, reg, proposals, graph.picture, graph.settings.head, graph.record)


def pool(graph, features, rois, settings, stage="align"):
    """Return the features [r, C, s, s] of RoIs [r, 4], each cut out of the level that fits its size."""
    levels = assign_levels(graph.op, rois, len(settings.strides), settings.finest_scale)
    roi_feats = align_levels(graph.op, features, rois, levels, settings)
    graph.record(stage, levels=levels, roi_feats=roi_feats)
    return roi_feats
