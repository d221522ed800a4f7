"""One-stage detectors, without a framework: candidates, decoding, suppression, and a detector of a single layer."""

import itertools
import json
import re

import msgspec
import numpy as np
import onnx
import pytest
from boxes import NO_MEANS
from conftest import MMDETECTION, SHAPES
from onnx import TensorProto, helper, numpy_helper
from test_demo import assert_one_line, call_demo

import detectors
import evaluate
from detectors import Detections, ModelError, load
from detectors.fcos import FCOS
from detectors.one_stage import Candidates, best_candidates, suppress, values_of
from detectors.paa import PAA, vote
from detectors.preprocess import Picture
from detectors.retina_net import RetinaNet
from detectors.settings import (
    CellAnchors,
    CellPoints,
    Coder,
    Dense,
    FCOSSettings,
    PAASettings,
    Preprocess,
    RetinaNetSettings,
    TOODSettings,
    YOLOSettings,
    changed,
    write,
)
from detectors.tood import TOOD
from detectors.yolo import YOLO
from postprocess import sigmoid, softmax

HEAD = Dense(score_threshold=0.05, nms_pre=1000, iou_threshold=0.5, max_per_img=100)
PREPROCESS = Preprocess(scale=(128, 96), mean=(0, 0, 0), std=(255, 255, 255), to_rgb=True, pad_divisor=32)
SIZE = (100, 200)  # of a picture, height and width


def pointed(**values):
    """Return an FCOS with one level, of 8 pixels to a cell."""
    points = CellPoints(**{"strides": [8], "offset": 0.5, "units": [8], **values})
    return FCOS(FCOSSettings(classes=("a", "b"), preprocess=PREPROCESS, points=points, head=HEAD), {})


def anchored(family, settings, **values):
    """Return a detector with two levels of anchors: two in a cell, then one."""
    boxes = [[[-4, -4, 4, 4], [-8, -4, 8, 4]], [[0, 0, 16, 16]]]
    anchors = CellAnchors(strides=[8, 16], boxes=boxes)
    return family(settings(classes=("a", "b"), preprocess=PREPROCESS, anchors=anchors, head=HEAD, **values), {})


# ------------------------------------------------------------------ candidates


def test_priors_are_counted_by_row_column_and_prior_of_the_cell():
    logits = np.full((2 * 3, 4, 5), -9, np.float32)  # two priors, three classes
    logits[1 * 3 + 2, 3, 1] = 2
    prior, label, score = best_candidates(logits, None, 2, HEAD)
    np.testing.assert_array_equal([prior, label], [[(3 * 5 + 1) * 2 + 1], [2]])
    np.testing.assert_allclose(score, 1 / (1 + np.exp(-2)), rtol=1e-6)
    values = np.arange(2 * 4 * 4 * 5).reshape(8, 4, 5)
    np.testing.assert_array_equal(values_of(values, 2, prior), [[values[4 + i, 3, 1] for i in range(4)]])


def all_candidates(logits, factor, a, settings):
    """Return every candidate as [(what it is ranked by, its score, prior, label)], best first, one by one."""
    k, found = len(logits) // a, []
    for y, x, which in itertools.product(*map(range, (*logits.shape[1:], a))):
        own = logits[which * k : (which + 1) * k, y, x].astype(np.float64)
        scores = softmax(own)[:-1] if settings.softmax else sigmoid(own)
        certainty = 1 if factor is None else sigmoid(np.float64(factor[which, y, x]))
        for label, score in enumerate(scores):
            product = score * certainty
            ranked, final = {
                "last": (score, product), "product": (product, product), "root": (product**0.5, product**0.5),
            }[settings.combined]  # fmt: skip
            best = not settings.one_class or label == np.argmax(scores)
            if best and ranked > settings.score_threshold and certainty > settings.factor_threshold:
                found.append((ranked, final, (y * logits.shape[2] + x) * a + which, label))
    return sorted(found, reverse=True)[: settings.nms_pre if settings.nms_pre > 0 else None]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"nms_pre": -1},
        {"nms_pre": 7},
        {"score_threshold": 0},
        {"softmax": True},
        {"softmax": True, "nms_pre": 5},
        {"factor": "centerness"},
        {"factor": "centerness", "nms_pre": 9},  # the best by their scores alone
        {"factor": "objectness", "factor_threshold": 0.4, "nms_pre": -1},
        {"factor": "centerness", "combined": "root", "nms_pre": 9},
        {"factor": "iou", "combined": "root", "nms_pre": -1, "score_threshold": 0.3},
        {"factor": "iou", "combined": "root", "score_threshold": -1},
        {"factor": "objectness", "combined": "product", "one_class": True},
    ],
)
def test_candidates_are_those_of_a_search_one_by_one(values):
    settings, rng = msgspec.structs.replace(HEAD, **values), np.random.default_rng(0)
    a, k = 3, 4 + settings.softmax
    logits = rng.normal(-2, 2, (a * k, 5, 6)).astype(np.float32)
    factor = rng.normal(0, 2, (a, 5, 6)).astype(np.float32) if settings.factor else None
    expected = all_candidates(logits, factor, a, settings)
    prior, label, score = best_candidates(logits, factor, a, settings)
    assert len(expected) > 4
    np.testing.assert_array_equal(prior, [candidate[2] for candidate in expected])
    np.testing.assert_array_equal(label, [candidate[3] for candidate in expected])
    np.testing.assert_allclose(score, [candidate[1] for candidate in expected], rtol=1e-5)


def test_a_score_at_the_threshold_is_no_candidate():
    logits = np.zeros((1, 1, 2), np.float32)
    logits[0, 0, 1] = 1e-6
    settings = changed(HEAD, "score_threshold", 0.5)
    prior, _, _ = best_candidates(logits, None, 1, settings)
    np.testing.assert_array_equal(prior, [1])
    assert len(best_candidates(logits, None, 1, changed(HEAD, "score_threshold", 1.0))[0]) == 0


@pytest.mark.parametrize("threshold", [0.001, 0.999, 0.999999])
def test_rounding_near_the_threshold_loses_no_candidate(threshold):
    """Near 1, a float32 has the same score for many logits."""
    middle = np.log(threshold / (1 - threshold))
    logits = np.linspace(middle - 0.5, middle + 0.5, 4001, dtype=np.float32).reshape(1, 1, -1)
    settings = msgspec.structs.replace(HEAD, score_threshold=threshold, nms_pre=-1)
    prior, _, _ = best_candidates(logits, None, 1, settings)
    expected = np.flatnonzero(sigmoid(logits.ravel()) > threshold)
    assert 0 < len(expected) < 4001
    np.testing.assert_array_equal(np.sort(prior), expected)


def test_of_equally_good_classes_the_first_is_the_best():
    logits = np.float32([1, 3, 3, 2]).reshape(4, 1, 1)
    settings = msgspec.structs.replace(HEAD, one_class=True)
    np.testing.assert_array_equal(best_candidates(logits, None, 1, settings)[1], [1])


def test_paa_chooses_all_classes_of_its_best_priors():
    logits = np.float32([[0, 1, -9, 3], [0.5, -9, -9, 2.9], [-9, 2, -9, -9]]).reshape(3, 1, 4)  # classes, cells
    coder, changes = Coder(means=NO_MEANS, stds=(1, 1, 1, 1)), {"factor": "iou", "combined": "root"}
    detector = anchored(PAA, PAASettings, deltas=coder)
    for limit, expected in ((2, {(3, 0), (3, 1), (1, 0), (1, 2)}), (1, {(3, 0), (3, 1)}), (-1, None)):
        head = msgspec.structs.replace(HEAD, nms_pre=limit, **changes)
        detector.settings = msgspec.structs.replace(detector.settings, head=head)
        prior, label, score = detector.choose(logits, np.zeros((1, 1, 4), np.float32), 1)
        assert set(zip(prior, label)) == (expected or {(3, 0), (3, 1), (1, 0), (1, 2), (0, 0), (0, 1)})
        np.testing.assert_allclose(score, np.sqrt(sigmoid(logits[label, 0, prior]) / 2), rtol=1e-6)


def test_candidates_vote_on_the_box_of_a_detection():
    """The weights by hand: scores times exp(-(1 - IoU)^2 / 0.025); other classes and those far away have no vote."""
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 12], [40, 40, 50, 50], [0, 0, 10, 10], [9.9, 0, 20, 10]])
    scores, labels = np.float32([0.9, 0.6, 0.8, 0.7, 0.5]), np.array([0, 0, 0, 1, 0])
    voted = vote(Detections(boxes[:1], scores[:1], labels[:1]), boxes, scores, labels)
    weights = np.array([0.9, 0.6 * np.exp(-((1 - 10 / 12) ** 2) / 0.025)])  # the last one's IoU is below 0.01
    np.testing.assert_allclose(voted.boxes, [weights @ boxes[:2] / weights.sum()], rtol=1e-6)
    np.testing.assert_array_equal(voted.scores, scores[:1])
    flat = np.float32([[10, 0, 10, 5]])  # without area, no IoU: what was clipped away at the border
    np.testing.assert_array_equal(vote(Detections(flat, scores[:1], labels[:1]), flat, scores[:1], labels[:1])[0], flat)


# ------------------------------------------------------------------ decoding


def decoded(detector, level, priors, values, sizes=((12, 25), (6, 12))):
    """Return the boxes that a detector makes of values [n, v] of priors [n] of a level; elsewhere is something else."""
    levels = []
    for a, (height, width) in zip(detector.priors(detector.settings), sizes):
        channels = detector.kinds(detector.settings)
        levels.append({kind: np.full((a * c, height, width), 9, np.float32) for kind, c in channels.items()})
    a = detector.priors(detector.settings)[level]
    for prior, row in zip(priors, np.float32(values)):
        (y, x), which = divmod(prior // a, sizes[level][1]), prior % a
        levels[level]["reg"].reshape(a, -1, *sizes[level])[which, :, y, x] = row
    return detector.decode(level, levels, np.array(priors), SIZE)


def test_anchors_stand_at_their_cells_and_are_moved_by_their_deltas():
    detector = anchored(RetinaNet, RetinaNetSettings, deltas=Coder(means=NO_MEANS, stds=(0.1, 0.1, 0.2, 0.2)))
    deltas = [[0, 0, 0, 0], [5, -10, 5 * np.log(2), 0]]
    priors = [0, (2 * 25 + 3) * 2 + 1]  # the second one is 16 x 8, in row 2, column 3
    boxes = decoded(detector, 0, priors, deltas)
    np.testing.assert_allclose(boxes, [[0, 0, 4, 4], [16, 4, 48, 12]], atol=1e-5)  # the first one is clipped
    boxes = decoded(detector, 1, [13], deltas[:1])
    np.testing.assert_allclose(boxes, [[16, 16, 32, 32]])
    assert detector.priors(detector.settings) == [2, 1]


def test_a_centre_moves_no_further_than_it_may():
    coder = Coder(means=NO_MEANS, stds=(1, 1, 1, 1), shrinks_freely=True)
    detector = anchored(RetinaNet, RetinaNetSettings, deltas=coder, max_shift=6)
    deltas = [[5, -5, 0, 0], [0.5, 0.25, 0, 0]]  # of anchors of 16 x 16 in row 2, columns 2 and 3
    boxes = decoded(detector, 1, [26, 27], deltas)
    np.testing.assert_allclose(boxes, [[38, 26, 54, 42], [54, 36, 70, 52]], atol=1e-5)
    coder = Coder(means=(0.25, 0, 0, 0), stds=(0.5, 0.1, 1, 1), shrinks_freely=True)
    detector = anchored(RetinaNet, RetinaNetSettings, deltas=coder, max_shift=6)
    boxes = decoded(detector, 1, [26, 27], [[-5, 1, 0, 0], [0, 9, 0, 0]])  # -36 and 1.6, 4 and 14.4 pixels
    np.testing.assert_allclose(boxes, [[26, 33.6, 42, 49.6], [52, 38, 68, 54]], atol=1e-5)


def test_four_distances_from_a_point():
    distances = [[1, 2, 3, 0.5], [10, 10, 30, 30]]
    boxes = decoded(pointed(), 0, [2 * 25 + 3, 0], distances)  # points 28, 20 and 4, 4
    np.testing.assert_allclose(boxes, [[20, 4, 52, 24], [0, 0, 200, 100]])


@pytest.mark.parametrize(
    ("values", "distances", "box"),
    [
        ({"offset": 0}, [1, 1, 1, 1], [16, 8, 32, 24]),
        ({"units": [10]}, [1, 1, 1, 1], [18, 10, 38, 30]),
        ({"exponential": True, "units": [1]}, np.log([3, 4, 5, 6]), [25, 16, 33, 26]),
        ({"last_pixel": True}, [9, 9, 90, 90], [0, 0, 199, 99]),
    ],
)
def test_distances_of_other_kinds(values, distances, box):
    boxes = decoded(pointed(**values), 0, [53], [distances])
    np.testing.assert_allclose(boxes, [box], rtol=1e-5)


def test_a_distance_is_the_mean_of_its_distribution():
    detector, logits = pointed(bins=5), np.zeros((1, 4, 5), np.float32)  # without a preference: 2, the middle of 0 .. 4
    logits[0, 1, 1] = 100  # sure that it is 1
    logits[0, 2, [0, 1]] = 100  # 0 or 1
    boxes = decoded(detector, 0, [53], logits.reshape(1, 20))
    np.testing.assert_allclose(boxes, [[28 - 16, 20 - 8, 28 + 4, 20 + 16]], atol=1e-4)


def test_points_are_as_far_apart_as_their_maps_tell():
    settings = {"strides": [8, 128], "units": [8, 128], "offset": 0, "strides_of_maps": True}
    detector = pointed(**settings)  # an input of 800 x 200: a map of 7 x 2 cells, which 128 does not divide
    boxes = decoded(detector, 1, [3 * 2 + 1], [[0, 0, 0.25, 0.5]], sizes=[(100, 25), (7, 2)])
    np.testing.assert_allclose(boxes, [[100, 100, 132, 100]])  # 3 x 114 is below the picture, which ends at 100
    boxes = decoded(detector, 1, [0], [[0, 0, 0.25, 0.5]], sizes=[(100, 25), (7, 2)])
    np.testing.assert_allclose(boxes, [[0, 0, 32, 64]])


@pytest.mark.parametrize("middle", [0, 0.5])  # of a cell, where its point is
def test_tood_reads_each_side_where_its_offsets_point(middle):
    points = CellPoints(strides=[4, 8], offset=middle, units=[4, 8])
    detector = TOOD(TOODSettings(classes=("a",), preprocess=PREPROCESS, points=points, head=HEAD), {})
    rng = np.random.default_rng(3)
    reg = rng.uniform(0.5, 1, (4, 5, 6)).astype(np.float32)
    offset = np.zeros((8, 5, 6), np.float32)
    y, x = 2, 3
    offset[:, y, x] = [0.5, 0, 0, 1.25, -1, -1, 9, 0]  # y, x of each side: left, upper, right, lower
    maps = [{"cls": np.zeros((1, 5, 6)), "reg": reg, "offset": offset}] * 2
    left = x + middle - reg[0, 2:4, x].mean()  # half a row further down
    upper = y + middle - (0.75 * reg[1, y, x + 1] + 0.25 * reg[1, y, x + 2])
    right, lower = x - 1 + middle + reg[2, y - 1, x - 1], 0  # outside the map there is nothing
    assert left < right
    assert upper > lower  # so the cell's own sides count
    own = np.array([x - reg[0, y, x], y - reg[1, y, x], x + reg[2, y, x], y + reg[3, y, x]]) + middle
    np.testing.assert_allclose(detector.decode(1, maps, np.array([y * 6 + x]), SIZE), [8 * own], rtol=1e-5)
    offset[6, y, x] = 1  # now the lower side is where it should be
    expected = np.array([left, upper, right, y + 1 + middle + reg[3, y + 1, x]])
    np.testing.assert_allclose(detector.decode(1, maps, np.array([y * 6 + x]), SIZE), [8 * expected], rtol=1e-5)


def test_yolo_moves_a_box_within_its_cell_or_by_strides():
    priors = [(2 * 25 + 3) * 2 + 1]  # an anchor of 16 x 8 around 24, 16
    values = [[0, np.log(3), np.log(2), np.log(30)]]  # sigmoids of 1/2 and 3/4
    boxes = decoded(anchored(YOLO, YOLOSettings, within_cell=True), 0, priors, values)
    np.testing.assert_allclose(boxes, [[8, 18 - 120, 40, 18 + 120]], rtol=1e-5)  # it may leave the picture
    boxes = decoded(anchored(YOLO, YOLOSettings, within_cell=False), 0, priors, [[0.5, -1, 0, 0]])
    np.testing.assert_allclose(boxes, [[20, 4, 36, 12]])


@pytest.mark.filterwarnings("error")
def test_sizes_that_overflow():
    """Boxes of points are clipped; those of YOLO may leave the picture, and would be infinite."""
    boxes = decoded(pointed(exponential=True), 0, [3 * 25 + 2], [[100, 0, 0, 100]])
    np.testing.assert_allclose(boxes, [[0, 20, 28, 100]])
    with pytest.raises(ModelError, match="infinitely large"):
        decoded(anchored(YOLO, YOLOSettings, within_cell=False), 0, [7], [[0, 0, 100, 0]])


# ------------------------------------------------------------------ suppression


def suppressed(boxes, scores, labels, scale, settings):
    """Return what suppress keeps of boxes in a picture that was resized by `scale`."""
    n, scale = len(boxes), np.float32([scale] * 4)
    picture = Picture(np.zeros((1, 3, 1, 1), np.float32), SIZE, scale, (1, 1))
    candidates = np.float32(boxes), np.float32(scores), np.array(labels), np.arange(n), np.zeros(n, int)
    return suppress(Candidates(*candidates), picture, settings)


def test_the_best_box_of_each_class_stays():
    boxes = [[0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 9], [50, 50, 60, 60]]
    found = suppressed(boxes, [0.5, 0.9, 0.8, 0.1], [0, 0, 1, 0], 2, HEAD)
    np.testing.assert_allclose(found.boxes, np.float32(boxes)[[1, 2, 3]] / 2)
    np.testing.assert_allclose(found.scores, [0.9, 0.8, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(found.labels, [0, 1, 0])
    assert len(suppressed(boxes, [0.5, 0.9, 0.8, 0.1], [0, 0, 1, 0], 2, changed(HEAD, "max_per_img", 2)).boxes) == 2
    everything = suppressed(boxes * 50, [0.5] * 200, range(200), 2, changed(HEAD, "max_per_img", None))
    assert len(everything.boxes) == 200


def test_each_class_has_its_own_limit():
    boxes = [[10 * i, 0, 10 * i + 5, 5] for i in range(6)]
    scores, labels = [0.5, 0.9, 0.8, 0.1, 0.7, 0.6], [0, 0, 0, 1, 1, 2]
    found = suppressed(boxes, scores, labels, 1, changed(HEAD, "nms_pre_per_class", 2))
    np.testing.assert_allclose(found.boxes, np.float32(boxes)[[1, 2, 4, 5, 3]])
    found = suppressed(np.zeros((0, 4)), [], np.zeros(0, int), 1, changed(HEAD, "nms_pre_per_class", 2))
    assert len(found.boxes) == 0


def test_boxes_are_rescaled_before_nms():
    """Scaling leaves an IoU as it is, but for rounding; MMDetection compares boxes of the picture as it came in."""
    boxes = np.float32([[3, 3, 7, 9], [3, 3, 7, 6]])  # an IoU of 1/2, which is not above the threshold
    counts = set()
    for scale in np.linspace(0.3, 3, 200, dtype=np.float32):
        x1, y1, x2, y2 = (boxes / scale).T
        area = (x2 - x1) * (y2 - y1)
        over = area[1] / (area[0] + area[1] - area[1]) > np.float32(0.5)
        counts.add(bool(over))
        assert len(suppressed(boxes, [0.9, 0.8], [0, 0], scale, HEAD).boxes) == (1 if over else 2)
        resized = changed(HEAD, "nms_resized", True)
        assert len(suppressed(boxes, [0.9, 0.8], [0, 0], scale, resized).boxes) == 2
    assert counts == {True, False}


# ------------------------------------------------------------------ a whole detector


def write_model(path, settings, outputs):
    """Write a network of one convolution for each output, {name: channels}, of as many pixels a cell as its stride."""
    rng, weights, nodes = np.random.default_rng(1), [], []
    for name, channels in outputs.items():
        size = [8 * 2 ** int(name[-1])] * 2
        kernel = rng.normal(0, 2.4 / size[0], (channels, 3, *size)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel - kernel.mean(axis=(1, 2, 3), keepdims=True), f"w_{name}"))
        nodes.append(helper.make_node("Conv", ["image", f"w_{name}"], [name], kernel_shape=size, strides=size))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, f"h{name}", f"w{name}"])
              for name, channels in outputs.items()]  # fmt: skip
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])
    model = helper.make_model(
        helper.make_graph(nodes, "one layer", [image], values, weights),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    helper.set_model_props(model, {"detector": write(changed(settings, "networks", ("model.onnx",)))})
    onnx.save(model, str(path))


@pytest.fixture
def one_layer(tmp_path):
    """Return the folder of a detector of one layer, and its settings."""
    settings = changed(pointed().settings, "head.factor", "centerness")
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model" / "model.onnx", settings, {"cls_0": 2, "reg_0": 4, "centerness_0": 1})
    return tmp_path / "model", settings


def test_a_detector_of_one_network(one_layer, photographs):
    folder, settings = one_layer
    stages = {}
    found = load(folder)(photographs["cat"], lambda stage, **arrays: stages.update({stage: arrays}))
    assert list(stages) == ["preprocess", "model", "detect"]
    assert 5 < len(found.boxes) <= 100
    maps, detect = stages["model"], stages["detect"]
    cls, reg, centerness = (maps[name][0] for name in ("cls_0", "reg_0", "centerness_0"))
    y, x = divmod(int(detect["priors"][0]), cls.shape[2])  # of the first candidate, all by hand
    left, top, right, bottom = reg[:, y, x] * 8
    height, width = stages["preprocess"]["image_size"]
    box = np.array([8 * x + 4 - left, 8 * y + 4 - top, 8 * x + 4 + right, 8 * y + 4 + bottom])
    box = np.clip(box, 0, [width, height, width, height])
    np.testing.assert_allclose(detect["resized"][0], box, rtol=1e-5)
    np.testing.assert_allclose(detect["candidates"][0], box / stages["preprocess"]["scale_factor"], rtol=1e-5)
    score = sigmoid(cls[detect["labels"][0], y, x]) * sigmoid(centerness[0, y, x])
    np.testing.assert_allclose(detect["scores"][0], score, rtol=1e-5)
    assert set(detect["levels"]) == {0}


def test_the_programs_run_it(one_layer, tmp_path):
    folder, _ = one_layer
    run = call_demo("--model", str(folder), "--out", str(tmp_path / "out"), "--score-thr", "0.01")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "detections.json").stat().st_size > 100


def test_a_softmax_has_a_channel_for_the_background():
    tensors = FCOS.tensors(changed(pointed().settings, "head.softmax", True))
    assert tensors["model.onnx"]["cls_0"] == ("N", 3, "h_0", "w_0")


@pytest.mark.parametrize("channels", [{"cls_0": 3}, {"reg_0": 8}, {"centerness_0": 2}])
def test_a_network_with_other_maps_is_refused(one_layer, channels):
    folder, settings = one_layer
    write_model(folder / "model.onnx", settings, {"cls_0": 2, "reg_0": 4, "centerness_0": 1, **channels})
    with pytest.raises(ModelError, match=f"does not fit its settings: {next(iter(channels))} is"):
        load(folder)


def test_a_network_without_its_factor_is_refused(one_layer):
    folder, settings = one_layer
    write_model(folder / "model.onnx", settings, {"cls_0": 2, "reg_0": 4})
    with pytest.raises(ModelError, match="instead of image, cls_0, reg_0, centerness_0"):
        load(folder)


def test_two_exports_in_one_folder_are_not_mixed(one_layer):
    folder, _ = one_layer
    for name in ("model1.onnx", "model2.onnx"):
        (folder / name).write_bytes((SHAPES / name).read_bytes())
    with pytest.raises(ModelError, match="holds two exports, model1.onnx and model.onnx"):
        load(folder)


def test_an_export_beside_one_of_another_kind_is_refused(one_layer):
    pytest.importorskip("torch", reason=MMDETECTION)
    import export
    import sources

    folder, settings = one_layer
    source = sources.Source({"model1.onnx": None, "model2.onnx": None}, settings, None)
    with pytest.raises(sources.SourceError, match="holds another export, with model.onnx"):
        export.export(source, folder, None, SHAPES.parents[1] / "asset" / "shapes.png")


def test_an_export_in_ckpt_is_the_default_whatever_its_kind(one_layer, monkeypatch):
    folder, _ = one_layer
    monkeypatch.setattr(detectors, "CKPT", folder)
    assert detectors.default_folder() == folder
    monkeypatch.setattr(detectors, "CKPT", folder.parent)
    assert detectors.default_folder() == detectors.BUNDLED


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (CellAnchors, {"strides": [8, 16], "boxes": [[[0, 0, 1, 1]]]}),
        (CellAnchors, {"strides": [8], "boxes": [[]]}),
        (CellPoints, {"strides": [8, 16], "offset": 0, "units": [8]}),
    ],
)
def test_levels_that_do_not_fit(kind, values):
    settings = pointed().settings if kind is CellPoints else anchored(YOLO, YOLOSettings, within_cell=True).settings
    with pytest.raises(ValueError, match="strides|length"):
        write(changed(settings, "points" if kind is CellPoints else "anchors", kind(**values)))


@pytest.mark.parametrize(
    ("settings", "values", "words"),
    [
        (HEAD, {"combined": "root"}, "'root', but there is no factor"),
        (HEAD, {"softmax": True, "one_class": True}, "exclude each other"),
        (PREPROCESS, {"canvas": 31}, "scale has to be null"),
    ],
)
def test_settings_that_do_not_go_together(settings, values, words):
    with pytest.raises(ValueError, match=words):
        msgspec.structs.replace(settings, **values)


# ------------------------------------------------------------------ other settings at run time


def test_settings_are_changed_at_run_time(one_layer, photographs):
    folder, settings = one_layer
    cat = photographs["cat"]
    before, after = (load(folder, options)(cat) for options in ([], [("head.max_per_img", "3")]))
    assert len(after.boxes) == 3 < len(before.boxes)
    np.testing.assert_array_equal(after.boxes, before.boxes[:3])
    stages = {}
    detector = load(folder, [("preprocess.scale", "[64, 64]"), ("head.score_threshold", "0.6")])
    found = detector(cat, lambda stage, **arrays: stages.update({stage: arrays}))
    assert max(stages["preprocess"]["image_size"]) == 64
    assert stages["model"]["image"].shape[2:] == (64, 64)
    sure = sigmoid(stages["model"]["cls_0"]) > 0.6
    assert len(stages["detect"]["candidates"]) == sure.sum() > len(found.boxes) - 1
    assert load(folder).settings.head == settings.head


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("points.strides", "[4]", "points.strides cannot be set; these can: preprocess.scale, head.score_threshold"),
        ("head.factor", '"iou"', "head.factor cannot be set"),
        ("head", "{}", "head cannot be set"),
        ("nonsense.score_threshold", "1", "nonsense.score_threshold cannot be set"),
        ("head.score_threshold", '"high"', "head.score_threshold: expected `float`, got `str`"),
        ("head.iou_threshold", "1.1", "head.iou_threshold: expected `float` <= 1"),
        ("head.max_per_img", "0", "head.max_per_img: expected `int` >= 1"),
        ("head.nms_pre", "many", "head.nms_pre=many: not a number"),
        ("preprocess.scale", "[600]", "preprocess.scale: expected `array` of length 2"),
    ],
)
def test_settings_that_cannot_be_changed(one_layer, name, value, words):
    folder, _ = one_layer
    with pytest.raises(ModelError, match=re.escape(words)):
        load(folder, [(name, value)])
    run = call_demo("--model", str(folder), "--set", f"{name}={value}")
    assert run.returncode == 2
    assert_one_line(run.stderr, words)


def test_demo_and_evaluate_take_the_same_option(one_layer, tmp_path):
    folder, _ = one_layer
    out = tmp_path / "out"
    run = call_demo("--model", str(folder), "--out", str(out), "--score-thr", "0", "--set", "head.max_per_img=2")
    assert run.returncode == 0, run.stderr
    assert len(json.loads((out / "detections.json").read_text())) == 2
    assert call_demo("--set", "head.max_per_img").returncode == 2
    args = evaluate.read_arguments([str(SHAPES / "config.py"), str(tmp_path)])
    header = evaluate.describe_run(load(folder).settings, args)
    other = evaluate.describe_run(load(folder, [("head.max_per_img", "2")]).settings, args)
    (tmp_path / "partial.jsonl").write_text(json.dumps(header) + "\n")
    assert evaluate.read_partial(tmp_path / "partial.jsonl", header) == {}
    with pytest.raises(evaluate.EvaluationError, match="belongs to another --set"):
        evaluate.read_partial(tmp_path / "partial.jsonl", other)
