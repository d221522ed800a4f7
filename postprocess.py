"""Faster R-CNN between and after its two networks, in NumPy alone.

    score and delta maps -> propose -> assign_levels -> align_levels -> (second network) -> detect

Boxes are float32 [n, 4]: x1, y1, x2, y2 in pixels of the resized picture; width = x2 - x1. A level is one map of the
feature pyramid, the finest first; its stride is the distance in pixels between two neighbouring cells. `settings` are
the classes of detectors/settings.py, whose fields say what they mean. Every function computes what MMDetection 2.28
computes, with the same float32 operations in the same order wherever that order decides which box survives; with
other settings, what torchvision computes.

The papers: Faster R-CNN (arXiv 1506.01497), FPN (1612.03144), Mask R-CNN (1703.06870), R-CNN (1311.2524).
"""

from typing import NamedTuple, Optional

import numpy as np

MAX_LOG_SCALE = np.float32(abs(np.log(16 / 1000)))  # how much a box grows or shrinks at most, see decode_boxes
NMS_BLOCK = 64  # boxes handled at a time: bounds the memory of the IoU matrix, does not change the result
NMS_SPLIT = 10_000  # from this many boxes on, mmcv runs its NMS once for each group instead of once for all


class Detections(NamedTuple):
    """What was found in a picture, best first."""

    boxes: np.ndarray  # [d, 4] float32: x1, y1, x2, y2 in pixels of the picture as it came in
    scores: np.ndarray  # [d] float32, 0 to 1
    labels: np.ndarray  # [d] int64, positions in the detector's list of classes
    masks: Optional[np.ndarray] = None  # [d] objects, each a run-length encoded mask of the picture as it came in

    def where(self, chosen):
        """Return the detections that a mask [d] or indices choose."""
        return Detections(*(None if field is None else field[chosen] for field in self))


def ignore(stage, **arrays):
    """Do nothing: the default `record`, for when nobody wants to see a stage's arrays."""


def base_anchors(base_size, scales, ratios, center_offset=0.0):
    """Return the anchors [len(ratios) * len(scales), 4] of a level's first cell, the one in the upper left corner.

    Each has the area (base_size * scale)^2 and one of the ratios height / width; ratios vary slowest.
    Faster R-CNN, section 3.1.1.
    """
    scales, height_factor = np.float32(scales), np.sqrt(np.float32(ratios))
    size = np.float32(base_size)
    widths = (size * (1 / height_factor)[:, None] * scales).ravel()
    heights = (size * height_factor[:, None] * scales).ravel()
    center = np.float32(center_offset * base_size)
    return np.stack([center - widths / 2, center - heights / 2, center + widths / 2, center + heights / 2], axis=1)


def grid_anchors(base, feature_size, stride, indices=None):
    """Return the anchors of a level: its base anchors [a, 4], moved to every cell of a map of (height, width) cells.

    They are ordered by row, column, base anchor: [height * width * a, 4]. `indices` [k] picks some of them: [k, 4].
    `stride` is one number, or four if it differs along x and y.
    Faster R-CNN, section 3.1.1.
    """
    height, width = feature_size
    if indices is None:
        indices = np.arange(height * width * len(base))
    cell, which = np.divmod(indices, len(base))
    y, x = np.divmod(cell, width)
    return base[which] + np.stack([x, y, x, y], axis=1).astype(np.float32) * np.float32(stride)


def level_anchors(level, feature_sizes, settings, indices=None):
    """Return the anchors of a level, as grid_anchors does, given the (height, width) of every level's map."""
    base = base_anchors(settings.base_sizes[level], settings.scales, settings.ratios, settings.center_offset)
    base = base.round() if settings.rounded else base
    return grid_anchors(base, feature_sizes[level], map_stride(level, feature_sizes, settings), indices)


def map_stride(level, feature_sizes, settings):
    """Return the stride of a level, one number or four along x, y, x, y, given the size of every level's map.

    Mostly the stride is the one that the level was designed with. With `strides_of_maps` it is how often the map's
    side goes into the input's, which is less where a map was rounded up: 61, not 64, for an input of 800 and a map
    of 13. The finest map, which divides the input exactly, tells the input's size.
    """
    if not settings.strides_of_maps:
        return settings.strides[level]
    stride_y, stride_x = np.array(feature_sizes[0]) * settings.strides[0] // feature_sizes[level]
    return [stride_x, stride_y, stride_x, stride_y]


def decode_boxes(boxes, deltas, settings, image_size=None):
    """Return boxes [n, 4], moved and scaled by the deltas [n, 4] that a network predicted for them.

    With a box's centre (x_a, y_a) and size (w_a, h_a), and (t_x, t_y, t_w, t_h) = deltas * stds + means:
        x = x_a + w_a t_x        w = w_a exp(t_w)        and likewise y and h.
    t_w and t_h are clipped to +-log(1000 / 16), so that exp cannot overflow (with `shrinks_freely`, from above only).
    `image_size` (height, width) clips the result to the picture.
    Faster R-CNN, section 3.1.2, equation 2; R-CNN, appendix C.
    """
    deltas = deltas * np.float32(settings.stds) + np.float32(settings.means)
    smallest = -np.inf if settings.shrinks_freely else -MAX_LOG_SCALE
    centers = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5)
    sizes = boxes[:, 2:] - boxes[:, :2]
    centers = centers + sizes * deltas[:, :2]
    half_sizes = sizes * np.exp(np.clip(deltas[:, 2:], smallest, MAX_LOG_SCALE)) * np.float32(0.5)
    decoded = np.concatenate([centers - half_sizes, centers + half_sizes], axis=1)
    if image_size is not None:
        height, width = image_size
        decoded = np.clip(decoded, 0, np.float32([width, height, width, height]))
    return decoded


def pairwise_iou(boxes, others):
    """Return the intersection over union [n, m] of boxes [n, 4] and others [m, 4]; NaN where neither has an area."""
    x1, y1, x2, y2 = boxes.T[:, :, None]
    other_x1, other_y1, other_x2, other_y2 = others.T
    width = np.maximum(np.minimum(x2, other_x2) - np.maximum(x1, other_x1), 0)
    height = np.maximum(np.minimum(y2, other_y2) - np.maximum(y1, other_y1), 0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1) - intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        return intersection / union


def nms(boxes, scores, iou_threshold):
    """Return the indices of the boxes [n, 4] that non-maximum suppression keeps, best score first.

    A box is removed when its IoU with a better one that stays is above the threshold. This is decided block by block:
    within a block one box at a time, best first; then its survivors remove what they overlap among all that wait. Of
    two equal scores the first counts as better. Faster R-CNN, section 3.3; R-CNN, section 2.2.
    """
    waiting = np.argsort(-scores, kind="stable")
    kept = [waiting[:0]]
    while len(waiting):
        block, waiting = waiting[:NMS_BLOCK], waiting[NMS_BLOCK:]
        overlaps = pairwise_iou(boxes[block], boxes[block]) > iou_threshold
        stays = np.ones(len(block), bool)
        for i in np.flatnonzero(overlaps.sum(axis=1) > 1):  # those that overlap more than themselves
            if stays[i]:
                stays[i + 1 :] &= ~overlaps[i, i + 1 :]
        kept.append(block[stays])
        if len(waiting):
            waiting = waiting[~(pairwise_iou(boxes[kept[-1]], boxes[waiting]) > iou_threshold).any(axis=0)]
    return np.concatenate(kept)


def soft_nms(boxes, scores, iou_threshold, min_score):
    """Return the indices of the boxes [n, 4] that Soft-NMS keeps, best first, and their new scores.

    Where NMS removes a box, Soft-NMS multiplies its score by 1 - IoU and removes it only below `min_score`.
    Soft-NMS (1704.04503), section 3, equation 1.
    """
    waiting, kept, kept_scores = np.arange(len(boxes)), [], []
    while len(waiting):
        best = scores.argmax()
        kept.append(waiting[best])
        kept_scores.append(scores[best])
        overlaps = pairwise_iou(boxes[waiting[best], None], boxes[waiting])[0]
        scores = scores * np.where(overlaps >= iou_threshold, 1 - overlaps, np.float32(1))
        stays = scores >= min_score
        stays[best] = False
        waiting, scores = waiting[stays], scores[stays]
    return np.array(kept, np.int64), np.array(kept_scores, np.float32)


def moved_apart(boxes, groups, settings):
    """Return boxes [n, 4] as NMS sees them: each group [n] at a place of its own, unless there are too many boxes."""
    limit = settings.nms_moved_up_to
    if settings.nms_class_agnostic or (limit is not None and len(boxes) > limit):
        return boxes
    place = (groups[:, None] + settings.nms_first_group).astype(np.float32)
    return boxes + place * (boxes.max() + np.float32(1))


def batched_nms(boxes, scores, groups, settings):
    """Return what NMS keeps of boxes [n, 4] when a box can only remove others of its group [n]: a class, or a level.

    Returns indices and scores, best first; of Soft-NMS, if there is a `soft_min_score`. Frameworks move every group
    to a place of its own and run NMS once. We run it group by group, but move the boxes too, because that rounds
    their coordinates, and with them the IoUs. `nms_class_agnostic` lets the boxes of all groups meet, where they are.
    """
    class_agnostic, soft_min_score = settings.nms_class_agnostic, settings.soft_min_score
    if len(boxes) == 0:
        return np.zeros(0, np.int64), scores
    if soft_min_score is not None and len(boxes) < NMS_SPLIT:
        # A run of Soft-NMS keeps its best box even below the minimum, and this is a single run in mmcv.
        alive = np.flatnonzero((scores >= soft_min_score) | (np.arange(len(scores)) == scores.argmax()))
    else:
        alive = np.arange(len(boxes))
    moved = moved_apart(boxes, groups, settings)
    if class_agnostic and len(boxes) < NMS_SPLIT:  # from there on, mmcv separates the groups all the same
        groups = np.zeros_like(groups)
    by_group = alive[np.argsort(groups[alive], kind="stable")]
    scores, kept = scores.copy(), []
    for members in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
        if soft_min_score is None:
            stays = members[nms(moved[members], scores[members], settings.iou_threshold)]
        else:
            stays, new_scores = soft_nms(moved[members], scores[members], settings.iou_threshold, soft_min_score)
            stays = members[stays]
            scores[stays] = new_scores
        kept.append(stays)
    kept = np.sort(np.concatenate(kept))
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return kept, scores[kept]


def top_k(scores, k):
    """Return the indices of the k best scores of [n], best first; of two equal scores the first counts as better."""
    kth_best = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
    candidates = np.flatnonzero(scores >= kth_best)  # k, or more where several tie for the last place
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def softmax(x):
    """Return exp(x) / sum(exp(x)) over the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def objectness(logits, softmax_of_two=False):
    """Return the scores [h * w * a] of a level's anchors, in the order of grid_anchors, from its logits [a, h, w].

    With `softmax_of_two` the logits are [2 a, h, w], a pair for each anchor: object and background.
    """
    logits = logits.transpose(1, 2, 0)
    if softmax_of_two:
        return softmax(logits.reshape(-1, 2))[:, 0]
    return sigmoid(logits.ravel())


def propose(cls, reg, image_size, settings, record=ignore):
    """Turn the RPN's maps into proposals [r, 4], best first, r <= settings.max_per_img.

    cls: the logits of each level, [a, h, w] (or [2 a, h, w], see objectness); reg: its deltas [4 a, h, w].
    The best anchors of each level are decoded and clipped to image_size (height, width), boxes that are too small or
    score too low are dropped, and NMS decides level by level. Faster R-CNN, sections 3.1 and 3.3; FPN, section 4.1.
    """
    feature_sizes = [logits.shape[1:] for logits in cls]
    boxes, scores, levels = [], [], []
    for level, (logits, deltas) in enumerate(zip(cls, reg)):
        level_scores = objectness(logits, settings.softmax)
        ranked = logits.transpose(1, 2, 0).ravel() if settings.rank_logits else level_scores
        best = top_k(ranked, settings.nms_pre if settings.nms_pre > 0 else len(ranked))
        anchors = level_anchors(level, feature_sizes, settings.anchors, best)
        level_deltas = deltas.transpose(1, 2, 0).reshape(-1, 4)[best]
        boxes.append(decode_boxes(anchors, level_deltas, settings, image_size))
        scores.append(level_scores[best])
        levels.append(np.full(len(best), level))
    boxes, scores, levels = np.concatenate(boxes), np.concatenate(scores), np.concatenate(levels)
    good = large_enough(boxes, settings.min_bbox_size) & (scores > settings.score_threshold)
    boxes, scores, levels = boxes[good], scores[good], levels[good]
    kept, _ = batched_nms(boxes, scores, levels, settings)
    proposals = boxes[kept[: settings.max_per_img]]
    record("propose", candidates=boxes, scores=scores, levels=levels, kept=kept, proposals=proposals)
    return proposals


def large_enough(boxes, min_size):
    """Return which boxes [n, 4] have both sides above `min_size`; all, if that is below 0."""
    return (boxes[:, 2:] - boxes[:, :2] > min_size).all(axis=1) | (min_size < 0)


def assign_levels(rois, num_levels, finest_scale=56):
    """Return the level [r] of the pyramid from which each RoI [r, 4] takes its features.

        level = floor(log2(sqrt(w h) / finest_scale + 1e-6)), clipped to 0 .. num_levels - 1
    RoIs below twice the finest scale read the finest map; from there on, twice the size is one level up. FPN, section
    4.2, equation 1 (its k_0 = 4 at 224 pixels is our level 2); the 1e-6 is MMDetection's, for RoIs without area.
    """
    area = np.maximum(rois[:, 2] - rois[:, 0], 0) * np.maximum(rois[:, 3] - rois[:, 1], 0)
    level = np.floor(np.log2(np.sqrt(area) / np.float32(finest_scale) + np.float32(1e-6)))
    return np.clip(level, 0, num_levels - 1).astype(np.int64)


def to_cells(rois, stride, aligned):
    """Return where RoIs [r, 4] begin (x, y) and how large they are (width, height), in cells of a level: [r, 2] each.

    With `aligned`, a cell's value stands at its centre, half a cell from its corner. Without, it stands at the corner,
    and a RoI is at least one cell long. Nothing is rounded in either case.
    """
    cells = rois * np.float32(1 / stride) - np.float32(0.5 if aligned else 0)
    start, size = cells[:, :2], cells[:, 2:] - cells[:, :2]
    return start, size if aligned else np.maximum(size, 1)


def roi_align_by_definition(features, rois, stride, settings):
    """Return the features [r, C, s, s] of RoIs [r, 4] in one level's map [C, h, w], point by point.

    A RoI is cut into s x s bins of equal size; a bin is the mean of some points in it. This is RoIAlign as one would
    port it; the tests compare roi_align with it. Mask R-CNN, section 3, RoIAlign.
    """
    s, ratio = settings.output_size, settings.sampling_ratio
    pooled = np.zeros((len(rois), len(features), s, s))
    for r, ((x1, y1), (width, height)) in enumerate(zip(*to_cells(rois, stride, settings.aligned))):
        rows, columns = (ratio, ratio) if ratio > 0 else (int(np.ceil(height / s)), int(np.ceil(width / s)))
        for i, j, row, column in np.ndindex(s, s, rows, columns):
            y = y1 + (i + (row + 0.5) / rows) * height / s
            x = x1 + (j + (column + 0.5) / columns) * width / s
            pooled[r, :, i, j] += interpolate(features, y, x) / (rows * columns)
    return pooled


def interpolate(features, y, x):
    """Return the value [C] of a map [C, h, w] at a point between four cells: each counts by its nearness.

    Up to one cell outside the map, a point counts as one on its edge; farther out it is zero.
    """
    _, height, width = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(len(features))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = (1 - (x - left)) * features[:, top, left] + (x - left) * features[:, top, right]
    lower = (1 - (x - left)) * features[:, bottom, left] + (x - left) * features[:, bottom, right]
    return (1 - (y - top)) * upper + (y - top) * lower


# Every weight above is a factor of the row times a factor of the column, so a bin's sum over its points comes apart
# into a sum over rows and a sum over columns. For a whole RoI these sums are two matrix products: what follows builds
# the matrices for all RoIs at once, and multiplies.


def sample_points(start, length, settings):
    """Return the points [r, s, p] of each bin along one axis, and how many of the p are used, [r, 1, 1].

    An interval from `start` [r], `length` [r] cells long, is cut into s bins of equal size. A bin is cut into
    `sampling_ratio` equal parts (0: as many as it is cells long, rounded up), with a point in the middle of each.
    """
    s, ratio = settings.output_size, settings.sampling_ratio
    bin_size = length / np.float32(s)
    samples = np.full(len(start), ratio) if ratio > 0 else np.ceil(bin_size).astype(np.int64)
    start, bin_size, samples = start[:, None, None], bin_size[:, None, None], samples[:, None, None]
    nth_bin = np.arange(s, dtype=np.float32)[:, None]
    nth_point = np.arange(samples.max(initial=0), dtype=np.float32)
    count = np.maximum(samples, 1).astype(np.float32)
    return start + nth_bin * bin_size + (nth_point + np.float32(0.5)) * bin_size / count, samples


def interpolation_matrices(start, length, map_length, settings):
    """Return for each RoI the matrix [s, k] that makes bins of one axis of a map, and the cells that it reads.

    A bin is the mean of its points, see sample_points; a point takes from the two cells beside it, as in interpolate.
    Matrix i of the [r, s, k] acts on the cells first[i] .. stop[i] - 1; its columns beyond them are zero.
    """
    s = settings.output_size
    points, samples = sample_points(start, length, settings)
    used = (np.arange(points.shape[2]) < samples) & (points >= -1) & (points <= map_length)
    count = np.maximum(samples, 1).astype(np.float32)

    points = np.clip(points, 0, map_length - 1)
    low = points.astype(np.int64)
    high = np.minimum(low + 1, map_length - 1)
    fraction = points - low.astype(np.float32)  # of the way from the low cell to the high one
    first = np.min(low, axis=(1, 2), where=used, initial=map_length - 1)
    stop = np.maximum(np.max(high, axis=(1, 2), where=used, initial=0), first) + 1
    k = (stop - first).max(initial=0)

    # All matrices are filled at once, as one long row: bincount adds up the weights that fall on the same place.
    row = (np.arange(len(used) * s) * k).reshape(len(used), s, 1) - first[:, None, None]
    entries = np.stack([row + low, row + high])[:, used]  # the places of a point's two weights in the matrices
    weights = (np.stack([1 - fraction, fraction]) / count)[:, used]
    matrices = np.bincount(entries.ravel(), weights.ravel(), minlength=len(used) * s * k)
    return matrices.astype(np.float32).reshape(len(used), s, k), first, stop


def roi_align(features, rois, stride, settings, out=None):
    """Return the features [r, C, s, s] of RoIs [r, 4] in one level's map [C, h, w]; see roi_align_by_definition.

        W_y @ crop @ W_x^T        W_y [s, rows], W_x [s, columns], crop [rows, columns] for each channel
    The map is laid out with its channels last, so that the two products serve all channels at once. `out` may give
    the r arrays [C, s, s] to fill. Mask R-CNN, section 3, RoIAlign.
    """
    channels, height, width = features.shape
    start, size = to_cells(rois, stride, settings.aligned)
    weights_x, left, right = interpolation_matrices(start[:, 0], size[:, 0], width, settings)
    weights_y, top, bottom = interpolation_matrices(start[:, 1], size[:, 1], height, settings)
    features = np.ascontiguousarray(features.transpose(1, 2, 0))  # [h, w, C]

    if out is None:
        out = np.empty((len(rois), channels, settings.output_size, settings.output_size), np.float32)
    for i, bins in enumerate(out):
        # Column by column, then row by row: products so small that BLAS starts no threads for them. Its threads would
        # go on spinning for a while and slow down the network that runs next.
        crop = features[top[i] : bottom[i], left[i] : right[i]].transpose(1, 0, 2)  # [columns, rows, C]
        columns, rows, _ = crop.shape
        halfway = weights_y[i, :, :rows] @ crop  # [columns, s, C]
        halfway = weights_x[i, :, :columns] @ halfway.transpose(1, 0, 2)  # [s, s, C]
        bins[...] = halfway.transpose(2, 0, 1)
    return out


def align_levels(features, rois, levels, settings):
    """Return the features [r, C, s, s] of RoIs [r, 4], each taken from the map of its level [r]. FPN, section 4.2."""
    s = settings.output_size
    pooled = np.empty((len(rois), features[0].shape[0], s, s), np.float32)
    for level in np.unique(levels):
        here = np.flatnonzero(levels == level)
        roi_align(features[level], rois[here], settings.strides[level], settings, out=[pooled[i] for i in here])
    return pooled


def rescale(boxes, picture, settings):
    """Return boxes [n, 4] of the resized picture in pixels of the picture as it came in.

    They are divided by picture.scale_factor, or with `multiplied_back` multiplied by its inverse. In the last bit that
    differs, and a mask whose box ends at a whole pixel gets a column more or less by it.
    """
    if not settings.multiplied_back:
        return boxes / np.float32(picture.scale_factor)
    (height, width), (new_height, new_width) = picture.original_size, picture.image_size
    return boxes * (np.float32([width, height] * 2) / np.float32([new_width, new_height] * 2))


def detect(cls, reg, rois, picture, settings, record=ignore):
    """Turn the head's outputs into Detections, best first, no more than settings.max_per_img.

    cls [r, classes + 1]: the RoIs' logits, the background last; reg [r, 4 classes], or [r, 4] if class-agnostic: the
    deltas of the RoIs [r, 4]. Every class of every RoI whose softmax score is above the threshold is decoded, clipped
    to picture.image_size (height, width) and rescaled to pixels of the picture as it came in. NMS decides class by
    class. Fast R-CNN (1504.08083), sections 2.1 and 3.
    """
    class_scores = softmax(cls)[:, :-1]
    roi, label = np.nonzero(class_scores > settings.score_threshold)
    scores = class_scores[roi, label]
    deltas = reg.reshape(len(reg), reg.shape[1] // 4, 4)[roi, 0 if settings.class_agnostic else label]
    resized = decode_boxes(rois[roi], deltas, settings, picture.image_size)
    large = large_enough(resized, settings.min_bbox_size)
    resized, scores, label, roi = resized[large], scores[large], label[large], roi[large]
    boxes = rescale(resized, picture, settings)
    kept, new_scores = batched_nms(resized if settings.nms_resized else boxes, scores, label, settings)
    record("detect", candidates=boxes, resized=resized, scores=scores, labels=label, rois=roi, kept=kept)
    kept, new_scores = kept[: settings.max_per_img], new_scores[: settings.max_per_img]
    return Detections(boxes[kept], new_scores, label[kept])
