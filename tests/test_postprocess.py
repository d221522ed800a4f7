"""postprocess.py, function by function, against MMDetection, ONNX Runtime's operators and scalar loops."""

import math
import tracemalloc

import mmcv.ops
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.core import AnchorGenerator, DeltaXYWHBBoxCoder, multiclass_nms
from mmdet.models import build_head, build_roi_extractor

from postprocess import (
    NMS_BLOCK,
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
    sigmoid,
    soft_nms,
    softmax,
    top_k,
)

SEEDS = st.integers(0, 2**32 - 1)


def random_boxes(rng, count, width=640, height=480, clusters=None):
    """Return boxes [count, 4], some of them without area, crowded around a few places if asked."""
    place = rng.integers(0, clusters or count, count) if count else np.zeros(0, int)
    centers = rng.uniform(0, [width, height], (clusters or count, 2))[place]
    sizes = np.exp(rng.uniform(np.log(2), np.log(300), (clusters or count, 2)))[place]
    centers = centers + rng.normal(0, 0.1, (count, 2)) * sizes
    sizes = sizes * np.exp(rng.normal(0, 0.1, (count, 2)))
    sizes[rng.random(count) < 0.03] = 0
    boxes = np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
    return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)


def distinct_scores(rng, count):
    """Return scores [count] in random order, all different: the order of equal ones is nobody's promise."""
    return rng.permutation(np.linspace(0.001, 0.999, count, dtype=np.float32))


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


def test_default_anchors_by_hand():
    anchors = grid_anchors(base_anchors(4, [8], [0.5, 1.0, 2.0]), (2, 2), 4)
    assert anchors.shape == (12, 4)
    np.testing.assert_allclose(anchors[1], [-16, -16, 16, 16])  # ratio 1: a square of 32 around the corner
    np.testing.assert_allclose(anchors[4], [-12, -16, 20, 16])  # the next cell of the row
    np.testing.assert_allclose(anchors[7], [-16, -12, 16, 20])  # the first cell of the next row
    widths, heights = (anchors[:3, 2:] - anchors[:3, :2]).T
    np.testing.assert_allclose(heights / widths, [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(widths * heights, 32**2, rtol=1e-6)


# ------------------------------------------------------------------ decoding


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
    found = decode_boxes(boxes, deltas, means, stds, image_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-3)


def test_decode_by_the_formula():
    box, deltas = np.float32([[10, 20, 50, 100]]), np.float32([[0.5, -0.25, math.log(2), math.log(0.5)]])
    x, y = 30 + 40 * 0.5, 60 + 80 * -0.25
    np.testing.assert_allclose(
        decode_boxes(box, deltas, [0] * 4, [1] * 4), [[x - 40, y - 20, x + 40, y + 20]], rtol=1e-6
    )
    widest = decode_boxes(box, np.float32([[0, 0, 99, -99]]), [0] * 4, [1] * 4)[0]
    assert widest[2] - widest[0] == pytest.approx(40 * 1000 / 16)
    assert widest[3] - widest[1] == pytest.approx(80 * 16 / 1000, rel=1e-4)


# ------------------------------------------------------------------ scores


def test_sigmoid_and_softmax_equal_torch():
    x = np.float32([-1e4, -90, -17.5, -1, -0.0, 1e-4, 3, 17.5, 90, 1e4])
    np.testing.assert_allclose(sigmoid(x), torch.sigmoid(torch.from_numpy(x)).numpy(), rtol=1e-6, atol=1e-37)
    rows = np.stack([x, x[::-1], np.zeros_like(x), x / 100])
    np.testing.assert_allclose(softmax(rows), torch.softmax(torch.from_numpy(rows), 1).numpy(), rtol=1e-5, atol=1e-37)


@given(SEEDS, st.integers(0, 500), st.integers(1, 300), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_top_k_is_a_stable_sort_cut_off(seed, count, k, levels):
    scores = np.random.default_rng(seed).integers(0, levels, count).astype(np.float32)
    expected = sorted(range(count), key=lambda i: (-scores[i], i))[:k]
    assert top_k(scores, k).tolist() == expected


# ------------------------------------------------------------------ NMS


def nms_by_scalars(boxes, scores, iou_threshold):
    """Return what NMS keeps, box by box and pair by pair."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        for j in kept:
            sides = [min(boxes[i][a + 2], boxes[j][a + 2]) - max(boxes[i][a], boxes[j][a]) for a in (0, 1)]
            shared = max(sides[0], 0) * max(sides[1], 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j])]
            union = sum(areas) - shared
            if union > 0 and np.float32(shared) / np.float32(union) > np.float32(iou_threshold):
                break
        else:
            kept.append(i)
    return kept


@given(SEEDS, st.sampled_from([0, 1, 2, 40]), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
@settings(max_examples=60, deadline=None)
def test_nms_equals_scalar_loops(seed, count, iou_threshold):
    rng = np.random.default_rng(seed)
    boxes, scores = rng.integers(0, 12, (count, 4)), rng.integers(0, 9, count) / 8  # whole pixels: exact IoUs, ties
    boxes[:, 2:] += boxes[:, :2]
    found = nms(boxes.astype(np.float32), scores.astype(np.float32), iou_threshold)
    assert found.tolist() == nms_by_scalars(boxes.tolist(), scores.tolist(), iou_threshold)


@pytest.mark.parametrize("count", [1, 2, NMS_BLOCK, NMS_BLOCK + 1, 1000, 5000])
@pytest.mark.parametrize("iou_threshold", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_nms_equals_mmcv_index_for_index(count, iou_threshold):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        boxes, scores = random_boxes(rng, count, clusters=max(count // 20, 1)), distinct_scores(rng, count)
        _, expected = mmcv.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), iou_threshold)
        np.testing.assert_array_equal(nms(boxes, scores, iou_threshold), expected.numpy())


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


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_nms_equals_the_onnx_operator(iou_threshold):
    rng = np.random.default_rng(1)
    boxes, scores = random_boxes(rng, 800, clusters=40), distinct_scores(rng, 800)
    threshold, limit = np.float32([iou_threshold]), np.int64([800])
    expected = run_operator("NonMaxSuppression", 11, [boxes[None], scores[None, None], limit, threshold])[:, 2]
    found = nms(boxes, scores, iou_threshold)
    assert 40 < len(found) < 700
    np.testing.assert_array_equal(found, expected)


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
        found, found_scores = batched_nms(boxes, scores, groups, 0.5)
        np.testing.assert_array_equal(found, expected.numpy())
        np.testing.assert_array_equal(found_scores, scores[expected.numpy()])


def test_nms_of_many_boxes_takes_little_memory():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 10000, clusters=500), distinct_scores(rng, 10000)
    tracemalloc.start()
    nms(boxes, scores, 0.7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # all pairs at once would be 400e6 for each of the terms of an IoU


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
        found, new_scores = batched_nms(boxes, scores, groups, iou_threshold, min_score)
        np.testing.assert_allclose(new_scores, dets[:, 4].numpy(), rtol=1e-5)
        np.testing.assert_array_equal(boxes[found], dets[:, :4].numpy())


def test_nms_of_nothing():
    nothing = np.zeros((0, 4), np.float32)
    assert nms(nothing, nothing[:, 0], 0.5).tolist() == []
    assert soft_nms(nothing, nothing[:, 0], 0.5, 0.001)[0].tolist() == []
    assert batched_nms(nothing, nothing[:, 0], np.zeros(0, np.int64), 0.5)[0].tolist() == []


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


def test_levels_by_hand():
    sides = np.float32([1, 55, 111, 113, 223, 225, 447, 449, 5000])
    rois = sides[:, None] * np.float32([0, 0, 1, 1])
    assert assign_levels(rois, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(rois[:0], 4).tolist() == []


# ------------------------------------------------------------------ RoIAlign


def roi_align_by_scalars(features, roi, stride, size, sampling_ratio, aligned):
    """Return RoIAlign of one RoI, point by point."""
    channels, height, width = features.shape
    x1, y1, x2, y2 = (side / stride - (0.5 if aligned else 0) for side in roi.tolist())
    roi_width, roi_height = x2 - x1, y2 - y1
    if not aligned:
        roi_width, roi_height = max(roi_width, 1), max(roi_height, 1)
    columns = sampling_ratio or math.ceil(roi_width / size)
    rows = sampling_ratio or math.ceil(roi_height / size)
    result = np.zeros((channels, size, size))
    for by, bx, iy, ix in np.ndindex(size, size, rows, columns):
        y = y1 + (by + (iy + 0.5) / rows) * roi_height / size
        x = x1 + (bx + (ix + 0.5) / columns) * roi_width / size
        if not (-1 <= y <= height and -1 <= x <= width):
            continue
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        value = (
            features[:, top, left] * (1 - (y - top)) * (1 - (x - left))
            + features[:, top, right] * (1 - (y - top)) * (x - left)
            + features[:, bottom, left] * (y - top) * (1 - (x - left))
            + features[:, bottom, right] * (y - top) * (x - left)
        )
        result[:, by, bx] += value / (rows * columns)
    return result


ROIS = np.float32(
    [
        [8, 8, 40, 30],
        [0, 0, 96, 64],  # the whole map
        [3.3, 7.7, 3.3, 7.7],  # no area
        [10, 5, 10.01, 60],  # a line
        [1, 1, 1.5, 1.5],  # less than a cell
        [-30, -20, 20, 30],  # over the corner
        [70, 50, 300, 200],  # over the other corner
        [400, 400, 500, 500],  # outside
        [-200, -100, 300, 200],  # around the map
    ]
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_roi_align_equals_scalar_loops(size, sampling_ratio, aligned):
    features = np.random.default_rng(0).standard_normal((3, 8, 12), dtype=np.float32)
    found = roi_align(features, ROIS, 8, size, sampling_ratio, aligned)
    assert found.shape == (len(ROIS), 3, size, size)
    assert found.dtype == np.float32
    for roi, result in zip(ROIS, found):
        expected = roi_align_by_scalars(features.astype(float), roi, 8, size, sampling_ratio, aligned)
        np.testing.assert_allclose(result, expected, atol=1e-5)


@given(
    SEEDS,
    st.sampled_from([0, 1, 2, 60]),
    st.sampled_from([0, 2]),
    st.booleans(),
    st.sampled_from([1, 7, 14]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([4, 16]),
)
@settings(max_examples=80, deadline=None)
def test_roi_align_equals_mmcv(seed, count, sampling_ratio, aligned, size, height, width, stride):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((5, height, width), dtype=np.float32)
    rois = random_boxes(rng, count, width * stride * 1.3, height * stride * 1.3) - np.float32(0.1 * stride * width)
    expected = mmcv.ops.roi_align(
        torch.from_numpy(features)[None],
        torch.from_numpy(np.insert(rois, 0, 0, axis=1)),
        (size, size),
        1 / stride,
        sampling_ratio,
        "avg",
        aligned,
    ).numpy()
    found = roi_align(features, rois, stride, size, sampling_ratio, aligned)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_equals_the_onnx_operator(sampling_ratio):
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
        coordinate_transformation_mode="half_pixel",
    )
    np.testing.assert_allclose(roi_align(features, rois, 8, 7, sampling_ratio), expected, atol=1e-5)


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
    found = align_levels(features, rois, levels, [4, 8, 16, 32], 7, 0, True)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert align_levels(features, rois[:0], levels[:0], [4, 8, 16, 32], 7, 0, True).shape == (0, 8, 7, 7)


# ------------------------------------------------------------------ the RPN's and the head's end


def rpn_maps(rng, image_size, strides):
    """Return logits, all different, and deltas such as an RPN gives, and its anchors' parameters."""
    sizes = [(-(-image_size[0] // s), -(-image_size[1] // s)) for s in strides]
    count = sum(3 * h * w for h, w in sizes)
    logits = np.split(
        rng.permutation(np.linspace(-9, 6, count, dtype=np.float32)), np.cumsum([3 * h * w for h, w in sizes])[:-1]
    )
    cls = [part.reshape(3, h, w) for part, (h, w) in zip(logits, sizes)]
    return cls, [rng.normal(0, 0.3, (12, h, w)).astype(np.float32) for h, w in sizes]


@pytest.mark.parametrize(
    ("nms_pre", "max_per_img", "min_bbox_size", "iou_threshold"),
    [(1000, 1000, 0, 0.7), (300, 2000, 25, 0.5), (2000, 50, -1, 0.7), (-1, 1000, 0, 0.7)],
)
def test_proposals_equal_mmdetection(nms_pre, max_per_img, min_bbox_size, iou_threshold):
    strides, image_size = [4, 8, 16, 32, 64], (256, 350)
    test_cfg = {
        "nms_pre": nms_pre,
        "max_per_img": max_per_img,
        "min_bbox_size": min_bbox_size,
        "nms": {"type": "nms", "iou_threshold": iou_threshold},
    }
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
                "strides": strides,
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4},
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
        }
    )
    head.test_cfg = mmcv.ConfigDict(test_cfg)
    cls, reg = rpn_maps(np.random.default_rng(0), image_size, strides)
    expected = head.get_bboxes(
        [torch.from_numpy(x)[None] for x in cls],
        [torch.from_numpy(x)[None] for x in reg],
        img_metas=[{"img_shape": (*image_size, 3)}],
    )[0].numpy()
    base = [base_anchors(stride, [4], [0.5, 1.0, 2.0]) for stride in strides]
    boxes, scores = propose(
        cls, reg, base, strides, image_size, [0.0] * 4, [1.0] * 4, nms_pre, iou_threshold, max_per_img, min_bbox_size
    )
    assert len(boxes) > 40
    np.testing.assert_allclose(boxes, expected[:, :4], atol=1e-3)
    np.testing.assert_allclose(scores, expected[:, 4], atol=1e-6)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("score_threshold", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("rois", [1, 400])
@pytest.mark.parametrize(
    ("nms_cfg", "extra"),
    [
        ({"type": "nms"}, {}),
        ({"type": "nms", "class_agnostic": True}, {"nms_class_agnostic": True}),
        ({"type": "soft_nms"}, {"soft_min_score": 1e-3}),
        ({"type": "soft_nms", "class_agnostic": True, "min_score": 0.04},
         {"soft_min_score": 0.04, "nms_class_agnostic": True}),
    ],
)  # fmt: skip
def test_detections_equal_mmdetection(nms_cfg, extra, rois, score_threshold, class_agnostic):
    rng = np.random.default_rng(0)
    proposals, classes, stds = random_boxes(rng, rois, clusters=20), 12, [0.1, 0.1, 0.2, 0.2]
    cls = rng.normal(0, 3, (rois, classes + 1)).astype(np.float32)
    reg = rng.normal(0, 1, (rois, 4 if class_agnostic else 4 * classes)).astype(np.float32)
    image_size, scale_factor = (480, 640), np.float32([1.37, 1.41, 1.37, 1.41])

    boxes = DeltaXYWHBBoxCoder([0.0] * 4, stds).decode(
        torch.from_numpy(proposals), torch.from_numpy(reg), max_shape=image_size
    )
    boxes = boxes / torch.from_numpy(scale_factor).repeat(reg.shape[1] // 4)
    expected, expected_labels = multiclass_nms(
        boxes, torch.softmax(torch.from_numpy(cls), 1), score_threshold, {**nms_cfg, "iou_threshold": 0.5}, 100
    )
    settings = (image_size, scale_factor, [0.0] * 4, stds, class_agnostic, score_threshold, 0.5, 100)
    found = detect(cls, reg, proposals, *settings, **extra)
    if rois == 400:
        assert len(found[0]) >= 5
    np.testing.assert_allclose(found[0], expected[:, :4].numpy(), atol=1e-3)
    np.testing.assert_allclose(found[1], expected[:, 4].numpy(), atol=1e-6)
    np.testing.assert_array_equal(found[2], expected_labels.numpy())


def test_no_proposals_give_no_detections():
    """MMDetection leaves its head before this; the end of ours takes nothing and gives nothing."""
    rois, cls, reg = (np.zeros((0, width), np.float32) for width in (4, 13, 48))
    boxes, scores, labels = detect(cls, reg, rois, (480, 640), [1] * 4, [0] * 4, [1] * 4, False, 0.05, 0.5, 100)
    assert boxes.shape == (0, 4)
    assert scores.shape == labels.shape == (0,)
