"""Faster R-CNN between and after its two networks, told a second time: as operators of an ONNX graph.

From grid_anchors on, a function has the name of one in the other postprocess.py (but clip_boxes, a line there), stands
in its order, and takes the same arguments after `op`; that file says what it computes and why. Here nothing is
computed: a function adds the nodes to a graph that will compute it. `op` adds a node, op.Exp(x) say, and returns its
output, a *value*; +, -, * and / of values add nodes, too. What is known by now, such as anchors and thresholds, is
worked out in NumPy and becomes a constant of the graph.

Only what the standard has an operator for is shorter: TopK, NonMaxSuppression (which turns a box around whose corners
are in the wrong order; no family makes such boxes) and RoiAlign.
"""

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from postprocess import MAX_LOG_SCALE, NMS_SPLIT, Detections, base_anchors, ignore

NOT_IN_GROUP = -1.0  # a score below all others, which are 0 to 1


# ---------------------------------------------------------------------- what NumPy writes in brackets


def constant(op, array):
    """Return an array as a value."""
    return op.Constant(value=ir.tensor(array))


def columns(op, values, start, stop):
    """Return values[:, start:stop]."""
    return op.Slice(values, [start], [stop], [1])


def stack(op, *values):
    """Return values [n], side by side: [n, how many]."""
    return op.Concat(*(op.Unsqueeze(value, [1]) for value in values), axis=1)


def size_of(op, values, axis=0):
    """Return the length [1] of an axis."""
    return op.Shape(values, start=axis, end=axis + 1)


def nonzero(op, condition, axes):
    """Return the positions [n] along each of the axes where a condition is true, and all of them together [n, axes]."""
    positions = op.NonZero(condition)
    return [op.Gather(positions, axis) for axis in range(axes)], op.Transpose(positions)


def rows_where(op, condition, *values):
    """Return of each of the values the rows for which a condition [n] is true. Compress on CUDA fails if n is 0."""
    (rows,), _ = nonzero(op, condition, 1)
    return [op.Gather(value, rows) for value in values]


def as_float(op, values):
    """Return values as float32."""
    return op.Cast(values, to=TensorProto.FLOAT)


# ---------------------------------------------------------------------- the story


def grid_anchors(op, base, feature_size, stride, indices):
    """Return some anchors [k, 4] of a level; base [a, 4] is an array, feature_size a value [2]."""
    cell = indices / len(base)
    which = indices - cell * len(base)
    width = op.Gather(feature_size, [1])
    y = cell / width
    x = cell - y * width
    return op.Gather(constant(op, base), which) + as_float(op, stack(op, x, y, x, y)) * stride


def level_anchors(op, level, feature_sizes, settings, indices):
    """Return some anchors [k, 4] of a level."""
    base = base_anchors(settings.base_sizes[level], settings.scales, settings.ratios, settings.center_offset)
    base = base.round() if settings.rounded else base
    return grid_anchors(op, base, feature_sizes[level], map_stride(op, level, feature_sizes, settings), indices)


def map_stride(op, level, feature_sizes, settings):
    """Return the stride of a level: a number, or a value [4]."""
    if not settings.strides_of_maps:
        return float(settings.strides[level])
    finest, size = as_float(op, feature_sizes[0]), as_float(op, feature_sizes[level])
    return op.Gather(op.Floor(finest * float(settings.strides[0]) / size), [1, 0, 1, 0])


def decode_boxes(op, boxes, deltas, settings, image_size=None):
    """Return boxes [n, 4], moved and scaled by deltas [n, 4]."""
    deltas = deltas * constant(op, np.float32(settings.stds)) + constant(op, np.float32(settings.means))
    smallest = None if settings.shrinks_freely else float(-MAX_LOG_SCALE)
    centers = (columns(op, boxes, 0, 2) + columns(op, boxes, 2, 4)) * 0.5
    sizes = columns(op, boxes, 2, 4) - columns(op, boxes, 0, 2)
    centers = centers + sizes * columns(op, deltas, 0, 2)
    half_sizes = sizes * op.Exp(op.Clip(columns(op, deltas, 2, 4), smallest, float(MAX_LOG_SCALE))) * 0.5
    decoded = op.Concat(centers - half_sizes, centers + half_sizes, axis=1)
    return decoded if image_size is None else clip_boxes(op, decoded, image_size)


def clip_boxes(op, boxes, image_size, less=0.0):
    """Return boxes [n, 4], clipped to image_size, a value [2] (height, width), or to `less` pixels less."""
    return op.Min(op.Max(boxes, 0.0), op.Gather(image_size, [1, 0, 1, 0]) - less)


def pairwise_iou(op, boxes, others):
    """Return the intersection over union [n, m] of boxes [n, 4] and others [m, 4]."""
    x1, y1, x2, y2 = op.Split(boxes, axis=1, num_outputs=4, _outputs=4)  # [n, 1]
    other_x1, other_y1, other_x2, other_y2 = op.Split(op.Transpose(others), axis=0, num_outputs=4, _outputs=4)  # [1, m]
    width = op.Max(op.Min(x2, other_x2) - op.Max(x1, other_x1), 0.0)
    height = op.Max(op.Min(y2, other_y2) - op.Max(y1, other_y1), 0.0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1) - intersection
    return intersection / union


def moved_apart(op, boxes, groups, settings):
    """Return boxes [n, 4] as NMS sees them: each group [n] at a place of its own, unless there are too many boxes."""
    limit = settings.nms_moved_up_to
    if settings.nms_class_agnostic:
        return boxes
    largest = op.ReduceMax(op.Concat(op.Reshape(boxes, [-1]), [0.0], axis=0))  # the 0 is for when there is no box
    place = as_float(op, op.Unsqueeze(groups, [1]) + settings.nms_first_group)
    if limit is not None:
        place = place * as_float(op, op.LessOrEqual(size_of(op, boxes), limit))
    return boxes + place * (largest + 1.0)


def batched_nms(op, boxes, scores, groups, num_groups, settings):
    """Return the indices that NMS keeps of boxes [n, 4] in groups 0 to num_groups - 1, settings.max_per_img at most.

    The operator takes a score of every box for every group; a box has its own score for its own group.
    """
    moved = moved_apart(op, boxes, groups, settings)
    if settings.nms_class_agnostic:
        groups = groups * op.Cast(op.GreaterOrEqual(size_of(op, boxes), NMS_SPLIT), to=TensorProto.INT64)
    is_in = op.Equal(op.Unsqueeze(groups, [0]), constant(op, np.arange(num_groups)[:, None]))  # [groups, n]
    scores_by_group = op.Unsqueeze(op.Where(is_in, scores, NOT_IN_GROUP), [0])
    most = size_of(op, boxes) if settings.max_per_img is None else [settings.max_per_img]
    kept = op.NonMaxSuppression(
        op.Unsqueeze(moved, [0]), scores_by_group, most, [settings.iou_threshold], [NOT_IN_GROUP / 2]
    )
    kept = op.Gather(kept, 2, axis=1)
    # Best first, and of equal scores the first: they are put back among those that are not kept.
    left = op.ScatterElements(op.Expand(NOT_IN_GROUP, op.Shape(scores)), kept, op.Gather(scores, kept))
    return top_k(op, left, op.Min(size_of(op, kept), most))


def top_k(op, scores, k):
    """Return the indices of the k best scores [n], best first; k is a value [1], or a number above 0."""
    k = op.Min(size_of(op, scores), [k]) if isinstance(k, int) else k
    return op.TopK(scores, k, _outputs=2)[1]


def sigmoid(op, x):
    """Return 1 / (1 + exp(-x)). ONNX Runtime's own operator is off by a fifth where this is 1e-7."""
    return 1.0 / (op.Exp(-x) + 1.0)


def objectness(op, logits, softmax_of_two=False):
    """Return the scores [h * w * a] of a level's anchors from its logits [h * w * a], or twice as many."""
    if softmax_of_two:
        return op.Gather(op.Softmax(op.Reshape(logits, [-1, 2]), axis=1), 0, axis=1)
    return sigmoid(op, logits)


def propose(op, cls, reg, image_size, settings, record=ignore):
    """Turn the RPN's maps, [1, a, h, w] and [1, 4 a, h, w] for each level, into proposals [r, 4], best first."""
    feature_sizes = [op.Shape(logits, start=2) for logits in cls]
    boxes, scores, levels = [], [], []
    for level, (logits, deltas) in enumerate(zip(cls, reg)):
        logits = op.Reshape(op.Transpose(logits, perm=[0, 2, 3, 1]), [-1])
        level_scores = objectness(op, logits, settings.softmax)
        ranked = logits if settings.rank_logits else level_scores
        best = top_k(op, ranked, settings.nms_pre if settings.nms_pre > 0 else size_of(op, ranked))
        anchors = level_anchors(op, level, feature_sizes, settings.anchors, best)
        level_deltas = op.Gather(op.Reshape(op.Transpose(deltas, perm=[0, 2, 3, 1]), [-1, 4]), best)
        boxes.append(decode_boxes(op, anchors, level_deltas, settings, image_size))
        scores.append(op.Gather(level_scores, best))
        levels.append(op.Expand(level, op.Shape(best)))
    boxes, scores, levels = (op.Concat(*parts, axis=0) for parts in (boxes, scores, levels))
    good = op.And(large_enough(op, boxes, settings.min_bbox_size), op.Greater(scores, settings.score_threshold))
    boxes, scores, levels = rows_where(op, good, boxes, scores, levels)
    kept = batched_nms(op, boxes, scores, levels, len(cls), settings)
    proposals = op.Gather(boxes, kept)
    record("propose", candidates=boxes, scores=scores, levels=levels, kept=kept, proposals=proposals)
    return proposals


def large_enough(op, boxes, min_size):
    """Return which boxes [n, 4] have both sides above `min_size`; all, if that is below 0."""
    smaller_side = op.ReduceMin(columns(op, boxes, 2, 4) - columns(op, boxes, 0, 2), [1], keepdims=0)
    return op.Greater(smaller_side, min_size if min_size >= 0 else -np.inf)


def assign_levels(op, rois, num_levels, finest_scale=56):
    """Return the level [r] of the pyramid from which each RoI [r, 4] takes its features."""
    sides = op.Max(columns(op, rois, 2, 4) - columns(op, rois, 0, 2), 0.0)
    root = op.Sqrt(op.ReduceProd(sides, [1], keepdims=0))
    level = op.Floor(op.Log(root / float(finest_scale) + 1e-6) / float(np.log(2)))
    return op.Cast(op.Clip(level, 0.0, num_levels - 1.0), to=TensorProto.INT64)


def roi_align(op, features, rois, stride, settings):
    """Return the features [r, C, s, s] of RoIs [r, 4] in one level's map [1, C, h, w]."""
    return op.RoiAlign(
        features,
        rois,
        op.Expand(constant(op, np.array([0])), size_of(op, rois)),  # all of the first picture
        output_height=settings.output_size,
        output_width=settings.output_size,
        sampling_ratio=settings.sampling_ratio,
        spatial_scale=float(np.float32(1 / stride)),
        coordinate_transformation_mode="half_pixel" if settings.aligned else "output_half_pixel",
    )


def align_levels(op, features, rois, levels, settings):
    """Return the features [r, C, s, s] of RoIs [r, 4], each taken from the map of its level [r]."""
    if len(settings.strides) == 1:
        return roi_align(op, features[0], rois, settings.strides[0], settings)
    pooled, places = [], []
    for level, stride in enumerate(settings.strides):
        (here,), _ = nonzero(op, op.Equal(levels, level), 1)
        pooled.append(roi_align(op, features[level], op.Gather(rois, here), stride, settings))
        places.append(here)
    places = op.Concat(*places, axis=0)
    came_from = op.ScatterElements(places, places, op.Range(0, op.Size(places), 1))  # the other way round
    return op.Gather(op.Concat(*pooled, axis=0), came_from)


def rescale(op, boxes, picture, settings):
    """Return boxes [n, 4] of the resized picture in pixels of the picture as it came in."""
    if not settings.multiplied_back:
        return boxes / picture.scale_factor
    size = op.Gather(picture.image_size, [1, 0, 1, 0])
    original_size = op.Round(size / picture.scale_factor)
    return boxes * (original_size / size)


def detect(op, cls, reg, rois, picture, settings, record=ignore):
    """Turn the head's outputs into Detections, best first, no more than settings.max_per_img."""
    num_classes = cls.shape[1] - 1
    class_scores = columns(op, op.Softmax(cls, axis=1), 0, num_classes)
    (roi, label), places = nonzero(op, op.Greater(class_scores, settings.score_threshold), 2)
    scores = op.GatherND(class_scores, places)
    if settings.class_agnostic:
        deltas = op.Gather(reg, roi)
    else:
        deltas = op.GatherND(op.Reshape(reg, [-1, num_classes, 4]), places)
    resized = decode_boxes(op, op.Gather(rois, roi), deltas, settings, picture.image_size)
    large = large_enough(op, resized, settings.min_bbox_size)
    resized, scores, label, roi = rows_where(op, large, resized, scores, label, roi)
    boxes = rescale(op, resized, picture, settings)
    kept = batched_nms(op, resized if settings.nms_resized else boxes, scores, label, num_classes, settings)
    record("detect", candidates=boxes, resized=resized, scores=scores, labels=label, rois=roi, kept=kept)
    return Detections(op.Gather(boxes, kept), op.Gather(scores, kept), op.Gather(label, kept))
