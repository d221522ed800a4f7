"""Cascade R-CNN between its stages."""

import numpy as np
import pytest
from boxes import HEAD_STDS, NO_MEANS, random_boxes
from conftest import MMDETECTION

from detectors.cascade_rcnn import refine
from detectors.settings import Refinement


def test_the_deltas_of_the_best_class_move_a_box():
    """The background, here the best of all, has no deltas; a tie goes to the first."""
    settings = Refinement(means=NO_MEANS, stds=(0.1, 0.1, 0.2, 0.2), class_agnostic=False)
    rois = np.float32([[0, 0, 10, 20], [10, 10, 30, 30]])
    cls = np.float32([[1, 3, 9], [2, 2, 0]])
    reg = np.zeros((2, 8), np.float32)
    reg[:, 0], reg[:, 4] = 5, -5  # class 0 moves by half a width to the right, class 1 to the left
    moved = refine(cls, reg, rois, (100, 100), settings)
    np.testing.assert_allclose(moved, [[0, 0, 5, 20], [20, 10, 40, 30]], atol=1e-6)  # the first one is clipped


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_refined_rois_are_those_of_mmdetection(class_agnostic):
    torch = pytest.importorskip("torch", reason=MMDETECTION)
    BBoxHead = pytest.importorskip("mmdet.models.roi_heads.bbox_heads", reason=MMDETECTION).BBoxHead  # noqa: N806
    coder = {"type": "DeltaXYWHBBoxCoder", "target_means": NO_MEANS, "target_stds": HEAD_STDS}
    head = BBoxHead(num_classes=7, reg_class_agnostic=class_agnostic, bbox_coder=coder)
    rng = np.random.default_rng(0)
    rois = random_boxes(rng, 500)
    cls = rng.normal(0, 2, (500, 8)).astype(np.float32)
    reg = rng.normal(0, 2, (500, 4 if class_agnostic else 28)).astype(np.float32)
    expected = head.regress_by_class(
        torch.from_numpy(rois), torch.from_numpy(cls[:, :-1].argmax(axis=1)), torch.from_numpy(reg),
        {"img_shape": (480, 640, 3)},
    )  # fmt: skip
    settings = Refinement(means=NO_MEANS, stds=HEAD_STDS, class_agnostic=class_agnostic)
    np.testing.assert_allclose(refine(cls, reg, rois, (480, 640), settings), expected, atol=1e-3, rtol=1e-6)
