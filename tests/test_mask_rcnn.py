"""Mask R-CNN after its networks: masks are pasted into the picture, and stay small in memory."""

import tracemalloc

import numpy as np
import pytest
from boxes import ROIS, random_boxes
from conftest import MMDETECTION

from detectors import rle
from detectors.mask_rcnn import paste, paste_all, placed
from detectors.preprocess import Picture
from detectors.settings import Masks

MASKS = Masks(rois=ROIS, threshold=0.5)
EDGES = np.float32(
    [
        [0, 0, 60, 40],  # the whole picture
        [-7.5, -3.2, 20, 11],  # over the corner
        [50, 30, 71, 55.5],  # over the other corner
        [10.2, 5.7, 10.4, 5.8],  # less than a pixel
        [20, 10, 20, 30],  # no width
        [5, 7, 5, 7],  # no area
        [5.5, 7.5, 5.5, 7.5],  # no area, in the middle of a pixel
        [3.25, 8.75, 43.5, 33.125],
    ]
)


def by_definition(cells, box, size):
    """Return a mask's cells [s, s] pasted into a picture of size (height, width), pixel by pixel.

    Half a cell beyond the box it fades to zero, but farther than a pixel from the box nothing is pasted.
    """
    s, (x1, y1, x2, y2) = len(cells), np.float64(box)
    pasted = np.zeros(size)
    near = np.zeros(size, bool)
    first, last = np.maximum(np.floor([y1, x1]) - 1, 0).astype(int), np.ceil([y2, x2]).astype(int) + 1
    near[first[0] : last[0], first[1] : last[1]] = True
    for row, column in np.argwhere(near):
        y, x = (row + 0.5 - y1) / (y2 - y1) * s - 0.5, (column + 0.5 - x1) / (x2 - x1) * s - 0.5
        for i, j in np.ndindex(s, s):
            pasted[row, column] += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * cells[i, j]
    return pasted


@pytest.mark.parametrize("box", EDGES[[0, 1, 2, 3, 7]])
def test_pasting_by_definition(box):
    cells = np.random.default_rng(0).random((4, 4), np.float32)
    part, top, left = paste(cells, box, (40, 60))
    whole = np.zeros((40, 60))
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    np.testing.assert_allclose(whole, by_definition(cells, box, (40, 60)), atol=1e-5)


def test_a_pixel_on_the_threshold_is_in_the_mask():
    picture = Picture(None, None, [1] * 4, (6, 6))
    cells = np.full((1, 2, 2), 0.25, np.float32)
    for threshold, pixels in ((0.25, 4), (0.26, 0)):
        masks = Masks(rois=ROIS, threshold=threshold)
        (mask,) = paste_all(cells, np.float32([[2, 2, 4, 4]]), picture, masks)
        assert rle.decode(mask).sum() == pixels


@pytest.mark.parametrize("box", EDGES)
def test_every_box_gives_numbers(box):
    part, _, _ = paste(np.random.default_rng(0).random((4, 4), np.float32), box, (40, 60))
    assert np.isfinite(part).all()


def test_boxes_are_rounded_twice():
    """As in MMDetection, which scales boxes to the resized picture for the mask head, and back for pasting."""
    boxes, factor = random_boxes(np.random.default_rng(0), 500), np.float32([1.37, 1.41, 1.37, 1.41])
    cells = np.zeros((500, 28, 28), np.float32)
    twice = placed(cells, boxes, factor, MASKS)[1]
    np.testing.assert_array_equal(twice, boxes * factor / factor)
    assert (twice != boxes).any()


def test_no_detections():
    masks = paste_all(
        np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), Picture(None, None, [1] * 4, (9, 9)), MASKS
    )
    assert masks.shape == (0,)


def test_a_hundred_masks_of_a_large_picture_stay_small():
    """As arrays they would take 1.2 GB, as float32 before the threshold four times as much."""
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 100, 4000, 3000) * np.float32([1, 1, 1, 1])
    boxes[:5] = [0, 0, 4000, 3000]
    scores = np.float32(rng.random((100, 28, 28)) > 0.5)
    tracemalloc.start()
    masks = paste_all(scores, boxes, Picture(None, None, [1] * 4, (3000, 4000)), MASKS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6
    assert sum(len(mask["counts"]) for mask in masks) < 5e6


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_no_pixel_differs_from_mmdetection(class_agnostic):
    """Given the same logits and boxes; the boxes are scaled and scaled back, which rounds them."""
    torch = pytest.importorskip("torch", reason=MMDETECTION)
    heads = pytest.importorskip("mmdet.models.roi_heads.mask_heads", reason=MMDETECTION)
    from mmcv import Config

    head = heads.FCNMaskHead(num_convs=0, in_channels=4, conv_out_channels=4, class_agnostic=class_agnostic)
    head.num_classes = 3
    for seed, (height, width) in enumerate([(40, 60), (396, 593), (480, 640)]):
        rng = np.random.default_rng(seed)
        factor = np.float32([1.37, 1.41, 1.37, 1.41])
        boxes = np.concatenate([EDGES, random_boxes(rng, 60, width, height)])
        labels = rng.integers(0, 3, len(boxes))
        logits = rng.normal(0, 2, (len(boxes), 1 if class_agnostic else 3, 28, 28)).astype(np.float32)
        expected = head.get_seg_masks(
            torch.from_numpy(logits), torch.from_numpy(boxes * factor), torch.from_numpy(labels),
            Config({"mask_thr_binary": 0.5}), (height, width, 3), factor, rescale=True,
        )  # fmt: skip
        channel = np.zeros_like(labels) if class_agnostic else labels
        scores = torch.from_numpy(logits[np.arange(len(boxes)), channel]).sigmoid().numpy()
        masks = paste_all(scores, boxes, Picture(None, None, factor, (height, width)), MASKS)
        for label in range(3):
            for ours, theirs in zip(masks[labels == label], expected[label]):
                np.testing.assert_array_equal(rle.decode(ours), theirs)
