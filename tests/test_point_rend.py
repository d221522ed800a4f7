"""PointRend's arrays against the operators of PyTorch and mmcv that they stand for."""

import numpy as np
import pytest
from boxes import EDGE_CASES, random_boxes
from conftest import MMDETECTION

from detectors.point_rend import cell_centers, enlarge, inside, most_uncertain, sample, sample_masks, surrounded

torch = pytest.importorskip("torch", reason=MMDETECTION)
ops = pytest.importorskip("mmcv.ops", reason=MMDETECTION)


def rng_masks(shape):
    """Return random masks of a shape."""
    return np.random.default_rng(0).normal(0, 2, shape).astype(np.float32)


def test_a_sample_at_the_centre_of_each_bin():
    """RoIs over the corners and outside, too: there, cells count as zero."""
    features = rng_masks((6, 8, 12))
    rois = np.concatenate([EDGE_CASES, random_boxes(np.random.default_rng(1), 50, 96, 64)])
    points = np.broadcast_to(cell_centers(np.arange(49), 7), (len(rois), 49, 2))
    ours = sample(surrounded(features), inside(rois, points), 8).transpose(0, 2, 1).reshape(-1, 6, 7, 7)
    with_image = torch.from_numpy(np.insert(rois, 0, 0, axis=1))
    expected = ops.SimpleRoIAlign(7, 1 / 8)(torch.from_numpy(features[None]), with_image)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_values_of_masks_at_points():
    masks, points = rng_masks((5, 3, 7, 7)), np.random.default_rng(1).random((5, 40, 2), np.float32)
    expected = ops.point_sample(torch.from_numpy(masks), torch.from_numpy(points)).transpose(1, 2)
    np.testing.assert_allclose(sample_masks(masks, points), expected, atol=2e-6)


@pytest.mark.parametrize("s", [1, 7, 28])
def test_twice_the_size(s):
    masks = rng_masks((4, s, s))
    expected = torch.nn.functional.interpolate(torch.from_numpy(masks[None]), scale_factor=2, mode="bilinear")[0]
    np.testing.assert_allclose(enlarge(masks), expected, atol=2e-6)


def test_the_points_nearest_to_the_outline():
    logits = rng_masks((3, 14, 14))
    chosen = most_uncertain(logits, 20)
    expected = (-torch.from_numpy(logits).abs()).flatten(1).topk(20)[1]
    np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))
    assert most_uncertain(logits, 1000).shape == (3, 196)
    np.testing.assert_allclose(
        cell_centers(np.array([0, 13, 195]), 14), np.float32([[0.5, 0.5], [13.5, 0.5], [13.5, 13.5]]) / 14
    )
