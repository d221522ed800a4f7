"""postprocess.py, function by function, against definitions in scalar loops, by hand, and ONNX Runtime's operators."""

import math
import tracemalloc

import numpy as np
import onnx
import onnxruntime
import pytest
from boxes import ANCHORS, EDGE_CASES, HEAD, PROPOSALS, ROIS, SEEDS, distinct_scores, random_boxes, rpn_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from detectors.preprocess import Picture
from postprocess import (
    NMS_SPLIT,
    align_levels,
    assign_levels,
    base_anchors,
    batched_nms,
    decode_boxes,
    detect,
    grid_anchors,
    nms,
    objectness,
    pairwise_iou,
    propose,
    roi_align,
    roi_align_by_definition,
    sigmoid,
    soft_nms,
    softmax,
    top_k,
)

# Of the definition: it rounds the places of its points in another order, by 8e-6 of a cell 80 cells from the corner.
ROUNDING = 5e-5


def run_operator(op_type, opset, inputs, **attributes):
    """Return the output of one ONNX operator, computed by ONNX Runtime."""
    types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int64): onnx.TensorProto.INT64}
    names = [f"input_{i}" for i in range(len(inputs))]
    node = onnx.helper.make_node(op_type, names, ["output"], **attributes)
    values = [onnx.helper.make_tensor_value_info(n, types[x.dtype], x.shape) for n, x in zip(names, inputs)]
    kind = onnx.TensorProto.INT64 if op_type == "NonMaxSuppression" else onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph([node], "one", values, [onnx.helper.make_tensor_value_info("output", kind, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs)))[0]


# ------------------------------------------------------------------ anchors


def test_default_anchors_by_hand():
    anchors = grid_anchors(base_anchors(4, [8], [0.5, 1.0, 2.0]), (2, 2), 4)
    assert anchors.shape == (12, 4)
    np.testing.assert_allclose(anchors[1], [-16, -16, 16, 16])  # ratio 1: a square of 32 around the corner
    np.testing.assert_allclose(anchors[4], [-12, -16, 20, 16])  # the next cell of the row
    np.testing.assert_allclose(anchors[7], [-16, -12, 16, 20])  # the first cell of the next row
    widths, heights = (anchors[:3, 2:] - anchors[:3, :2]).T
    np.testing.assert_allclose(heights / widths, [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(widths * heights, 32**2, rtol=1e-6)


def test_base_anchors_vary_their_scale_fastest_around_one_centre():
    anchors = base_anchors(16, [1, 3], [0.25, 4], center_offset=0.5)
    np.testing.assert_allclose((anchors[:, :2] + anchors[:, 2:]) / 2, 8)
    np.testing.assert_allclose(anchors[:, 2:] - anchors[:, :2], [[32, 8], [96, 24], [8, 32], [24, 96]])


def test_some_anchors_of_a_grid_are_those_of_the_whole():
    base = base_anchors(8, [2, 4], [0.5, 1, 2])
    anchors = grid_anchors(base, (5, 9), 8)
    by_loops = [base[k] + 8 * np.float32([x, y, x, y]) for y, x, k in np.ndindex(5, 9, 6)]
    np.testing.assert_array_equal(anchors, by_loops)
    some = np.random.default_rng(0).permutation(len(anchors))[:7]
    np.testing.assert_array_equal(grid_anchors(base, (5, 9), 8, some), anchors[some])


# ------------------------------------------------------------------ decoding


def decode_by_scalars(box, deltas, means, stds, image_size=None):
    """Return the corners of a box that moved by its deltas, side by side."""
    x1, y1, x2, y2 = map(float, box)
    dx, dy, dw, dh = (float(delta) * std + mean for delta, std, mean in zip(deltas, stds, means))
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    limit = math.log(1000 / 16)
    width = (x2 - x1) * math.exp(min(max(dw, -limit), limit))
    height = (y2 - y1) * math.exp(min(max(dh, -limit), limit))
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if image_size is not None:
        corners = [min(max(side, 0), image_size[(i + 1) % 2]) for i, side in enumerate(corners)]
    return corners


@pytest.mark.parametrize("image_size", [None, (480, 640), (480.5, 640.5)])
@pytest.mark.parametrize("spread", [0.1, 1, 5, 1e4])
def test_decode_equals_scalar_loops(spread, image_size):
    rng = np.random.default_rng(0)
    boxes, deltas = random_boxes(rng, 100), rng.normal(0, spread, (100, 4)).astype(np.float32)
    means, stds = rng.normal(0, 0.1, 4).tolist(), rng.uniform(0.05, 1, 4).tolist()
    found = decode_boxes(boxes, deltas, replace(HEAD, means=means, stds=stds), image_size)
    expected = [decode_by_scalars(*pair, means, stds, image_size) for pair in zip(boxes, deltas)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-3)


def test_decode_by_the_formula():
    box, deltas = np.float32([[10, 20, 50, 100]]), np.float32([[0.5, -0.25, math.log(2), math.log(0.5)]])
    x, y = 30 + 40 * 0.5, 60 + 80 * -0.25
    np.testing.assert_allclose(decode_boxes(box, deltas, PROPOSALS), [[x - 40, y - 20, x + 40, y + 20]], rtol=1e-6)
    widest = decode_boxes(box, np.float32([[0, 0, 99, -99]]), PROPOSALS)[0]
    assert widest[2] - widest[0] == pytest.approx(40 * 1000 / 16)
    assert widest[3] - widest[1] == pytest.approx(80 * 16 / 1000, rel=1e-4)


# ------------------------------------------------------------------ scores


def test_sigmoid_and_softmax_by_the_formula():
    x = np.float32([-90, -17.5, -1, -0.0, 1e-4, 3, 17.5, 88])
    np.testing.assert_allclose(sigmoid(x), [1 / (1 + math.exp(-v)) for v in x.tolist()], rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(sigmoid(np.float32([-1e4, 1e4])), [0, 1])
    rows = np.stack([x, x[::-1], np.zeros_like(x), x / 100])
    exponentials = [[math.exp(v) for v in row] for row in rows.tolist()]
    expected = [[e / sum(row) for e in row] for row in exponentials]
    np.testing.assert_allclose(softmax(rows), expected, rtol=1e-5, atol=1e-37)
    np.testing.assert_array_equal(softmax(np.float32([[1e4, 0, -1e4]])), [[1, 0, 0]])


def test_the_object_comes_before_the_background():
    logits = np.float32([2, 0, -1, 1]).reshape(4, 1, 1)  # two anchors in one cell
    np.testing.assert_allclose(objectness(logits, True), sigmoid(np.float32([2, -2])), rtol=1e-6)
    np.testing.assert_allclose(objectness(logits), sigmoid(np.float32([2, 0, -1, 1])), rtol=1e-6)


@given(SEEDS, st.integers(0, 500), st.integers(1, 300), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_top_k_is_a_stable_sort_cut_off(seed, count, k, levels):
    scores = np.random.default_rng(seed).integers(0, levels, count).astype(np.float32)
    expected = sorted(range(count), key=lambda i: (-scores[i], i))[:k]
    assert top_k(scores, k).tolist() == expected


# ------------------------------------------------------------------ NMS


def iou_by_scalars(box, other):
    """Return the intersection over union of two boxes, 0 where neither has an area."""
    sides = [min(box[a + 2], other[a + 2]) - max(box[a], other[a]) for a in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - shared
    return np.float32(shared) / np.float32(union) if union > 0 else np.float32(0)


def nms_by_scalars(boxes, scores, iou_threshold):
    """Return what NMS keeps, box by box and pair by pair."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if not any(iou_by_scalars(boxes[i], boxes[j]) > np.float32(iou_threshold) for j in kept):
            kept.append(i)
    return kept


def soft_nms_by_scalars(boxes, scores, iou_threshold, min_score):
    """Return what Soft-NMS keeps, and all scores as it leaves them, box by box and pair by pair."""
    waiting, scores, kept = list(range(len(boxes))), list(scores), []
    while waiting:
        best = max(waiting, key=lambda i: scores[i])
        waiting.remove(best)
        kept.append(best)
        for i in waiting:
            overlap = iou_by_scalars(boxes[best], boxes[i])
            if overlap >= iou_threshold:
                scores[i] *= 1 - overlap
        waiting = [i for i in waiting if scores[i] >= min_score]
    return kept, scores


@given(SEEDS, st.sampled_from([0, 1, 2, 40]), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
@settings(max_examples=60, deadline=None)
def test_nms_equals_scalar_loops(seed, count, iou_threshold):
    rng = np.random.default_rng(seed)
    boxes, scores = rng.integers(0, 12, (count, 4)), rng.integers(0, 9, count) / 8  # whole pixels: exact IoUs, ties
    boxes[:, 2:] += boxes[:, :2]
    found = nms(boxes.astype(np.float32), scores.astype(np.float32), iou_threshold)
    assert found.tolist() == nms_by_scalars(boxes.tolist(), scores.tolist(), iou_threshold)


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_nms_equals_the_onnx_operator(iou_threshold):
    rng = np.random.default_rng(1)
    boxes, scores = random_boxes(rng, 800, clusters=40), distinct_scores(rng, 800)
    threshold, limit = np.float32([iou_threshold]), np.int64([800])
    expected = run_operator("NonMaxSuppression", 11, [boxes[None], scores[None, None], limit, threshold])[:, 2]
    found = nms(boxes, scores, iou_threshold)
    assert 40 < len(found) < 700
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("iou_threshold", "min_score"), [(0.3, 0.001), (0.5, 0.2), (0.0, 0.05)])
def test_soft_nms_equals_scalar_loops(iou_threshold, min_score):
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 60, clusters=5), distinct_scores(rng, 60)
    found, new_scores = soft_nms(boxes, scores, iou_threshold, min_score)
    kept, lowered = soft_nms_by_scalars(boxes.tolist(), scores.tolist(), iou_threshold, min_score)
    assert 5 < len(kept) < 60
    np.testing.assert_array_equal(found, kept)
    np.testing.assert_allclose(new_scores, [lowered[i] for i in kept], rtol=1e-5)


def test_nms_of_many_boxes_takes_little_memory():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 10000, clusters=500), distinct_scores(rng, 10000)
    tracemalloc.start()
    nms(boxes, scores, 0.7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # all pairs at once would be 400e6 for each of the terms of an IoU


def test_soft_nms_lowers_from_the_threshold_on():
    """An IoU of exactly the threshold counts, as in mmcv; NMS removes only above it."""
    boxes, scores = np.float32([[0, 0, 2, 1], [0, 0, 1, 1]]), np.float32([0.9, 0.8])
    assert pairwise_iou(boxes, boxes)[0, 1] == 0.5
    np.testing.assert_array_equal(soft_nms(boxes, scores, 0.5, 0.001)[1], np.float32([0.9, 0.4]))
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]


def test_equal_scores_of_several_groups_keep_their_order():
    boxes = np.float32([[i * 20, 0, i * 20 + 10, 10] for i in range(50)])
    scores, groups = np.full(50, 0.5, np.float32), np.arange(50)[::-1] % 7
    assert batched_nms(boxes, scores, groups, HEAD)[0].tolist() == list(range(50))


def test_nms_of_nothing():
    nothing = np.zeros((0, 4), np.float32)
    assert nms(nothing, nothing[:, 0], 0.5).tolist() == []
    assert soft_nms(nothing, nothing[:, 0], 0.5, 0.001)[0].tolist() == []
    assert batched_nms(nothing, nothing[:, 0], np.zeros(0, np.int64), HEAD)[0].tolist() == []


def test_soft_nms_of_groups_drops_all_below_the_minimum_but_the_best():
    boxes = np.float32([[100 * i, 0, 100 * i + 50, 50] for i in range(4)])
    groups, settings = np.int64([0, 0, 1, 2]), replace(HEAD, soft_min_score=0.1)
    for scores, expected in (([0.5, 0.05, 0.09, 0.2], [0, 3]), ([0.01, 0.02, 0.03, 0.005], [2])):
        assert batched_nms(boxes, np.float32(scores), groups, settings)[0].tolist() == expected


def test_soft_nms_of_very_many_boxes_keeps_the_best_of_each_group():
    """From the split on mmcv runs once for each group, and every run keeps its best box."""
    scores = np.linspace(0.01, 0.02, NMS_SPLIT, dtype=np.float32)
    boxes, groups = np.tile(np.float32([0, 0, 9, 9]), (NMS_SPLIT, 1)), np.arange(NMS_SPLIT) % 3
    settings = replace(HEAD, soft_min_score=0.1)
    assert batched_nms(boxes, scores, groups, settings)[0].tolist() == [NMS_SPLIT - 1, NMS_SPLIT - 2, NMS_SPLIT - 3]
    assert batched_nms(boxes[1:], scores[1:], groups[1:], settings)[0].tolist() == [NMS_SPLIT - 2]


# ------------------------------------------------------------------ levels


def test_levels_by_hand():
    sides = np.float32([1, 55, 111, 113, 223, 225, 447, 449, 5000])
    rois = sides[:, None] * np.float32([0, 0, 1, 1])
    assert assign_levels(rois, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(rois, 2, finest_scale=112).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert assign_levels(rois[:0], 4).tolist() == []


# ------------------------------------------------------------------ RoIAlign


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_roi_align_equals_its_definition(size, sampling_ratio, aligned):
    features = np.random.default_rng(0).standard_normal((3, 8, 12), dtype=np.float32)
    options = replace(ROIS, output_size=size, sampling_ratio=sampling_ratio, aligned=aligned)
    found = roi_align(features, EDGE_CASES, 8, options)
    assert found.shape == (len(EDGE_CASES), 3, size, size)
    assert found.dtype == np.float32
    expected = roi_align_by_definition(features.astype(float), EDGE_CASES, 8, options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("aligned", "mode"), [(True, "half_pixel"), (False, "output_half_pixel")])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_and_its_definition_equal_the_onnx_operator(sampling_ratio, aligned, mode):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((16, 60, 80), dtype=np.float32)
    rois = random_boxes(rng, 200)
    rois = rois[(rois[:, 2:] - rois[:, :2]).min(axis=1) > 0]
    expected = run_operator(
        "RoiAlign",
        16,
        [features[None], rois, np.zeros(len(rois), np.int64)],
        mode="avg",
        output_height=7,
        output_width=7,
        spatial_scale=1 / 8,
        sampling_ratio=sampling_ratio,
        coordinate_transformation_mode=mode,
    )
    assert np.abs(expected).max(axis=(1, 2, 3)).min() > 0.1
    options = replace(ROIS, sampling_ratio=sampling_ratio, aligned=aligned)
    np.testing.assert_allclose(roi_align(features, rois, 8, options), expected, atol=1e-5)
    found = roi_align_by_definition(features, rois[:20], 8, options)
    np.testing.assert_allclose(found, expected[:20], atol=ROUNDING)


def test_align_levels_reads_each_roi_from_its_level():
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((8, 120 // 2**k, 160 // 2**k), dtype=np.float32) for k in range(4)]
    rois, levels = random_boxes(rng, 50), rng.integers(0, 4, 50)
    found = align_levels(features, rois, levels, ROIS)
    for i, level in enumerate(levels):
        expected = roi_align_by_definition(features[level], rois[i, None], ROIS.strides[level], ROIS)
        np.testing.assert_allclose(found[i, None], expected, atol=ROUNDING)
    assert align_levels(features, rois[:0], levels[:0], ROIS).shape == (0, 8, 7, 7)


# ------------------------------------------------------------------ the RPN's end


def candidates_by_scalars(logits, deltas, level, image_size, config):
    """Return the (score, box) of every anchor of a level, in the order of the scores."""
    anchors, candidates = config.anchors, []
    base, stride = anchors.base_sizes[level], anchors.strides[level]
    shapes = [(ratio, scale) for ratio in anchors.ratios for scale in anchors.scales]
    for row, column, k in np.ndindex(*logits.shape[1:], len(shapes)):
        ratio, scale = shapes[k]
        width, height = base * scale / math.sqrt(ratio), base * scale * math.sqrt(ratio)
        x, y = column * stride + anchors.center_offset * base, row * stride + anchors.center_offset * base
        anchor = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        moves = deltas[4 * k : 4 * k + 4, row, column]
        if config.softmax:
            logit = float(logits[2 * k, row, column]) - float(logits[2 * k + 1, row, column])
        else:
            logit = float(logits[k, row, column])
        box = decode_by_scalars(anchor, moves, config.means, config.stds, image_size)
        candidates.append((1 / (1 + math.exp(-logit)), box))
    return sorted(candidates, key=lambda candidate: -candidate[0])


def propose_by_scalars(cls, reg, image_size, config):
    """Return the (score, box) of every proposal, anchor by anchor."""
    proposals = []
    for level, (logits, deltas) in enumerate(zip(cls, reg)):
        found = candidates_by_scalars(logits, deltas, level, image_size, config)
        found = found[: config.nms_pre] if config.nms_pre > 0 else found
        smallest = config.min_bbox_size
        found = [(s, b) for s, b in found if smallest < 0 or min(b[2] - b[0], b[3] - b[1]) > smallest]
        scores, boxes = [score for score, _ in found], [box for _, box in found]
        proposals += [found[i] for i in nms_by_scalars(boxes, scores, config.iou_threshold)]
    return sorted(proposals, key=lambda proposal: -proposal[0])[: config.max_per_img]


@pytest.mark.parametrize(
    "options",
    [
        {"nms_pre": 50, "min_bbox_size": 0, "max_per_img": 1000},
        {"nms_pre": 40, "min_bbox_size": 25, "max_per_img": 20},
        {"nms_pre": -1, "min_bbox_size": -1, "max_per_img": 100},
        {"nms_pre": 30, "softmax": True, "max_per_img": 1000},
    ],
)
def test_proposals_equal_scalar_loops(options):
    anchors = replace(ANCHORS, strides=(16, 32), base_sizes=(16, 35), center_offset=0.5)
    config = replace(PROPOSALS, anchors=anchors, means=(0.05, -0.05, 0.1, 0), stds=(0.9, 1, 1, 0.8), **options)
    rng, stages = np.random.default_rng(0), {}
    cls, reg = rpn_maps(rng, (110, 150), (16, 32))
    if config.softmax:
        cls = [rng.normal(0, 3, (6, *logits.shape[1:])).astype(np.float32) for logits in cls]
    boxes = propose(cls, reg, (110, 150), config, lambda stage, **arrays: stages.update({stage: arrays}))
    scores = stages["propose"]["scores"][stages["propose"]["kept"]][: len(boxes)]
    expected = propose_by_scalars(cls, reg, (110, 150), config)
    assert min(20, config.max_per_img) <= len(expected) <= config.max_per_img
    np.testing.assert_allclose(boxes, [box for _, box in expected], atol=1e-3)
    np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-5)


# ------------------------------------------------------------------ the head's end


def test_detections_by_hand():
    """Two RoIs, two classes and the background: shares of 1/4, 3/16 and 9/16 for the first, 1, 0, 0 for the second."""
    cls = np.float32([[math.log(4), math.log(3), math.log(9)], [99, -99, -99]])
    reg = np.zeros((2, 8), np.float32)
    reg[0, 5] = 5  # the second class of the first RoI moves down by 5 * 0.1 of its height
    rois, picture = np.float32([[10, 20, 30, 60], [50, 50, 90, 120]]), Picture(None, (100, 80), [2, 4, 2, 4], None)
    found = detect(cls, reg, rois, picture, replace(HEAD, score_threshold=0.19))
    np.testing.assert_allclose(found.boxes, [[25, 12.5, 40, 25], [5, 5, 15, 15]])  # clipped to 80 x 100, then scaled
    np.testing.assert_allclose(found.scores, [1, 0.25], rtol=1e-6)
    assert found.labels.tolist() == [0, 0]
    found = detect(cls, reg, rois, picture, replace(HEAD, score_threshold=0.18))
    np.testing.assert_allclose(found.boxes[2], [5, 10, 15, 20])
    assert found.labels.tolist() == [0, 0, 1]
    assert len(detect(cls, reg, rois, picture, replace(HEAD, score_threshold=0.18, max_per_img=2)).labels) == 2


@pytest.mark.parametrize("score_threshold", [0.05, 0.5, 0.9])
def test_detections_equal_the_onnx_operator(score_threshold):
    rng = np.random.default_rng(0)
    rois, scale_factor = random_boxes(rng, 300, clusters=20), np.float32([1.37, 1.41, 1.37, 1.41])
    cls = rng.normal(0, 3, (300, 13)).astype(np.float32)
    reg = rng.normal(0, 0.5, (300, 4)).astype(np.float32)
    boxes = decode_boxes(rois, reg, HEAD, (480, 640)) / scale_factor
    scores = softmax(cls)[:, :12]
    inputs = [boxes[None], scores.T[None], np.int64([300]), np.float32([0.5]), np.float32([score_threshold])]
    _, label, box = run_operator("NonMaxSuppression", 11, inputs).T
    best = np.argsort(-scores[box, label], kind="stable")[:100]

    head = replace(HEAD, class_agnostic=True, score_threshold=score_threshold)
    found = detect(cls, reg, rois, Picture(None, (480, 640), scale_factor, None), head)
    assert 20 < len(found.labels) < (scores > score_threshold).sum()
    np.testing.assert_array_equal(found.labels, label[best])
    np.testing.assert_allclose(found.boxes, boxes[box[best]])
    np.testing.assert_allclose(found.scores, scores[box, label][best])


@pytest.mark.parametrize(("rois", "found"), [(NMS_SPLIT // 2 - 1, 1), (NMS_SPLIT // 2, 2)])
def test_class_agnostic_nms_lets_the_classes_meet_below_the_split(rois, found):
    """From the split on mmcv runs NMS once for each class, whatever it was asked for."""
    boxes, picture = np.tile(np.float32([10, 10, 50, 50]), (rois, 1)), Picture(None, (100, 100), [1] * 4, None)
    head = replace(HEAD, class_agnostic=True, nms_class_agnostic=True)
    detections = detect(np.zeros((rois, 3), np.float32), np.zeros((rois, 4), np.float32), boxes, picture, head)
    assert len(detections.labels) == found


def test_no_proposals_give_no_detections():
    """MMDetection leaves its head before this; the end of ours takes nothing and gives nothing."""
    rois, cls, reg = (np.zeros((0, width), np.float32) for width in (4, 13, 48))
    found = detect(cls, reg, rois, Picture(None, (480, 640), [1] * 4, None), HEAD)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == (0,)
