"""What holds for every input of postprocess.py, tried on thousands that hypothesis makes up."""

import numpy as np
import pytest
from boxes import ANCHORS, HEAD, HEAD_STDS, NO_MEANS, PROPOSALS, ROIS, SEEDS
from hypothesis import given, settings, target
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import replace

from detectors.preprocess import Picture
from postprocess import (
    assign_levels,
    batched_nms,
    decode_boxes,
    detect,
    nms,
    propose,
    roi_align,
    soft_nms,
    top_k,
)

settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile("thorough")

COORDINATES = st.floats(-2000, 2000, width=32)
DELTAS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCORES = st.floats(0, 1, width=32)
pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # as it must where deltas are 1e38


@st.composite
def boxes_and_scores(draw, most=40):
    """Draw boxes of any size, also none and negative, and their scores."""
    count = draw(st.integers(0, most))
    boxes = draw(arrays(np.float32, (count, 4), elements=COORDINATES))
    if draw(st.booleans()):  # of positive size
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    return boxes, draw(arrays(np.float32, count, elements=SCORES))


@st.composite
def crowds(draw, most=20):
    """Draw boxes in whole pixels, as many again in the same places, and scores, which are better for the first half.

    Whole pixels stay what they are wherever NMS moves them.
    """
    count = draw(st.integers(1, most))
    corners = draw(arrays(np.int64, (count, 2), elements=st.integers(0, 40)))
    sizes = draw(arrays(np.int64, (count, 2), elements=st.integers(1, 40)))
    boxes = np.tile(np.concatenate([corners, corners + sizes], axis=1).astype(np.float32), (2, 1))
    order = [np.float32(draw(st.permutations(range(count)))) for _ in range(2)]
    return boxes, np.concatenate([order[0] + count + 1, order[1] + 1]) / np.float32(2 * count + 2)


@given(boxes_and_scores(), st.floats(0, 1))
def test_nms_keeps_sorted_and_unique_and_the_best(pair, threshold):
    boxes, scores = pair
    kept = nms(boxes, scores, threshold)
    target(len(boxes) - len(kept))  # of many examples, those where boxes are removed
    assert len(set(kept.tolist())) == len(kept)
    assert (np.diff(scores[kept]) <= 0).all()
    if len(boxes):
        assert scores[kept[0]] == scores.max()


@given(crowds(), st.floats(0, 0.99))
def test_nms_removes_the_second_of_two_boxes_in_one_place(crowd, threshold):
    boxes, scores = crowd
    first = len(boxes) // 2
    np.testing.assert_array_equal(nms(boxes, scores, threshold), nms(boxes[:first], scores[:first], threshold))


@given(crowds(), st.floats(0, 0.99))
def test_nms_of_what_it_keeps_keeps_all(crowd, threshold):
    boxes, scores = crowd
    kept = nms(boxes, scores, threshold)
    assert len(kept) <= len(boxes) // 2
    again = nms(boxes[kept], scores[kept], threshold)
    np.testing.assert_array_equal(again, np.arange(len(kept)))


@given(crowds(), st.floats(0, 0.99), st.randoms(use_true_random=False))
def test_nms_does_not_ask_for_an_order(crowd, threshold, random):
    boxes, scores = crowd
    order = np.array(random.sample(range(len(boxes)), len(boxes)), int)
    kept = nms(boxes, scores, threshold)
    assert len(kept) < len(boxes)
    np.testing.assert_array_equal(order[nms(boxes[order], scores[order], threshold)], kept)


@given(boxes_and_scores(most=100), st.floats(0.1, 0.9))
@settings(max_examples=100)
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


@given(crowds(), st.integers(1, 5), st.floats(0, 0.99))
def test_groups_do_not_meet(crowd, groups, threshold):
    """Each group keeps what it would keep alone: the second of two boxes in one place, if it is of another group."""
    boxes, scores = crowd
    labels = np.arange(len(boxes)) % groups
    members = [np.flatnonzero(labels == group) for group in range(groups)]
    expected = np.concatenate([here[nms(boxes[here], scores[here], threshold)] for here in members])
    expected = expected[np.argsort(-scores[expected])]
    kept, kept_scores = batched_nms(boxes, scores, labels, replace(HEAD, iou_threshold=threshold))
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(kept_scores, scores[kept])
    if groups == 1:
        assert len(kept) <= len(boxes) // 2


@given(crowds(), st.floats(0, 0.99), st.floats(0.001, 0.5))
def test_soft_nms_only_lowers(crowd, threshold, lowest):
    boxes, scores = crowd
    kept, new = soft_nms(boxes, scores, threshold, lowest)
    assert len(set(kept.tolist())) == len(kept)
    assert (kept < len(boxes) // 2).all()  # two boxes in one place: 1 - IoU = 0
    assert (new <= scores[kept]).all()
    assert (np.diff(new) <= 0).all()
    assert new[0] == scores.max()
    assert (new[1:] >= lowest).all()


@given(arrays(np.float32, st.integers(0, 200), elements=SCORES), st.integers(1, 250))
def test_top_k_is_a_stable_sort(scores, k):
    np.testing.assert_array_equal(top_k(scores, k), np.argsort(-scores, kind="stable")[:k])


@given(boxes_and_scores(most=20), st.data())
def test_decoding_anything_gives_boxes_in_the_picture(pair, data):
    deltas = data.draw(arrays(np.float32, pair[0].shape, elements=DELTAS))
    boxes = decode_boxes(pair[0], deltas, HEAD, (300, 400))
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
    deltas = (encode(boxes, targets) - NO_MEANS) / HEAD_STDS
    decoded = decode_boxes(boxes, deltas.astype(np.float32), HEAD)
    np.testing.assert_allclose(decoded, targets, atol=0.02)


@given(arrays(np.float32, st.tuples(st.integers(0, 30), st.just(4)), elements=COORDINATES), st.integers(1, 6))
def test_levels_are_levels_and_grow_with_area(boxes, num_levels):
    levels = assign_levels(boxes, num_levels)
    assert levels.shape == (len(boxes),)
    assert ((levels >= 0) & (levels < num_levels)).all()
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    order = np.argsort(sides[:, 0] * sides[:, 1], kind="stable")
    assert (np.diff(levels[order]) >= 0).all()


@given(st.floats(1, 100), st.floats(0.01, 3.99), st.integers(1, 6))
def test_a_roi_twice_the_size_is_one_level_up(finest_scale, octaves, num_levels):
    sides = finest_scale * 2 ** (np.floor(octaves) + np.clip(octaves % 1, 0.01, 0.99) + np.arange(-1, num_levels))
    levels = assign_levels(sides[:, None].astype(np.float32) * np.float32([0, 0, 1, 1]), num_levels + 3, finest_scale)
    np.testing.assert_array_equal(levels, np.maximum(np.floor(octaves) + np.arange(-1, num_levels), 0))


@st.composite
def rois_in_a_map(draw, most=6):
    """Draw the height and width of a map, and RoIs of some size in it, a cell and more from its edge, in cells."""
    shape = draw(st.tuples(st.integers(4, 12), st.integers(4, 12)))
    count = draw(st.integers(1, most))
    fractions = draw(arrays(np.float32, (count, 2, 2), elements=st.floats(0, 1, width=32)))
    ends = np.sort(fractions, axis=1) * (np.float32(shape[::-1]) - np.float32(2.25)) + np.float32(1)
    ends[:, 1] += np.float32(0.25)
    return shape, ends.reshape(count, 4)


ALIGN = st.builds(
    lambda size, ratio, aligned: replace(ROIS, output_size=size, sampling_ratio=ratio, aligned=aligned),
    st.integers(1, 7),
    st.integers(0, 3),
    st.booleans(),
)


@given(SEEDS, st.tuples(st.integers(1, 12), st.integers(1, 12)), boxes_and_scores(most=6), ALIGN)
def test_roi_align_is_finite_and_within_the_map(seed, shape, pair, options):
    """Anywhere it lies between zero and the map's largest value; of the whole map, not below the smallest either."""
    features = np.random.default_rng(seed).uniform(1, 2, (2, *shape)).astype(np.float32)
    corners = np.sort(pair[0].reshape(-1, 2, 2), axis=1).reshape(-1, 4) / 10
    rois = np.concatenate([corners, np.float32([[0, 0, 8 * shape[1], 8 * shape[0]]])])
    pooled = roi_align(features, rois, 8, options)
    assert pooled.dtype == np.float32
    assert pooled.shape == (len(rois), 2, options.output_size, options.output_size)
    assert ((pooled >= 0) & (pooled <= 2 + 1e-5)).all()
    assert (pooled[-1] >= 1 - 1e-5).all()


@given(rois_in_a_map(), ALIGN, st.tuples(*[st.floats(-5, 5, width=32)] * 3))
def test_roi_align_of_a_slope_is_its_height_at_the_middle_of_each_bin(drawn, options, slope):
    (height, width), rois = drawn
    dx, dy, constant = slope
    # A map a cell larger: without `aligned`, RoIs are made at least a cell long.
    y, x = np.mgrid[: height + 1, : width + 1].astype(np.float32)
    pooled = roi_align((dx * x + dy * y + constant)[None], rois * 8, 8, options)
    start, size = rois[:, :2], rois[:, 2:] - rois[:, :2]
    if options.aligned:
        start = start - 0.5  # a cell's value stands at its centre
    else:
        size = np.maximum(size, 1)
    middles = (np.arange(options.output_size) + 0.5) / options.output_size
    xs, ys = (start[:, None] + size[:, None] * middles[:, None]).transpose(2, 0, 1)  # [r, s] each
    expected = dx * xs[:, None, :] + dy * ys[:, :, None] + constant
    np.testing.assert_allclose(pooled[:, 0], expected, atol=1e-4)


@given(SEEDS, rois_in_a_map(), st.integers(1, 7), st.integers(1, 3))
def test_roi_align_of_the_mirror_image_is_mirrored(seed, drawn, size, ratio):
    shape, rois = drawn
    features = np.random.default_rng(seed).uniform(1, 9, (3, *shape)).astype(np.float32)
    mirrored = rois[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([shape[1], 0, shape[1], 0])
    options = replace(ROIS, output_size=size, sampling_ratio=ratio)
    ours = roi_align(features, rois * 8, 8, options)
    flipped = roi_align(features[:, :, ::-1], mirrored * 8, 8, options)
    assert (ours > 0.9).all()
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
    anchors = replace(ANCHORS, strides=(4, 8), base_sizes=(4, 8), scales=(8,))
    config = replace(
        PROPOSALS, anchors=anchors, stds=HEAD_STDS, nms_pre=nms_pre, max_per_img=most, min_bbox_size=smallest
    )
    stages = {}
    boxes = propose(*maps, (60, 80), config, lambda stage, **arrays: stages.update({stage: arrays}))
    kept, scores = stages["propose"]["kept"], stages["propose"]["scores"]
    assert len(boxes) == min(len(kept), most)
    assert np.isfinite(boxes).all()
    assert (np.diff(scores[kept]) <= 0).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    assert ((boxes >= 0) & (boxes <= np.float32([80, 60, 80, 60]))).all()
    if smallest >= 0:
        assert (boxes[:, 2:] - boxes[:, :2] > smallest).all()
    else:
        assert len(boxes) > 0


@given(st.integers(0, 12), st.integers(1, 4), st.floats(0, 1), st.data())
def test_detections_of_anything_are_boxes_in_the_picture(count, classes, threshold, data):
    cls = data.draw(arrays(np.float32, (count, classes + 1), elements=DELTAS))
    reg = data.draw(arrays(np.float32, (count, 4 * classes), elements=DELTAS))
    rois = data.draw(arrays(np.float32, (count, 4), elements=COORDINATES))
    head = replace(HEAD, score_threshold=threshold, max_per_img=10)
    boxes, scores, labels, _ = detect(cls, reg, rois, Picture(None, (60, 80), [2] * 4, None), head)
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
