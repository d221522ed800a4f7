"""Whether two detectors find the same: what differs in one detection of many is seen."""

import numpy as np
import pytest

from compare import largest_differences, verify_detections
from detectors import Detections


def detections(boxes=0, scores=0, labels=0):
    """Return fifty Detections, of which the one in the middle has had something added."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 400, (50, 2))
    found = Detections(np.float32(np.hstack([corners, corners + 50])), np.linspace(1, 0.5, 50), np.arange(50) % 3)
    found.boxes[25, 3] += boxes
    found.scores[25] += scores
    found.labels[25] += labels
    return found


@pytest.mark.parametrize(
    ("change", "equal", "differences"),
    [
        ({}, True, (0, 0)),
        ({"boxes": 0.009}, True, (0.009, 0)),
        ({"boxes": 0.02}, False, (0.02, 0)),
        ({"boxes": -0.02}, False, (0.02, 0)),
        ({"scores": 9e-5}, True, (0, 9e-5)),
        ({"scores": -2e-4}, False, (0, 2e-4)),
    ],
    ids=str,
)
def test_one_of_many_differs(capsys, change, equal, differences):
    ours, reference = detections(**change), detections()
    assert largest_differences(ours, reference) == pytest.approx(differences, abs=1e-4 if "boxes" in change else 1e-9)
    assert verify_detections("detections", ours, reference) is equal
    assert capsys.readouterr().out.strip().endswith(str(equal))
    order = np.random.default_rng(1).permutation(50)
    assert verify_detections("in another order", ours.where(order), reference) is equal


def test_another_label_or_number_is_no_twin():
    assert not verify_detections("another label", detections(labels=1), detections())
    assert not verify_detections("one less", detections().where(np.arange(49)), detections())
    assert not verify_detections("one more", detections(), detections().where(np.arange(49)))
