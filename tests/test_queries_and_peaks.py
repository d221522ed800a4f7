"""DETR's queries and CenterNet's peaks, without a framework but for the preprocessing."""

import numpy as np
import pytest
from conftest import MMDETECTION

from detectors.center_net import best_peaks, largest_around
from detectors.detr import answers
from detectors.preprocess import Picture, preprocess
from detectors.settings import Preprocess, Queries

HEAD = Queries(max_per_img=100)


def picture(scale=1.0, offset=(0, 0)):
    """Return a Picture of 200 x 100 pixels that was resized by `scale`, in an input of 256 x 128."""
    return Picture(np.zeros((1, 3, 128, 256), np.float32), (100, 200), np.float32([scale] * 4), (50, 100), offset)


def test_a_query_answers_with_its_best_class_and_a_box_in_parts_of_the_picture():
    cls = np.float32([[1, 3, 9], [0, 2, 2], [5, 0, 0]])  # the last one is no object
    reg = np.float32([[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4], [0.25, 0.5, 0.5, 1]])
    found = answers(cls, reg, picture(scale=2), HEAD)
    e = np.exp
    np.testing.assert_allclose(
        found.scores, [e(5) / (e(5) + 2), e(2) / (1 + 2 * e(2)), e(3) / (e(1) + e(3) + e(9))], rtol=1e-5
    )
    np.testing.assert_array_equal(found.labels, [0, 1, 1])
    expected = np.float32([[0, 0, 100, 100], [0, 70, 60, 100], [80, 30, 120, 70]]) / 2  # the second one is clipped
    np.testing.assert_allclose(found.boxes, expected, atol=1e-4)
    assert len(answers(cls, reg, picture(), Queries(max_per_img=2)).boxes) == 2
    assert len(answers(cls, reg, picture(), Queries(max_per_img=3, score_threshold=0.4)).boxes) == 2


def test_only_the_highest_of_neighbours_is_a_peak():
    heatmap = np.full((2, 32, 64), 0.01, np.float32)  # a cell is 4 pixels
    heatmap[1, 10, 20], heatmap[1, 11, 21], heatmap[0, 11, 21] = 0.9, 0.8, 0.7  # another class has peaks of its own
    heatmap[0, 0, 0] = 0.6
    size, offset = np.zeros((2, 32, 64), np.float32), np.zeros((2, 32, 64), np.float32)
    size[:, 10, 20], offset[:, 10, 20] = (6, 2), (0.5, 0.25)
    settings = Queries(max_per_img=100, score_threshold=0.1)
    found = best_peaks(heatmap, size, offset, picture(scale=2, offset=(12, 8)), settings)
    np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.6])
    np.testing.assert_array_equal(found.labels, [1, 0, 0])
    box = np.array([(20.5 - 3) * 4 - 12, (10.25 - 1) * 4 - 8, (20.5 + 3) * 4 - 12, (10.25 + 1) * 4 - 8]) / 2
    np.testing.assert_allclose(found.boxes[0], box)
    assert len(best_peaks(heatmap, size, offset, picture(), Queries(max_per_img=2)).boxes) == 2


def test_the_largest_around_is_that_of_a_search_one_by_one():
    heatmap = np.random.default_rng(0).random((3, 7, 9)).astype(np.float32)
    expected = [[[level[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max() for x in range(9)] for y in range(7)]
                for level in heatmap]  # fmt: skip
    np.testing.assert_array_equal(largest_around(heatmap), expected)


def test_pictures_in_the_middle_of_black_are_bit_equal(photographs):
    pytest.importorskip("mmdet", reason=MMDETECTION)
    from mmdet.datasets.pipelines import Compose

    norm = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
    pad = {"to_rgb": True, "test_pad_mode": ["logical_or", 31], "test_pad_add_pix": 1, "test_mode": True}
    steps = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomCenterCropPad", "ratios": None, "border": None, "mean": [0] * 3, "std": [1] * 3, **pad},
        {"type": "RandomFlip"},
        {"type": "Normalize", **norm},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": ["img"], "meta_keys": ("border", "scale_factor")},
    ]
    augmentation = {"type": "MultiScaleFlipAug", "scale_factor": 1.0, "flip": False, "transforms": steps}
    pipeline = Compose([{"type": "LoadImageFromWebcam", "to_float32": True}, augmentation])
    settings = Preprocess(scale=None, pad_divisor=1, canvas=31, **norm)
    odd = [np.ascontiguousarray(photographs["cat"][:37, :301]), np.ascontiguousarray(photographs["cat"][:64, :95])]
    for image in [*photographs.values(), *odd]:
        expected = pipeline({"img": image})
        blob, _, scale_factor, original_size, offset = preprocess(image, settings)
        np.testing.assert_array_equal(blob[0], expected["img"][0].data.numpy())
        meta = expected["img_metas"][0].data
        assert offset == (meta["border"][2], meta["border"][0])
        np.testing.assert_array_equal(scale_factor, np.ones(4))
        assert original_size == image.shape[:2]
