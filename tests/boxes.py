"""What the tests of postprocess.py share: boxes, scores and maps as networks give them, and a detector's settings."""

import os

import numpy as np
from conftest import TABLES
from hypothesis import strategies as st

from detectors.settings import Anchors, Head, Proposals, RoIs

SEEDS = st.integers(0, 2**32 - 1)
NO_MEANS, HEAD_STDS = (0.0, 0.0, 0.0, 0.0), (0.1, 0.1, 0.2, 0.2)

ANCHORS = Anchors(
    strides=(4, 8, 16, 32, 64), base_sizes=(4, 8, 16, 32, 64), scales=(4,), ratios=(0.5, 1, 2), center_offset=0
)
PROPOSALS = Proposals(
    anchors=ANCHORS, means=NO_MEANS, stds=(1.0, 1.0, 1.0, 1.0),
    nms_pre=1000, min_bbox_size=0, iou_threshold=0.7, max_per_img=1000,
)  # fmt: skip
ROIS = RoIs(strides=(4, 8, 16, 32), finest_scale=56, output_size=7, sampling_ratio=0, aligned=True)
HEAD = Head(
    means=NO_MEANS, stds=HEAD_STDS, class_agnostic=False, score_threshold=0.05, iou_threshold=0.5, max_per_img=100
)

# RoIs over and around a map of 8 x 12 cells with a stride of 8.
EDGE_CASES = np.float32(
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


def rpn_maps(rng, image_size, strides):
    """Return the logits of every level, all different, and deltas as an RPN with three anchors a cell gives them."""
    sizes = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for stride in strides]
    ends = np.cumsum([3 * height * width for height, width in sizes])
    logits = np.split(rng.permutation(np.linspace(-9, 6, ends[-1], dtype=np.float32)), ends[:-1])
    cls = [part.reshape(3, height, width) for part, (height, width) in zip(logits, sizes)]
    return cls, [rng.normal(0, 0.3, (12, height, width)).astype(np.float32) for height, width in sizes]


def with_second_chance(compare, image):
    """Return compare(image); where that fails, compare its mirror image.

    PyTorch and ONNX Runtime add up in an order that depends on the processor. On some, that decides about a box, or
    makes an output of a seeded network differ by a little more than 1e-4. What is computed differently is different in
    every picture. The first failure is printed after the tests.
    """
    try:
        return compare(image)
    except AssertionError as error:
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        TABLES["Compared in a mirrored picture, because the first one failed"].append([test, str(error).split("\n")[0]])
        return compare(np.ascontiguousarray(image[:, ::-1]))


def assert_equal_detections(ours, reference, pixels=1e-2):
    """Check that every detection has its twin: same label, boxes within so many pixels, scores within 1e-4."""
    assert len(ours.boxes) == len(reference.boxes)
    unpaired = list(range(len(reference.boxes)))
    for box, score, label in zip(ours.boxes, ours.scores, ours.labels):
        twins = [
            i
            for i in unpaired
            if reference.labels[i] == label
            and np.abs(reference.boxes[i] - box).max() <= pixels
            and abs(reference.scores[i] - score) <= 1e-4
        ]
        assert twins, f"no twin for {label} {score} {box}"
        unpaired.remove(twins[0])
