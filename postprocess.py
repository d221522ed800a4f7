"""Faster R-CNN between and after its two networks, in NumPy alone.

    score and delta maps -> propose -> assign_levels -> roi_align -> (second network) -> detect

Boxes are float32 [n, 4]: x1, y1, x2, y2 in pixels of the resized picture, the right and bottom edge
outside (width = x2 - x1). A level is one map of the feature pyramid, the finest first; its stride is the
distance in pixels between two of its cells. Every function computes what MMDetection 2.28 computes, in the
same float32 order where the order decides which box survives.

The papers: Faster R-CNN (arXiv 1506.01497), FPN (1612.03144), Mask R-CNN (1703.06870), R-CNN (1311.2524).
"""

import numpy as np

MAX_LOG_SCALE = np.float32(abs(np.log(16 / 1000)))  # a box grows or shrinks at most by this, see decode_boxes
NMS_BLOCK = 64  # boxes decided at a time: bounds the memory of the IoU matrix, not the result


def ignore(stage, **arrays):
    """Record nothing: what `record` does unless somebody wants to see the arrays of a stage."""


def base_anchors(base_size, scales, ratios, center_offset=0.0):
    """Return the anchors [len(ratios) * len(scales), 4] of the cell in the corner of a level.

    Each has the area (base_size * scale)^2 and the ratio height / width; ratios vary slowest.
    Faster R-CNN, section 3.1.1.
    """
    scales, height_factor = np.float32(scales), np.sqrt(np.float32(ratios))
    size = np.float32(base_size)
    widths = (size * (1 / height_factor)[:, None] * scales).ravel()
    heights = (size * height_factor[:, None] * scales).ravel()
    center = np.float32(center_offset * base_size)
    return np.stack([center - widths / 2, center - heights / 2, center + widths / 2, center + heights / 2], axis=1)


def grid_anchors(base, feature_size, stride, indices=None):
    """Return the anchors of a level: its base anchors [a, 4] moved to every cell of the (height, width) map.

    Their order is row, column, base anchor: [height * width * a, 4]. With `indices` [k], only those: [k, 4].
    Faster R-CNN, section 3.1.1.
    """
    height, width = feature_size
    if indices is None:
        indices = np.arange(height * width * len(base))
    cell, which = np.divmod(indices, len(base))
    y, x = np.divmod(cell, width)
    return base[which] + np.stack([x, y, x, y], axis=1).astype(np.float32) * np.float32(stride)


def decode_boxes(boxes, deltas, means, stds, image_size=None):
    """Move and scale boxes [n, 4] by the deltas [n, 4] that a network predicted for them: [n, 4].

    With a box's centre (x_a, y_a) and size (w_a, h_a), and (t_x, t_y, t_w, t_h) = deltas * stds + means:
        x = x_a + w_a t_x        w = w_a exp(t_w)        and so y and h.
    t_w and t_h are kept within +-log(1000 / 16), so that exp cannot overflow. `image_size` (height, width)
    clips the result to the picture. Faster R-CNN, section 3.1.2, equation 2; R-CNN, appendix C.
    """
    deltas = deltas * np.float32(stds) + np.float32(means)
    centers = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5)
    sizes = boxes[:, 2:] - boxes[:, :2]
    centers = centers + sizes * deltas[:, :2]
    half_sizes = sizes * np.exp(np.clip(deltas[:, 2:], -MAX_LOG_SCALE, MAX_LOG_SCALE)) * np.float32(0.5)
    decoded = np.concatenate([centers - half_sizes, centers + half_sizes], axis=1)
    if image_size is not None:
        height, width = image_size
        decoded = np.clip(decoded, 0, np.float32([width, height, width, height]))
    return decoded


def pairwise_iou(boxes, others):
    """Return the intersection over union [n, m] of boxes [n, 4] with others [m, 4]; NaN for two empty ones."""
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

    A box goes when a better one that stays has an IoU with it above the threshold. Decided block by block:
    within a block one by one, best first; then the block's survivors clear the rest at once. Of equal
    scores the first counts as the better. Faster R-CNN, section 3.3; R-CNN, section 2.2.
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

    Where NMS removes a box, Soft-NMS multiplies its score by 1 - IoU; below min_score, where no score is to
    begin with, it goes all the same.
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


def batched_nms(boxes, scores, groups, iou_threshold, soft_min_score=None):
    """Return what NMS keeps of boxes [n, 4] when only those of one group [n] (a class, a level) can meet.

    Indices and scores, best first; with `soft_min_score`, of Soft-NMS. MMDetection moves every group to a place
    of its own and runs NMS once. We run it group by group, but move the boxes all the same: that rounds their
    coordinates, and with them the IoUs.
    """
    if len(boxes) == 0:
        return np.zeros(0, np.int64), scores
    moved = boxes + groups[:, None].astype(np.float32) * (boxes.max() + np.float32(1))
    by_group = np.argsort(groups, kind="stable")
    scores, kept = scores.copy(), []
    for members in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
        if soft_min_score is None:
            stays = members[nms(moved[members], scores[members], iou_threshold)]
        else:
            stays, new_scores = soft_nms(moved[members], scores[members], iou_threshold, soft_min_score)
            stays = members[stays]
            scores[stays] = new_scores
        kept.append(stays)
    kept = np.sort(np.concatenate(kept))
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    return kept, scores[kept]


def top_k(scores, k):
    """Return the indices of the k best of the scores [n], best first; of equal ones the first counts as better."""
    kth_best = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
    candidates = np.flatnonzero(scores >= kth_best)  # k, and more if the last one is tied
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def softmax(x):
    """Return exp(x) / sum(exp(x)) over the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def objectness(logits, num_anchors):
    """Return the scores [h * w * a] of a level's anchors, in the order of grid_anchors.

    logits: [a, h, w] for a sigmoid, or [2 a, h, w] for a softmax of object against background.
    """
    logits = logits.transpose(1, 2, 0)
    if logits.shape[2] == num_anchors:
        return sigmoid(logits.ravel())
    return softmax(logits.reshape(-1, 2))[:, 0]


def propose(
    cls, reg, base, strides, image_size, means, stds, nms_pre, iou_threshold, max_per_img, min_bbox_size, record=ignore
):
    """Turn the RPN's maps into proposals: boxes [r, 4] and their scores [r], best first, r <= max_per_img.

    cls: a level's logits [a, h, w] each (or [2 a, h, w], see objectness); reg: its deltas [4 a, h, w]; base: its
    base anchors [a, 4].
    Of each level the `nms_pre` best anchors are decoded (-1: all); a box stays if both its sides are longer than
    `min_bbox_size` pixels (-1: all stay); then NMS, level by level. Faster R-CNN, sections 3.1 and 3.3; FPN, 4.1.
    """
    boxes, scores, levels = [], [], []
    for level, (logits, deltas) in enumerate(zip(cls, reg)):
        level_scores = objectness(logits, len(base[level]))
        best = top_k(level_scores, nms_pre if nms_pre > 0 else len(level_scores))
        anchors = grid_anchors(base[level], logits.shape[1:], strides[level], best)
        level_deltas = deltas.transpose(1, 2, 0).reshape(-1, 4)[best]
        boxes.append(decode_boxes(anchors, level_deltas, means, stds, image_size))
        scores.append(level_scores[best])
        levels.append(np.full(len(best), level))
    boxes, scores, levels = np.concatenate(boxes), np.concatenate(scores), np.concatenate(levels)
    if min_bbox_size >= 0:
        large = (boxes[:, 2:] - boxes[:, :2] > min_bbox_size).all(axis=1)
        boxes, scores, levels = boxes[large], scores[large], levels[large]
    kept, kept_scores = batched_nms(boxes, scores, levels, iou_threshold)
    kept, kept_scores = kept[:max_per_img], kept_scores[:max_per_img]
    proposals = boxes[kept]
    record("propose", candidates=boxes, scores=scores, levels=levels, kept=kept, proposals=proposals)
    return proposals, kept_scores


def assign_levels(rois, num_levels, finest_scale=56):
    """Return the level [r] of the pyramid that each RoI [r, 4] takes its features from.

        level = floor(log2(sqrt(w h) / finest_scale + 1e-6)), within 0 .. num_levels - 1
    A RoI up to twice the finest scale reads the finest map; twice its size, one level up. FPN, section 4.2,
    equation 1 (whose k_0 = 4 at 224 pixels is level 2 here); the 1e-6 is MMDetection's, for RoIs without area.
    """
    area = np.maximum(rois[:, 2] - rois[:, 0], 0) * np.maximum(rois[:, 3] - rois[:, 1], 0)
    level = np.floor(np.log2(np.sqrt(area) / np.float32(finest_scale) + np.float32(1e-6)))
    return np.clip(level, 0, num_levels - 1).astype(np.int64)


def to_cells(rois, stride, aligned):
    """Return where RoIs [r, 4] begin (x, y) and their size (width, height) in cells of a level, [r, 2] each.

    `aligned` puts the value of a cell at its centre, half a cell from its corner.
    """
    cells = rois * np.float32(1 / stride) - np.float32(0.5 if aligned else 0)
    start, size = cells[:, :2], cells[:, 2:] - cells[:, :2]
    return start, size if aligned else np.maximum(size, 1)


def sample_points(start, length, output_size, sampling_ratio):
    """Return the points [r, output_size, p] of each bin of an interval, and how many of the p are its own [r, 1, 1].

    An interval from `start` [r], `length` [r] cells long, is cut into bins of one size, and each bin has
    `sampling_ratio` points (0: one a cell, rounded up), in the middles of as many equal parts.
    """
    bin_size = length / np.float32(output_size)
    samples = np.full(len(start), sampling_ratio) if sampling_ratio > 0 else np.ceil(bin_size).astype(np.int64)
    start, bin_size, samples = start[:, None, None], bin_size[:, None, None], samples[:, None, None]
    nth_bin = np.arange(output_size, dtype=np.float32)[:, None]
    nth_point = np.arange(samples.max(initial=0), dtype=np.float32)
    count = np.maximum(samples, 1).astype(np.float32)
    return start + nth_bin * bin_size + (nth_point + np.float32(0.5)) * bin_size / count, samples


def interpolation_matrices(start, length, map_length, output_size, sampling_ratio):
    """Return the matrices [r, output_size, k] that take bins from one axis of a map, and their cells' range.

    A bin is the mean of its points, see sample_points; a point lies between two cells and takes from each by its
    nearness (linear interpolation); more than a cell outside the map it is zero. Matrix i acts on the cells
    first[i] .. stop[i] - 1, its columns beyond them are zero. Mask R-CNN, section 3, RoIAlign.
    """
    points, samples = sample_points(start, length, output_size, sampling_ratio)
    used = (np.arange(points.shape[2]) < samples) & (points >= -1) & (points <= map_length)
    count = np.maximum(samples, 1).astype(np.float32)

    points = np.clip(points, 0, map_length - 1)
    low = points.astype(np.int64)
    high = np.minimum(low + 1, map_length - 1)
    fraction = points - low.astype(np.float32)  # of the way from the low cell to the high one
    first = np.min(low, axis=(1, 2), where=used, initial=map_length - 1)
    stop = np.maximum(np.max(high, axis=(1, 2), where=used, initial=0), first) + 1
    k = (stop - first).max(initial=0)

    row = (np.arange(len(used) * output_size) * k).reshape(len(used), output_size, 1) - first[:, None, None]
    entries = np.stack([row + low, row + high])[:, used]  # where in the matrices the two weights of a point go
    weights = (np.stack([1 - fraction, fraction]) / count)[:, used]
    matrices = np.bincount(entries.ravel(), weights.ravel(), minlength=len(used) * output_size * k)
    return matrices.astype(np.float32).reshape(len(used), output_size, k), first, stop


def roi_align(features, rois, stride, output_size=7, sampling_ratio=0, aligned=True, out=None):
    """Return the features [r, C, s, s] of RoIs [r, 4] in one level's map [C, h, w], s = output_size.

    A bin of RoIAlign is a sum over rows and columns whose weights are products, so for a whole RoI it is
        W_y @ crop @ W_x^T,        W_y [s, rows], W_x [s, columns], crop [rows, columns] for each channel:
    two matrix products over all channels at once when the map is laid out with the channels last. `out`, if given,
    is r arrays [C, s, s] that are filled. Mask R-CNN, section 3, RoIAlign.
    """
    channels, height, width = features.shape
    start, size = to_cells(rois, stride, aligned)
    weights_x, left, right = interpolation_matrices(start[:, 0], size[:, 0], width, output_size, sampling_ratio)
    weights_y, top, bottom = interpolation_matrices(start[:, 1], size[:, 1], height, output_size, sampling_ratio)
    features = np.ascontiguousarray(features.transpose(1, 2, 0))  # [h, w, C]

    if out is None:
        out = np.empty((len(rois), channels, output_size, output_size), np.float32)
    for i, bins in enumerate(out):
        # Column by column, then row by row: products so small that BLAS starts no thread for them, which would go
        # on spinning and slow down the network that comes next.
        crop = features[top[i] : bottom[i], left[i] : right[i]].transpose(1, 0, 2)  # [columns, rows, C]
        columns, rows, _ = crop.shape
        halfway = weights_y[i, :, :rows] @ crop  # [columns, s, C]
        halfway = weights_x[i, :, :columns] @ halfway.transpose(1, 0, 2)  # [s, s, C]
        bins[...] = halfway.transpose(2, 0, 1)
    return out


def align_levels(features, rois, levels, strides, output_size, sampling_ratio, aligned):
    """Return the features [r, C, s, s] of RoIs [r, 4], each from the map of its level [r]. FPN, section 4.2."""
    aligned_features = np.empty((len(rois), features[0].shape[0], output_size, output_size), np.float32)
    for level in np.unique(levels):
        here = np.flatnonzero(levels == level)
        out = [aligned_features[i] for i in here]
        roi_align(features[level], rois[here], strides[level], output_size, sampling_ratio, aligned, out)
    return aligned_features


def detect(
    cls,
    reg,
    rois,
    image_size,
    scale_factor,
    means,
    stds,
    class_agnostic,
    score_threshold,
    iou_threshold,
    max_per_img,
    nms_class_agnostic=False,
    soft_min_score=None,
    record=ignore,
):
    """Turn the head's outputs into detections: boxes [d, 4], scores [d], labels [d], best first, d <= max_per_img.

    cls [r, classes + 1]: logits, the background last; reg [r, 4 classes], or [r, 4] if class_agnostic: the deltas
    of the RoIs [r, 4]. Every class of an RoI whose softmax score is above the threshold is decoded, clipped to
    image_size (height, width) and divided by scale_factor [4], which makes it pixels of the picture as it came
    in; then NMS, class by class unless nms_class_agnostic; with soft_min_score, Soft-NMS. Fast R-CNN (1504.08083),
    sections 2.1 and 3.
    """
    class_scores = softmax(cls)[:, :-1]
    roi, label = np.nonzero(class_scores > score_threshold)
    scores = class_scores[roi, label]
    deltas = reg.reshape(len(reg), reg.shape[1] // 4, 4)[roi, 0 if class_agnostic else label]
    boxes = decode_boxes(rois[roi], deltas, means, stds, image_size) / np.float32(scale_factor)
    groups = np.zeros_like(label) if nms_class_agnostic else label
    kept, kept_scores = batched_nms(boxes, scores, groups, iou_threshold, soft_min_score)
    kept, kept_scores = kept[:max_per_img], kept_scores[:max_per_img]
    record("detect", candidates=boxes, scores=scores, labels=label, rois=roi, kept=kept)
    return boxes[kept], kept_scores, label[kept]
