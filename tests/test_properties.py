"""What holds for every input of postprocess.py, tried on thousands that hypothesis makes up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from postprocess import (
    assign_levels,
    base_anchors,
    batched_nms,
    decode_boxes,
    detect,
    nms,
    propose,
    roi_align,
    soft_nms,
    top_k,
)

settings.register_profile("thorough", max_examples=300, deadline=None)
settings.load_profile("thorough")

COORDINATES = st.floats(-2000, 2000, width=32)
DELTAS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCORES = st.floats(0, 1, width=32)
pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # as it must where deltas are 1e38
STDS, MEANS = [0.1, 0.1, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]


@st.composite
def boxes_and_scores(draw, most=40, distinct=False):
    """Draw boxes of any size, also none and negative, and their scores."""
    count = draw(st.integers(0, most))
    boxes = draw(arrays(np.float32, (count, 4), elements=COORDINATES))
    if draw(st.booleans()):  # of positive size
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    if distinct:
        scores = np.float32(draw(st.permutations(range(1, count + 1)))) / np.float32(count + 1)
    else:
        scores = draw(arrays(np.float32, count, elements=SCORES))
    return boxes, scores


@given(boxes_and_scores(), st.floats(0, 1))
def test_nms_keeps_sorted_and_unique_and_the_best(pair, threshold):
    boxes, scores = pair
    kept = nms(boxes, scores, threshold)
    assert len(set(kept.tolist())) == len(kept)
    assert (np.diff(scores[kept]) <= 0).all()
    if len(boxes):
        assert scores[kept[0]] == scores.max()


@given(boxes_and_scores(), st.floats(0, 1))
def test_nms_of_what_it_keeps_keeps_all(pair, threshold):
    boxes, scores = pair
    kept = nms(boxes, scores, threshold)
    again = nms(boxes[kept], scores[kept], threshold)
    np.testing.assert_array_equal(again, np.arange(len(kept)))


@given(boxes_and_scores(distinct=True), st.floats(0, 1), st.randoms(use_true_random=False))
def test_nms_does_not_ask_for_an_order(pair, threshold, random):
    boxes, scores = pair
    order = np.array(random.sample(range(len(boxes)), len(boxes)), int)
    np.testing.assert_array_equal(order[nms(boxes[order], scores[order], threshold)], nms(boxes, scores, threshold))


@given(boxes_and_scores(most=150), st.floats(0.1, 0.9))
def test_nms_is_its_definition(pair, threshold):
    """Box by box, from the definition, in float32 as the formula stands."""
    boxes, scores = pair
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        overlaps = []
        for k in kept:
            width = max(min(boxes[i, 2], boxes[k, 2]) - max(boxes[i, 0], boxes[k, 0]), np.float32(0))
            height = max(min(boxes[i, 3], boxes[k, 3]) - max(boxes[i, 1], boxes[k, 1]), np.float32(0))
            areas = [(boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1]) for j in (k, i)]
            union = areas[0] + areas[1] - width * height
            overlaps.append(bool(union != 0 and width * height / union > threshold))
        if not any(overlaps):
            kept.append(i)
    np.testing.assert_array_equal(nms(boxes, scores, threshold), np.array(kept, int))


@given(boxes_and_scores(), st.integers(1, 5), st.floats(0, 1))
def test_groups_do_not_meet(pair, groups, threshold):
    boxes, scores = pair
    labels = np.arange(len(boxes)) % groups
    kept, kept_scores = batched_nms(boxes, scores, labels, threshold)
    assert len(set(kept.tolist())) == len(kept)
    assert (np.diff(kept_scores) <= 0).all()
    assert set(labels[kept]) == set(labels)  # of every group at least the best one stays
    np.testing.assert_array_equal(kept_scores, scores[kept])


@given(boxes_and_scores(), st.floats(0, 1), st.floats(0.001, 0.5))
def test_soft_nms_only_lowers(pair, threshold, lowest):
    boxes, scores = np.abs(pair[0]), pair[1]
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    kept, new = soft_nms(boxes, scores, threshold, lowest)
    assert len(set(kept.tolist())) == len(kept)
    assert (new <= scores[kept]).all()
    assert (np.diff(new) <= 0).all()


@given(arrays(np.float32, st.integers(0, 200), elements=SCORES), st.integers(1, 250))
def test_top_k_is_a_stable_sort(scores, k):
    np.testing.assert_array_equal(top_k(scores, k), np.argsort(-scores, kind="stable")[:k])


@given(boxes_and_scores(most=20), st.data())
def test_decoding_anything_gives_boxes_in_the_picture(pair, data):
    deltas = data.draw(arrays(np.float32, pair[0].shape, elements=DELTAS))
    boxes = decode_boxes(pair[0], deltas, MEANS, STDS, (300, 400))
    assert boxes.dtype == np.float32
    assert boxes.shape == deltas.shape
    assert np.isfinite(boxes).all()
    assert (boxes >= 0).all()
    assert (boxes <= np.float32([400, 300, 400, 300])).all()


@st.composite
def real_boxes(draw, most=20):
    """Draw boxes at least a pixel wide and high."""
    count = draw(st.integers(1, most))
    corners = draw(arrays(np.float32, (count, 2), elements=st.floats(0, 500, width=32)))
    sizes = draw(arrays(np.float32, (count, 2), elements=st.floats(1, 500, width=32)))
    return np.concatenate([corners, corners + sizes], axis=1)


def encode(boxes, targets):
    """Return the deltas that lead from boxes to targets, in float64 (Faster R-CNN, equation 2)."""
    boxes, targets = boxes.astype(float), targets.astype(float)
    sizes, target_sizes = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    moves = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / sizes
    return np.concatenate([moves, np.log(target_sizes / sizes)], axis=1)


@given(real_boxes(), st.data())
def test_decoding_undoes_encoding(boxes, data):
    moves = data.draw(arrays(np.float32, boxes.shape, elements=st.floats(-2, 2, width=32)))
    sizes = boxes[:, 2:] - boxes[:, :2]
    corners = boxes[:, :2] + moves[:, :2] * sizes
    targets = np.concatenate([corners, corners + sizes * np.exp(moves[:, 2:])], axis=1)
    deltas = (encode(boxes, targets) - MEANS) / STDS
    decoded = decode_boxes(boxes, deltas.astype(np.float32), MEANS, STDS)
    np.testing.assert_allclose(decoded, targets, atol=0.02)


@given(arrays(np.float32, st.tuples(st.integers(0, 30), st.just(4)), elements=COORDINATES), st.integers(1, 6))
def test_levels_are_levels_and_grow_with_area(boxes, num_levels):
    levels = assign_levels(boxes, num_levels)
    assert levels.shape == (len(boxes),)
    assert ((levels >= 0) & (levels < num_levels)).all()
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    order = np.argsort(sides[:, 0] * sides[:, 1], kind="stable")
    assert (np.diff(levels[order]) >= 0).all()


@st.composite
def maps_and_rois(draw):
    """Draw a feature map [C, h, w] and boxes over and around it."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
    features = draw(arrays(np.float32, shape, elements=st.floats(-10, 10, width=32)))
    rois = draw(arrays(np.float32, (draw(st.integers(0, 6)), 4), elements=st.floats(-100, 200, width=32)))
    rois = np.concatenate([np.minimum(rois[:, :2], rois[:, 2:]), np.maximum(rois[:, :2], rois[:, 2:])], axis=1)
    return features, rois


ALIGN = st.fixed_dictionaries(
    {"output_size": st.integers(1, 7), "sampling_ratio": st.integers(0, 3), "aligned": st.booleans()}
)


@given(maps_and_rois(), ALIGN)
def test_roi_align_is_finite_and_within_the_map(pair, options):
    features, rois = pair
    pooled = roi_align(features, rois, 8, **options)
    size = options["output_size"]
    assert pooled.dtype == np.float32
    assert pooled.shape == (len(rois), len(features), size, size)
    assert np.isfinite(pooled).all()
    assert (np.abs(pooled) <= np.abs(features).max() + 1e-4).all()


@given(maps_and_rois(), ALIGN, st.floats(-5, 5, width=32))
def test_roi_align_is_linear(pair, options, factor):
    features, rois = pair
    other = features[:, ::-1, ::-1]
    together = roi_align(features + np.float32(factor) * other, rois, 8, **options)
    apart = roi_align(features, rois, 8, **options) + np.float32(factor) * roi_align(other, rois, 8, **options)
    np.testing.assert_allclose(together, apart, atol=1e-3)


@given(real_boxes(6), ALIGN)
def test_roi_align_of_a_constant_is_the_constant_inside_the_map(rois, options):
    features = np.full((2, 140, 140), 3, np.float32)
    np.testing.assert_allclose(roi_align(features, rois, 8, **options), 3, atol=1e-5)


@settings(max_examples=100)
@given(maps_and_rois(), st.integers(1, 7), st.integers(1, 3))
def test_roi_align_of_the_mirror_image_is_mirrored(pair, size, ratio):
    features, rois = pair
    width = features.shape[2] * 8
    mirrored = rois[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([width, 0, width, 0])
    on_edge = (
        np.abs(np.stack([rois, mirrored]) / 8 % 1) < 1e-3
    )  # a point on the edge of the map may fall to either side
    inside = ((rois > 8) & (rois < np.float32([width, features.shape[1] * 8] * 2) - 8)).all(axis=1) & ~on_edge.any(
        (0, 2)
    )
    ours = roi_align(features, rois[inside], 8, size, ratio)
    flipped = roi_align(features[:, :, ::-1], mirrored[inside], 8, size, ratio)
    np.testing.assert_allclose(flipped, ours[..., ::-1], atol=1e-3)


@st.composite
def rpn_maps(draw):
    """Draw the maps of an RPN for two levels: logits and deltas of three anchors a cell."""
    cls, reg = [], []
    for _ in range(2):
        height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        cls.append(draw(arrays(np.float32, (3, height, width), elements=DELTAS)))
        reg.append(draw(arrays(np.float32, (12, height, width), elements=DELTAS)))
    return cls, reg


@given(rpn_maps(), st.integers(-1, 40), st.integers(1, 30), st.floats(-1, 400))
def test_proposals_of_anything_are_boxes_in_the_picture(maps, nms_pre, most, smallest):
    cls, reg = maps
    base = [base_anchors(size, [8], [0.5, 1, 2]) for size in (4, 8)]
    nms_pre = nms_pre or 1
    boxes, scores = propose(cls, reg, base, [4, 8], (60, 80), MEANS, STDS, nms_pre, 0.7, most, smallest)
    assert boxes.shape == (len(scores), 4)
    assert len(scores) <= most
    assert np.isfinite(boxes).all()
    assert (np.diff(scores) <= 0).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert ((boxes >= 0) & (boxes <= np.float32([80, 60, 80, 60]))).all()
    if smallest >= 0:
        assert (boxes[:, 2:] - boxes[:, :2] > smallest).all()


@given(st.integers(0, 12), st.integers(1, 4), st.floats(0, 1), st.data())
def test_detections_of_anything_are_boxes_in_the_picture(count, classes, threshold, data):
    cls = data.draw(arrays(np.float32, (count, classes + 1), elements=DELTAS))
    reg = data.draw(arrays(np.float32, (count, 4 * classes), elements=DELTAS))
    rois = data.draw(arrays(np.float32, (count, 4), elements=COORDINATES))
    boxes, scores, labels = detect(cls, reg, rois, (60, 80), [2] * 4, MEANS, STDS, False, threshold, 0.5, 10)
    assert boxes.shape == (len(scores), 4)
    assert len(labels) == len(scores) <= 10
    assert np.isfinite(boxes).all()
    assert (np.diff(scores) <= 0).all()
    assert (scores > threshold).all()
    assert ((labels >= 0) & (labels < classes)).all()
    assert ((boxes >= 0) & (boxes <= np.float32([40, 30, 40, 30]))).all()


@pytest.mark.parametrize("count", [0, 1, 200])
def test_equal_scores_keep_their_order(count):
    boxes = np.float32([[i * 20, 0, i * 20 + 10, 10] for i in range(count)]).reshape(-1, 4)
    np.testing.assert_array_equal(nms(boxes, np.full(count, 0.5, np.float32), 0.5), np.arange(count))
