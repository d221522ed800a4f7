"""Every function of postprocess.py with torchvision's settings against torchvision's own, and its preprocessing."""

import numpy as np
import pytest
from boxes import HEAD, PROPOSALS, ROIS, assert_equal_detections, distinct_scores, random_boxes, rpn_maps
from conftest import TORCHVISION
from msgspec.structs import replace

from detectors import Detections
from detectors.preprocess import Picture, preprocess
from detectors.settings import Preprocess
from postprocess import (
    align_levels,
    assign_levels,
    batched_nms,
    decode_boxes,
    detect,
    large_enough,
    level_anchors,
    propose,
)

torch = pytest.importorskip("torch", reason=TORCHVISION)
pytest.importorskip("torchvision", reason=TORCHVISION)

from torchvision import ops  # noqa: E402
from torchvision.models.detection import _utils as detection_utils  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.roi_heads import RoIHeads  # noqa: E402
from torchvision.models.detection.rpn import RegionProposalNetwork  # noqa: E402
from torchvision.models.detection.transform import GeneralizedRCNNTransform  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = Preprocess(
    scale=(1333, 800), normalize_first=True, to_rgb=True, pad_divisor=32,
    mean=[255 * mean for mean in MEAN], std=[255 * std for std in STD],
)  # fmt: skip
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
ANCHORS = replace(PROPOSALS.anchors, base_sizes=SIZES, scales=(1,), ratios=RATIOS, rounded=True, strides_of_maps=True)
MINIMUM = float(np.nextafter(np.float32(1e-3), np.float32(0)))
RPN = replace(
    PROPOSALS, anchors=ANCHORS, shrinks_freely=True, rank_logits=True, min_bbox_size=MINIMUM, nms_moved_up_to=1000
)
BOX_HEAD = replace(
    HEAD, shrinks_freely=True, min_bbox_size=float(np.nextafter(np.float32(1e-2), np.float32(0))),
    nms_resized=True, nms_first_group=1, nms_moved_up_to=1000,
)  # fmt: skip


def as_torch(image):
    """Return an image [h, w, 3] uint8 BGR as torchvision's models take it: [3, h, w], red first, 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1).float() / 255


# ------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("seed", range(40))
def test_preprocessing_equals_torchvision(seed):
    """Forty sizes, half of them made smaller and half larger."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(30, 1500, 2)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = int(min(height, width) * (rng.uniform(0.2, 1) if seed % 2 else rng.uniform(1, 3)))
    long = int(short * rng.uniform(1, 2))
    expected, _ = GeneralizedRCNNTransform(short, long, MEAN, STD).eval()([as_torch(image)])
    found = preprocess(image, replace(PREPROCESS, scale=(long, short)))
    assert found.image_size == expected.image_sizes[0]
    assert found.blob.shape == tuple(expected.tensors.shape)
    np.testing.assert_allclose(found.blob, expected.tensors, rtol=0, atol=1e-6)
    ratios = [resized / side for resized, side in zip(found.image_size[::-1], (width, height))]
    np.testing.assert_array_equal(found.scale_factor, np.float32(ratios * 2))


def test_preprocessing_to_a_fixed_size_equals_torchvision(photographs):
    for image in photographs.values():
        transform = GeneralizedRCNNTransform(800, 1333, MEAN, STD, fixed_size=(300, 200)).eval()
        settings = replace(PREPROCESS, scale=(300, 200), keep_ratio=False)
        np.testing.assert_allclose(
            preprocess(image, settings).blob, transform([as_torch(image)])[0].tensors, rtol=0, atol=1e-6
        )


# ------------------------------------------------------------------ proposals


@pytest.mark.parametrize("input_size", [(800, 1088), (800, 1216), (96, 704), (32, 32)])
def test_anchors_equal_torchvision_bit_for_bit(input_size):
    """Also on levels whose maps were rounded up: 800 / 64 = 12.5, and 61 pixels between two cells."""
    sizes = [tuple(-(-side // stride) for side in input_size) for stride in ANCHORS.strides]
    generator = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * 5)
    maps = [torch.zeros(1, 1, *size) for size in sizes]
    expected = generator(ImageList(torch.zeros(1, 3, *input_size), [input_size]), maps)[0].numpy()
    found = [level_anchors(level, sizes, ANCHORS) for level in range(5)]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    for level, anchors in enumerate(found):
        some = np.arange(len(anchors))[::7]
        np.testing.assert_array_equal(level_anchors(level, sizes, ANCHORS, some), anchors[some])


def test_decoded_boxes_equal_torchvision():
    rng = np.random.default_rng(0)
    boxes, deltas = random_boxes(rng, 500), rng.normal(0, 3, (500, 4)).astype(np.float32)
    deltas[:, 2:] *= 3  # many shrink by more than a factor of 1000 / 16
    coder = detection_utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    expected = coder.decode(torch.from_numpy(deltas), [torch.from_numpy(boxes)])[:, 0].numpy()
    np.testing.assert_allclose(decode_boxes(boxes, deltas, RPN), expected, rtol=1e-5, atol=1e-3)
    assert (np.abs(decode_boxes(boxes, deltas, replace(RPN, shrinks_freely=False)) - expected) > 0.1).any()


@pytest.mark.parametrize("count", [1, 300, 999, 1000, 1001, 3000])
def test_batched_nms_equals_torchvision_index_for_index(count):
    """Up to 1000 boxes are moved apart, which rounds their coordinates; more are not."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        boxes, scores = random_boxes(rng, count, 1333, 800, max(count // 30, 1)), distinct_scores(rng, count)
        groups = rng.integers(0, 80, count)
        tensors = (torch.from_numpy(array) for array in (boxes, scores, groups + 1))
        found, _ = batched_nms(boxes, scores, groups, BOX_HEAD)
        np.testing.assert_array_equal(found, ops.batched_nms(*tensors, 0.5))


class Maps(torch.nn.Module):
    """A head that returns these maps, whatever the features."""

    def __init__(self, cls, reg):
        super().__init__()
        self.maps = [[torch.from_numpy(x)[None] for x in kind] for kind in (cls, reg)]

    def forward(self, features):
        """Return logits and deltas."""
        return self.maps


def pairs_near_the_threshold(rng, count, image_size):
    """Return boxes, each of them beside one of half its area, and rounding decides whether their IoU is above 0.5.

    Coordinates are multiples of 2^-12, with which all is exact until NMS moves the boxes.
    """
    height, width = image_size
    sizes = rng.integers(60 * 4096, 200 * 4096, (count, 2))
    corners = rng.integers(0, np.array([width, height]) * 4096 - sizes)
    halves = np.stack([sizes[:, 0] // 2 + rng.integers(-30, 31, count), sizes[:, 1]], axis=1)
    boxes = np.stack([np.c_[corners, corners + sizes], np.c_[corners, corners + halves]], axis=1).reshape(-1, 4)
    return (boxes / 4096).astype(np.float32)


def test_nms_equals_torchvision_where_rounding_decides():
    rng = np.random.default_rng(0)
    boxes, scores = pairs_near_the_threshold(rng, 450, (765, 1000)), distinct_scores(rng, 900)
    groups = np.repeat(rng.integers(0, 80, 450), 2)
    found = [batched_nms(boxes, scores, groups, settings)[0].tolist() for settings in (BOX_HEAD, HEAD)]
    tensors = (torch.from_numpy(array) for array in (boxes, scores, groups + 1))
    assert found[0] == ops.batched_nms(*tensors, 0.5).tolist()
    assert found[0] != found[1]  # MMDetection's numbers of the classes round differently


def region_proposal_network(cls, reg, **options):
    """Return torchvision's RegionProposalNetwork for these maps."""
    generator = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * 5)
    limits = {
        "pre_nms_top_n": {"testing": options.get("nms_pre", 1000)},
        "post_nms_top_n": {"testing": options.get("max_per_img", 1000)},
        "nms_thresh": options.get("iou_threshold", 0.7),
        "score_thresh": options.get("score_threshold", 0.0),
    }
    return RegionProposalNetwork(generator, Maps(cls, reg), 0.7, 0.3, 256, 0.5, **limits).eval()


def proposals(spread, **options):
    """Return our proposals and torchvision's for random maps, whose logits reach from -9 to 6 times `spread`."""
    image_size, padded = (765, 1000), (768, 1024)
    cls, reg = rpn_maps(np.random.default_rng(0), padded, ANCHORS.strides)
    cls, reg = [np.float32(spread) * logits for logits in cls], [2 * deltas for deltas in reg]
    images = ImageList(torch.zeros(1, 3, *padded), [image_size])
    maps = {str(level): torch.zeros(1, 1, *logits.shape[1:]) for level, logits in enumerate(cls)}
    with torch.no_grad():
        expected = region_proposal_network(cls, reg, **options)(images, maps)[0][0].numpy()
    return propose(cls, reg, image_size, replace(RPN, **options)), expected


@pytest.mark.parametrize(
    "options",
    [{}, {"nms_pre": 150, "max_per_img": 100}, {"iou_threshold": 0.5}, {"score_threshold": 0.95, "max_per_img": 5000}],
)
def test_proposals_equal_torchvision(options):
    found, expected = proposals(1, **options)
    assert len(expected) > 90
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_saturated_scores_are_ranked_by_their_logits():
    """Thousands of scores are 1; which of them are among the best 150 of a level, only their logits tell."""
    found, expected = proposals(12, nms_pre=150, max_per_img=1000)  # all that NMS keeps, in any order
    assert len(found) == len(expected) > 400
    order = [np.lexsort(boxes.round(1).T) for boxes in (found, expected)]
    np.testing.assert_allclose(found[order[0]], expected[order[1]], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("settings", "minimum"), [(RPN, 1e-3), (BOX_HEAD, 1e-2)])
def test_a_side_of_exactly_the_minimum_is_large_enough(settings, minimum):
    side, ones = np.float32(minimum), np.ones(3, np.float32)
    sides = np.stack([np.nextafter(side, ones[0]), side, np.nextafter(side, -ones[0])])
    for boxes in (np.stack([0 * ones, 0 * ones, sides, ones], 1), np.stack([0 * ones, 0 * ones, ones, sides], 1)):
        expected = ops.remove_small_boxes(torch.from_numpy(boxes), minimum)
        assert np.flatnonzero(large_enough(boxes, settings.min_bbox_size)).tolist() == expected.tolist() == [0, 1]


# ------------------------------------------------------------------ RoIs and detections


def test_levels_and_features_equal_torchvision():
    rng = np.random.default_rng(0)
    rois = np.concatenate([random_boxes(rng, 400, 1333, 800), [[0, 0, 112, 112], [0, 0, 448, 448], [5, 5, 5, 9]]])
    rois = rois.astype(np.float32)
    maps = [rng.normal(0, 1, (8, 800 // stride, 1344 // stride)).astype(np.float32) for stride in ROIS.strides]
    pool = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    tensors = {str(level): torch.from_numpy(feature)[None] for level, feature in enumerate(maps)}
    expected = pool(tensors, [torch.from_numpy(rois)], [(800, 1333)]).numpy()
    levels = assign_levels(rois, 4, 56)
    np.testing.assert_array_equal(levels, pool.map_levels([torch.from_numpy(rois)]))
    assert set(levels) == {0, 1, 2, 3}
    found = align_levels(maps, rois, levels, replace(ROIS, sampling_ratio=2, aligned=False))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def own_detections(cls, reg, rois, image_size, size, score_threshold=0.05):
    """Return what torchvision makes of the outputs of a head, the background first, for a picture of a size."""
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, score_threshold, 0.5, 100).eval()
    tensors = (torch.from_numpy(array) for array in (cls, reg))
    boxes, scores, labels = heads.postprocess_detections(*tensors, [torch.from_numpy(rois)], [image_size])
    transform = GeneralizedRCNNTransform(800, 1333, MEAN, STD).eval()
    boxes = transform.postprocess([{"boxes": boxes[0]}], [image_size], [size])[0]["boxes"]
    return Detections(boxes.numpy(), scores[0].numpy(), labels[0].numpy() - 1)


def test_detections_equal_torchvision_where_rounding_decides():
    """NMS sees the boxes in the resized picture, in which coordinates are exact."""
    rng, image_size, size = np.random.default_rng(0), (765, 1000), (480, 627)
    rois, labels = pairs_near_the_threshold(rng, 45, image_size), np.repeat(rng.integers(0, 80, 45), 2)
    cls = np.full((90, 81), -9, np.float32)
    cls[np.arange(90), labels + 1] = rng.permutation(np.linspace(0, 5, 90))
    reg = np.zeros((90, 324), np.float32)
    picture = Picture(None, image_size, np.float32([1000 / 627, 765 / 480] * 2), None)
    heads = BOX_HEAD, replace(BOX_HEAD, nms_resized=False)
    found = [detect(np.roll(cls, -1, axis=1), reg[:, 4:], rois, picture, head) for head in heads]
    assert_equal_detections(found[0], own_detections(cls, reg, rois, image_size, size), pixels=1e-3)
    assert len(found[0].boxes) != len(found[1].boxes)


@pytest.mark.parametrize("count", [40, 1000])  # hundreds of candidates, which NMS moves apart, and thousands
@pytest.mark.parametrize("score_threshold", [0.05, 0.3])
def test_detections_equal_torchvision(count, score_threshold):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rois, classes, image_size = random_boxes(rng, count, 1000, 765, count // 10), 12, (765, 1000)
        cls = rng.normal(0, 3, (count, classes + 1)).astype(np.float32)  # the background first
        reg = rng.normal(0, 1.5, (count, 4 * (classes + 1))).astype(np.float32)
        expected = own_detections(cls, reg, rois, image_size, (480, 627), score_threshold)
        picture = Picture(None, image_size, np.float32([1000 / 627, 765 / 480] * 2), None)
        settings = replace(BOX_HEAD, score_threshold=score_threshold)
        found = detect(np.roll(cls, -1, axis=1), reg[:, 4:], rois, picture, settings)
        assert len(expected.boxes) > 15
        assert_equal_detections(found, expected, pixels=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
