"""Whether two detectors find the same objects."""

import copy

import numpy as np

from detectors import rle
from detectors.settings import changed

BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4  # boxes in pixels
MASK_IOU, MASK_PIXELS = 0.999, 3  # masks are equal at this IoU, or if no more pixels differ


def mask_iou(first, second):
    """Return the IoU of two masks [h, w] of a picture; 1 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def pair_detections(ours, reference):
    """Pair Detections one to one, each with the nearest of the same label that is left; return both, in this order."""
    left, pairs = np.ones(len(reference.boxes), bool), []
    for i, (box, label) in enumerate(zip(ours.boxes, ours.labels)):
        candidates = np.flatnonzero(left & (reference.labels == label))
        if len(candidates):
            twin = candidates[np.abs(reference.boxes[candidates] - box).max(axis=1).argmin()]
            left[twin] = False
            pairs.append((i, twin))
    chosen, twins = np.array(pairs, int).reshape(-1, 2).T
    return ours.where(chosen), reference.where(twins)


def largest_differences(first, second):
    """Return by how much paired Detections differ at most: boxes in pixels, and scores."""
    return [np.abs(getattr(first, field) - getattr(second, field)).max(initial=0) for field in ("boxes", "scores")]


def mask_overlap(first, second):
    """Return the IoU of two run-length encoded masks; 1 if they differ in MASK_PIXELS pixels or fewer."""
    first, second = rle.decode(first), rle.decode(second)
    if first.shape != second.shape:
        return 0.0
    return 1.0 if np.count_nonzero(first ^ second) <= MASK_PIXELS else mask_iou(first, second)


def any_score(detector):
    """Return the detector with a score threshold of 0: so it finds something in every picture."""
    detector = copy.copy(detector)
    detector.settings = changed(detector.settings, "head.score_threshold", 0.0)
    return detector


def verify_detections(title, ours, reference, other="the framework's own"):
    """Print a line for a detector's Detections against those of another one; return whether it is True."""
    first, second = pair_detections(ours, reference)
    box_difference, score_difference = largest_differences(first, second)
    equal = len(first.boxes) == len(ours.boxes) == len(reference.boxes)
    equal &= bool(box_difference <= BOX_TOLERANCE and score_difference <= SCORE_TOLERANCE)
    text = f"largest difference {box_difference:.1e} px, {score_difference:.1e} in score"
    if ours.masks is not None:
        overlap = min(map(mask_overlap, first.masks, second.masks), default=1.0)
        equal &= overlap >= MASK_IOU
        text += f", smallest IoU of masks {overlap:.4f}"
    counts = f"{len(ours.boxes)}, {other}: {len(reference.boxes)}, paired: {len(first.boxes)}"
    print(f"{title}: {counts}, {text}  {equal}")
    return equal
