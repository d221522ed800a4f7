"""postprocess.py, function by function, against MMDetection, mmcv's operators and PyTorch."""

import numpy as np
import pytest
from boxes import EDGE_CASES, HEAD, PROPOSALS, ROIS, SEEDS, distinct_scores, random_boxes, rpn_maps
from conftest import MMDETECTION
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from detectors.preprocess import Picture
from postprocess import (
    NMS_BLOCK,
    NMS_SPLIT,
    align_levels,
    assign_levels,
    base_anchors,
    batched_nms,
    decode_boxes,
    detect,
    grid_anchors,
    nms,
    propose,
    roi_align,
    roi_align_by_definition,
    sigmoid,
    soft_nms,
    softmax,
)

pytest.importorskip("mmdet", reason=MMDETECTION)

import mmcv.ops  # noqa: E402
import torch  # noqa: E402
from mmdet.core import AnchorGenerator, DeltaXYWHBBoxCoder, multiclass_nms  # noqa: E402
from mmdet.models import build_head, build_roi_extractor  # noqa: E402

# ------------------------------------------------------------------ anchors


@pytest.mark.parametrize("ratios", [[0.5, 1.0, 2.0], [1.0], [0.3, 0.7, 1.9, 3.3]])
@pytest.mark.parametrize("scales", [[8], [4], [2, 4.5, 7.3]])
@pytest.mark.parametrize("center_offset", [0.0, 0.5])
def test_anchors_are_bit_equal_to_mmdetection(ratios, scales, center_offset):
    strides, sizes, feature_sizes = (
        [4, 8, 16, 32, 64],
        [4, 9, 16, 31, 64],
        [(25, 38), (13, 19), (7, 10), (1, 5), (1, 1)],
    )
    reference = AnchorGenerator(strides, ratios, scales, sizes, center_offset=center_offset)
    expected = reference.grid_priors(feature_sizes, device="cpu")
    for level, feature_size in enumerate(feature_sizes):
        base = base_anchors(sizes[level], scales, ratios, center_offset)
        assert base.dtype == np.float32
        np.testing.assert_array_equal(base, reference.base_anchors[level].numpy())
        anchors = grid_anchors(base, feature_size, strides[level])
        assert anchors.dtype == np.float32
        np.testing.assert_array_equal(anchors, expected[level].numpy())
        some = np.random.default_rng(0).permutation(len(anchors))[:7]
        np.testing.assert_array_equal(grid_anchors(base, feature_size, strides[level], some), anchors[some])


# ------------------------------------------------------------------ decoding, scores


@given(SEEDS, st.sampled_from([0, 1, 2, 300]), st.sampled_from([0.1, 1, 5, 1e4]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_decode_equals_mmdetection(seed, count, spread, clipped):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, count)
    deltas = rng.normal(0, spread, (count, 4)).astype(np.float32)
    means, stds = rng.normal(0, 0.1, 4).tolist(), rng.uniform(0.05, 1, 4).tolist()
    image_size = (480, 640) if clipped else None
    coder = DeltaXYWHBBoxCoder(means, stds)
    expected = coder.decode(torch.from_numpy(boxes), torch.from_numpy(deltas), max_shape=image_size).numpy()
    found = decode_boxes(boxes, deltas, replace(HEAD, means=means, stds=stds), image_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-3)


def test_sigmoid_and_softmax_equal_torch():
    x = np.float32([-1e4, -90, -17.5, -1, -0.0, 1e-4, 3, 17.5, 90, 1e4])
    np.testing.assert_allclose(sigmoid(x), torch.sigmoid(torch.from_numpy(x)).numpy(), rtol=1e-6, atol=1e-37)
    rows = np.stack([x, x[::-1], np.zeros_like(x), x / 100])
    np.testing.assert_allclose(softmax(rows), torch.softmax(torch.from_numpy(rows), 1).numpy(), rtol=1e-5, atol=1e-37)


# ------------------------------------------------------------------ NMS


@pytest.mark.parametrize("count", [1, 2, NMS_BLOCK, NMS_BLOCK + 1, 1000, 5000])
@pytest.mark.parametrize("iou_threshold", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_nms_equals_mmcv_index_for_index(count, iou_threshold):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        boxes, scores = random_boxes(rng, count, clusters=max(count // 20, 1)), distinct_scores(rng, count)
        _, expected = mmcv.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou_threshold)
        np.testing.assert_array_equal(nms(boxes, scores, iou_threshold), expected.numpy())


@pytest.mark.parametrize("count", [1, 2, 500, 4000, 12000])
def test_batched_nms_equals_mmcv_index_for_index(count):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        boxes, scores = random_boxes(rng, count, clusters=max(count // 30, 1)), distinct_scores(rng, count)
        groups = rng.integers(0, 80, count)
        _, expected = mmcv.ops.batched_nms(
            torch.from_numpy(boxes),
            torch.from_numpy(scores),
            torch.from_numpy(groups),
            {"type": "nms", "iou_threshold": 0.5},
        )
        found, found_scores = batched_nms(boxes, scores, groups, HEAD)
        np.testing.assert_array_equal(found, expected.numpy())
        np.testing.assert_array_equal(found_scores, scores[expected.numpy()])


@pytest.mark.parametrize("count", [1, 2, 30, 1000])
@pytest.mark.parametrize(("iou_threshold", "min_score"), [(0.3, 0.001), (0.5, 0.2), (0.0, 0.05)])
def test_soft_nms_equals_mmcv(count, iou_threshold, min_score):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        boxes = random_boxes(rng, count, clusters=max(count // 10, 1))
        scores = np.float32(min_score) + np.float32(1 - min_score) * distinct_scores(rng, count)
        tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
        dets, expected = mmcv.ops.soft_nms(*tensors, iou_threshold, min_score=min_score)
        found, new_scores = soft_nms(boxes, scores, iou_threshold, min_score)
        np.testing.assert_array_equal(found, expected.numpy())
        np.testing.assert_allclose(new_scores, dets[:, 4].numpy(), rtol=1e-6)
        groups = rng.integers(0, 5, count)
        cfg = {"type": "soft_nms", "iou_threshold": iou_threshold, "min_score": min_score}
        dets, _ = mmcv.ops.batched_nms(*tensors, torch.from_numpy(groups), cfg)
        settings = replace(HEAD, iou_threshold=iou_threshold, soft_min_score=min_score)
        found, new_scores = batched_nms(boxes, scores, groups, settings)
        np.testing.assert_allclose(new_scores, dets[:, 4].numpy(), rtol=1e-5)
        np.testing.assert_array_equal(boxes[found], dets[:, :4].numpy())


# ------------------------------------------------------------------ levels


def extractor(**settings):
    """Return MMDetection's SingleRoIExtractor for a pyramid of four levels."""
    layer = {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}
    return build_roi_extractor(
        {
            "type": "SingleRoIExtractor",
            "roi_layer": layer,
            "out_channels": 8,
            "featmap_strides": [4, 8, 16, 32],
            **settings,
        }
    )


@pytest.mark.parametrize("finest_scale", [56, 28, 33.3])
def test_levels_equal_mmdetection(finest_scale):
    rng = np.random.default_rng(0)
    rois = random_boxes(rng, 20000, 4000, 3000)
    # sides at, just below and just above each threshold, float by float
    sides = [np.float32(finest_scale * 2**k) for k in range(-1, 5)]
    for _ in range(200):
        sides.append(np.nextafter(sides[-6], np.float32(np.inf)))
    for _ in range(200):
        sides.append(np.nextafter(sides[-6 if _ else 0], np.float32(0)))
    square = np.float32(sides)[:, None] * np.float32([0, 0, 1, 1])
    rois = np.concatenate([rois, square, np.float32([[5, 5, 5, 9], [0, 0, 4000, 3000]])])
    expected = extractor(finest_scale=finest_scale).map_roi_levels(torch.from_numpy(np.insert(rois, 0, 0, axis=1)), 4)
    found = assign_levels(rois, 4, finest_scale)
    np.testing.assert_array_equal(found, expected.numpy())
    assert set(found) == {0, 1, 2, 3}


# ------------------------------------------------------------------ RoIAlign


def roi_align_by_mmcv(features, rois, stride, options):
    """Return what mmcv's operator gives for RoIs [r, 4] in one level's map [C, h, w]."""
    return mmcv.ops.roi_align(
        torch.from_numpy(features)[None],
        torch.from_numpy(np.insert(rois, 0, 0, axis=1)),
        (options.output_size, options.output_size),
        1 / stride,
        options.sampling_ratio,
        "avg",
        options.aligned,
    ).numpy()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_definition_of_roi_align_equals_mmcv(size, sampling_ratio, aligned):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 8, 12), dtype=np.float32)
    rois = np.concatenate([EDGE_CASES, random_boxes(rng, 20, 110, 80) - np.float32(8)])
    options = replace(ROIS, output_size=size, sampling_ratio=sampling_ratio, aligned=aligned)
    expected = roi_align_by_mmcv(features, rois, 8, options)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(roi_align_by_definition(features, rois, 8, options), expected, atol=2e-5)


ALIGN = st.builds(
    lambda size, ratio, aligned: replace(ROIS, output_size=size, sampling_ratio=ratio, aligned=aligned),
    st.sampled_from([1, 7, 14]),
    st.sampled_from([0, 2]),
    st.booleans(),
)


@given(
    SEEDS,
    st.sampled_from([0, 1, 2, 60]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([4, 16]),
    ALIGN,
)
@settings(max_examples=80, deadline=None)
def test_roi_align_equals_mmcv(seed, count, shape, stride, options):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((5, *shape), dtype=np.float32)
    height, width = (side * stride for side in shape)
    rois = random_boxes(rng, count, width * 1.3, height * 1.3) - np.float32(0.1 * width)
    expected = roi_align_by_mmcv(features, rois, stride, options)
    np.testing.assert_allclose(roi_align(features, rois, stride, options), expected, atol=1e-5)


def test_align_levels_equals_mmdetection():
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((8, 120 // 2**k, 160 // 2**k), dtype=np.float32) for k in range(4)]
    rois = random_boxes(rng, 300)
    levels = assign_levels(rois, 4, finest_scale=28)
    assert set(levels) == {0, 1, 2, 3}
    reference = extractor(finest_scale=28)
    with torch.no_grad():
        expected = reference(
            [torch.from_numpy(f)[None] for f in features], torch.from_numpy(np.insert(rois, 0, 0, axis=1))
        )
    found = align_levels(features, rois, levels, ROIS)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


# ------------------------------------------------------------------ the RPN's and the head's end


def rpn_head(test_cfg):
    """Return MMDetection's RPNHead with the anchors and the coder of boxes.PROPOSALS."""
    head = build_head(
        {
            "type": "RPNHead",
            "in_channels": 1,
            "feat_channels": 1,
            "test_cfg": test_cfg,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [4],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
        }
    )
    head.test_cfg = mmcv.ConfigDict(test_cfg)
    return head


@pytest.mark.parametrize(
    ("nms_pre", "max_per_img", "min_bbox_size", "iou_threshold"),
    [(1000, 1000, 0, 0.7), (300, 2000, 25, 0.5), (2000, 50, -1, 0.7), (-1, 1000, 0, 0.7)],
)
def test_proposals_equal_mmdetection(nms_pre, max_per_img, min_bbox_size, iou_threshold):
    options, image_size = {"nms_pre": nms_pre, "max_per_img": max_per_img, "min_bbox_size": min_bbox_size}, (256, 350)
    cls, reg = rpn_maps(np.random.default_rng(0), image_size, PROPOSALS.anchors.strides)
    head = rpn_head({**options, "nms": {"type": "nms", "iou_threshold": iou_threshold}})
    maps = [[torch.from_numpy(level)[None] for level in levels] for levels in (cls, reg)]
    expected = head.get_bboxes(*maps, img_metas=[{"img_shape": (*image_size, 3)}])[0].numpy()
    stages, config = {}, replace(PROPOSALS, iou_threshold=iou_threshold, **options)
    boxes = propose(cls, reg, image_size, config, lambda stage, **arrays: stages.update({stage: arrays}))
    scores = stages["propose"]["scores"][stages["propose"]["kept"]][:max_per_img]
    assert len(boxes) > 40
    np.testing.assert_allclose(boxes, expected[:, :4], atol=1e-3)
    np.testing.assert_allclose(scores, expected[:, 4], atol=1e-6)


def head_outputs(rois, class_agnostic):
    """Return what detect takes before its settings: logits and deltas of twelve classes, RoIs and their picture."""
    rng, classes = np.random.default_rng(0), 12
    proposals = random_boxes(rng, rois, clusters=20)
    cls = rng.normal(0, 3, (rois, classes + 1)).astype(np.float32)
    reg = rng.normal(0, 1, (rois, 4 if class_agnostic else 4 * classes)).astype(np.float32)
    return cls, reg, proposals, Picture(None, (480, 640), np.float32([1.37, 1.41, 1.37, 1.41]), None)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("score_threshold", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("rois", [1, 400])
@pytest.mark.parametrize(
    ("nms_cfg", "options"),
    [
        ({"type": "nms"}, {}),
        ({"type": "nms", "class_agnostic": True}, {"nms_class_agnostic": True}),
        ({"type": "soft_nms"}, {"soft_min_score": 1e-3}),
        ({"type": "soft_nms", "class_agnostic": True, "min_score": 0.04},
         {"soft_min_score": 0.04, "nms_class_agnostic": True}),
    ],
)  # fmt: skip
def test_detections_equal_mmdetection(nms_cfg, options, rois, score_threshold, class_agnostic):
    cls, reg, proposals, picture = head_outputs(rois, class_agnostic)
    coder = DeltaXYWHBBoxCoder(HEAD.means, HEAD.stds)
    boxes = coder.decode(torch.from_numpy(proposals), torch.from_numpy(reg), max_shape=picture.image_size)
    boxes = boxes / torch.from_numpy(picture.scale_factor).repeat(reg.shape[1] // 4)
    scores, nms_cfg = torch.softmax(torch.from_numpy(cls), 1), {**nms_cfg, "iou_threshold": 0.5}
    expected, expected_labels = multiclass_nms(boxes, scores, score_threshold, nms_cfg, 100)
    head = replace(HEAD, class_agnostic=class_agnostic, score_threshold=score_threshold, **options)
    found = detect(cls, reg, proposals, picture, head)
    if rois == 400:
        assert len(found.labels) >= 5
    np.testing.assert_allclose(found.boxes, expected[:, :4].numpy(), atol=1e-3)
    np.testing.assert_allclose(found.scores, expected[:, 4].numpy(), atol=1e-6)
    np.testing.assert_array_equal(found.labels, expected_labels.numpy())


@pytest.mark.parametrize("rois", [100, 800, 1000])
@pytest.mark.parametrize("score_threshold", [0, 1e-4])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("nms_type", ["nms", "soft_nms"])
def test_all_detections_are_bit_equal_to_mmdetection(nms_type, class_agnostic, score_threshold, rois):
    """Even if all of a class are below the minimum that mmcv's Soft-NMS has of its own, 1e-3, and after its split.

    MMDetection gets the boxes and scores as postprocess.py computes them: the last bit of two decides on their order.
    """
    cls, reg, proposals, picture = head_outputs(rois, False)
    shares = np.random.default_rng(0).uniform(2e-5, 9e-4, rois)  # a class that has nothing but low scores
    cls[:, 3] = np.log(np.exp(np.delete(cls, 3, axis=1)).sum(axis=1) * shares)
    assert softmax(cls)[:, 3].max() < 1e-3
    candidates = (softmax(cls)[:, :-1] > score_threshold).sum()
    assert (candidates >= NMS_SPLIT) == (rois == 1000)
    boxes = decode_boxes(np.repeat(proposals, 12, axis=0), reg.reshape(-1, 4), HEAD, (480, 640))
    boxes = torch.from_numpy((boxes / picture.scale_factor).reshape(rois, 48))
    nms_cfg = {"type": nms_type, "iou_threshold": 0.5, "class_agnostic": class_agnostic}
    expected, labels = multiclass_nms(boxes, torch.from_numpy(softmax(cls)), score_threshold, nms_cfg, 10**6)
    head = replace(
        HEAD, score_threshold=score_threshold, nms_class_agnostic=class_agnostic,
        soft_min_score=1e-3 if nms_type == "soft_nms" else None, max_per_img=10**6,
    )  # fmt: skip
    found = detect(cls, reg, proposals, picture, head)
    assert 100 < len(found.labels) < candidates
    np.testing.assert_array_equal(found.labels, labels.numpy())
    np.testing.assert_array_equal(found.boxes, expected[:, :4].numpy())
    np.testing.assert_array_equal(found.scores, expected[:, 4].numpy())
