"""A detector in one file: its stages, and what it finds, against the networks and NumPy; in other runtimes, too."""

import copy
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from boxes import assert_equal_detections, random_boxes, rpn_maps
from conftest import ROOT, SHAPES, TABLES, call_program, default_sigint
from onnx import TensorProto, helper, numpy_helper
from test_one_stage import HEAD, PREPROCESS, anchored, pointed

ir = pytest.importorskip("onnx_ir", reason="needs onnxscript: uv run --extra test pytest")

import graphs  # noqa: E402
import graphs.postprocess  # noqa: E402
import postprocess  # noqa: E402
import whole  # noqa: E402
from compare import largest_differences, pair_detections, verify_detections  # noqa: E402
from detectors import ModelError, load  # noqa: E402
from detectors.cascade_rcnn import refine  # noqa: E402
from detectors.paa import PAA  # noqa: E402
from detectors.preprocess import preprocess  # noqa: E402
from detectors.retina_net import RetinaNet  # noqa: E402
from detectors.settings import (  # noqa: E402
    CascadeMaskRCNNSettings,
    CellPoints,
    CenterNetSettings,
    Coder,
    DETRSettings,
    FCOSSettings,
    PAASettings,
    Preprocess,
    Queries,
    Refinement,
    RetinaNetSettings,
    Suppression,
    TOODSettings,
    YOLOSettings,
    changed,
    read,
)
from detectors.tood import TOOD  # noqa: E402
from detectors.yolo import YOLO  # noqa: E402
from graphs.cascade_rcnn import refine as graph_refine  # noqa: E402
from postprocess import Detections  # noqa: E402
from sources.onnx_files import save_networks  # noqa: E402

CKPT = SHAPES.parent
BUNDLED = ("shapes", "shapes_mask", "shapes_atss")


def set_values(detector, **values):
    """Return the detector with other values for some settings; `__` in a name stands for the dot."""
    for name, value in values.items():
        detector.settings = changed(detector.settings, name.replace("__", "."), value)
    return detector


def call_whole(*arguments):
    """Run whole.py in this process."""
    return call_program(whole.main, *arguments)


def assert_one_line(stderr, *words):
    """Check that stderr is one line from whole.py with these words in it."""
    assert stderr.startswith("whole.py: "), stderr
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr


def tabulate(runtime, name, pairs):
    """Add a row to the table of how far what was found is from what NumPy finds, at most: pairs of Detections."""
    pairs = [pair_detections(*pair) for pair in pairs]
    pixels, scores = np.max([largest_differences(*pair) for pair in pairs], axis=0)
    row = [runtime, name, f"{len(pairs)} pictures", f"{pixels:.1e} px", f"{scores:.1e} in score"]
    TABLES["In one file, against the networks and NumPy: largest differences"].append(row)


def assert_same(detector, images, least=100, name=None, **options):
    """Check that a detector finds in each image what its single file finds, and in all of them enough."""
    session, pairs = whole.start(whole.build(detector, **options)), []
    for image in images:
        expected = detector(image)
        found = whole.detections(whole.run(session, image, detector.settings), image, detector.settings)
        assert verify_detections("detections", found, expected)
        pairs.append((found, expected))
    assert sum(len(expected.boxes) for _, expected in pairs) >= least
    if name:
        tabulate("ONNX Runtime", name, pairs)


# ------------------------------------------------------------------ every function, every stage


def compute(function, *arrays):
    """Return what the graph computes that function(op, values) adds its nodes to; the values are inputs."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": graphs.OPSET}, name="function")
    builder = graphs.GraphBuilder(graph)
    values = [
        builder.input(f"input_{i}", ir.DataType.from_numpy(array.dtype), [None] * array.ndim)
        for i, array in enumerate(arrays)
    ]
    before = ir.set_value_magic_handler(builder.op)
    try:
        outputs = function(builder.op, *values)
    finally:
        ir.set_value_magic_handler(before)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for i, value in enumerate(outputs):
        builder.add_output(builder.op.Identity(value), f"output_{i}")
    session = whole.start(ir.to_proto(ir.Model(graph, ir_version=10)))
    found = session.run(None, {f"input_{i}": array for i, array in enumerate(arrays)})
    return found if len(found) > 1 else found[0]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("values", [{}, {"shrinks_freely": True}])
def test_boxes_are_decoded(rng, values):
    settings = Coder(means=(0, 0.1, 0.2, 0), stds=(1, 2, 0.5, 3), **values)
    boxes, deltas = random_boxes(rng, 50), rng.normal(0, 3, (50, 4)).astype(np.float32)
    found = compute(
        lambda op, *inputs: graphs.postprocess.decode_boxes(op, *inputs[:2], settings, inputs[2]),
        boxes, deltas, np.float32([400, 600]),
    )  # fmt: skip
    np.testing.assert_allclose(found, postprocess.decode_boxes(boxes, deltas, settings, (400, 600)), rtol=1e-5)
    found = compute(lambda op, *inputs: graphs.postprocess.decode_boxes(op, *inputs, settings), boxes, deltas)
    np.testing.assert_allclose(found, postprocess.decode_boxes(boxes, deltas, settings), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"nms_first_group": 1},
        {"nms_class_agnostic": True},
        {"nms_moved_up_to": 1000},
        {"nms_moved_up_to": 10},
        {"max_per_img": 3},
        {"iou_threshold": 0.0},
    ],
)
@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_same_boxes_are_suppressed(rng, values, count):
    settings = Suppression(**{"iou_threshold": 0.5, "max_per_img": 100, **values})
    boxes = random_boxes(rng, count, clusters=20) if count else np.zeros((0, 4), np.float32)
    scores = rng.permutation(np.float32(np.arange(count) // 2 / 200))  # two of each
    groups = rng.integers(0, 4, count)
    found = compute(lambda op, *inputs: graphs.postprocess.batched_nms(op, *inputs, 4, settings), boxes, scores, groups)
    expected, _ = postprocess.batched_nms(boxes, scores, groups, settings)
    np.testing.assert_array_equal(found, expected[: settings.max_per_img])


def test_boxes_are_moved_apart_which_rounds_their_overlaps(rng):
    """Pairs of boxes with an IoU of a half, to the last bit: the threshold."""
    x, y, side = (rng.uniform(0, high, 400).astype(np.float32) for high in (600, 600, 90))
    boxes = np.stack([x, y, x + side, y + side], axis=1)
    boxes = np.concatenate([boxes, boxes + np.stack([side / 3, 0 * side] * 2, axis=1)])
    scores, groups = rng.permutation(np.linspace(0, 1, 800, dtype=np.float32)), np.tile(rng.integers(0, 400, 400), 2)
    kept = set()
    for values in ({}, {"nms_first_group": 1}, {"nms_moved_up_to": 700}, {"nms_moved_up_to": 800}):
        settings = Suppression(iou_threshold=0.5, max_per_img=1000, **values)
        found = compute(
            lambda op, *inputs, settings=settings: graphs.postprocess.batched_nms(op, *inputs, 400, settings),
            boxes, scores, groups,
        )  # fmt: skip
        np.testing.assert_array_equal(found, postprocess.batched_nms(boxes, scores, groups, settings)[0])
        kept.add(tuple(found))
    assert len(kept) == 3  # the last one is as the first


def test_from_ten_thousand_boxes_on_even_class_agnostic_nms_separates_classes(rng):
    settings = Suppression(iou_threshold=0.3, max_per_img=20_000, nms_class_agnostic=True)
    boxes = random_boxes(rng, postprocess.NMS_SPLIT, width=6000, height=6000)
    scores, groups = rng.permutation(np.linspace(0, 1, len(boxes), dtype=np.float32)), rng.integers(0, 4, len(boxes))
    for count in (len(boxes), len(boxes) - 1):
        part = boxes[:count], scores[:count], groups[:count]
        found = compute(lambda op, *inputs: graphs.postprocess.batched_nms(op, *inputs, 4, settings), *part)
        np.testing.assert_array_equal(found, postprocess.batched_nms(*part, settings)[0])


def test_a_softmax_of_two_is_an_objectness(rng):
    logits = rng.normal(0, 3, (6, 4, 5)).astype(np.float32)
    flat = np.ascontiguousarray(logits.transpose(1, 2, 0)).ravel()
    for pairs in (False, True):
        found = compute(lambda op, values, pairs=pairs: graphs.postprocess.objectness(op, values, pairs), flat)
        np.testing.assert_allclose(found, postprocess.objectness(logits, pairs), atol=1e-6)


@pytest.mark.parametrize("softmax", [False, True])
def test_the_same_boxes_are_proposed(rng, softmax):
    strides = (8, 16)
    settings = changed(changed(load(SHAPES).settings.proposals, "softmax", softmax), "nms_pre", 60)
    anchors = msgspec.structs.replace(settings.anchors, strides=strides, base_sizes=(8.0, 16.0))
    settings = changed(settings, "anchors", anchors)
    cls, reg = rpn_maps(rng, (96, 160), strides)
    assert len(cls[0]) == len(settings.anchors.ratios)
    cls = [np.concatenate([part, rng.permuted(part)]) for part in cls] if softmax else cls
    inputs = [part[None] for part in (*cls, *reg)]
    found = compute(
        lambda op, *values: graphs.postprocess.propose(op, values[:2], values[2:4], values[4], settings),
        *inputs, np.float32([90, 150]),
    )  # fmt: skip
    expected = postprocess.propose(cls, reg, (90, 150), settings)
    assert len(expected) > 50
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_the_same_boxes_are_detected_and_refined(rng, class_agnostic):
    settings = changed(load(SHAPES).settings.head, "class_agnostic", class_agnostic)
    settings = changed(settings, "min_bbox_size", 12.0)
    rois, cls = random_boxes(rng, 60), rng.normal(0, 2, (60, 4)).astype(np.float32)
    reg = rng.normal(0, 1, (60, 4 if class_agnostic else 12)).astype(np.float32)
    picture = graphs.Picture(None, np.float32([480, 640]), np.float32([0.5] * 4))

    def detect(op, cls, reg, rois, size, factor):
        cls.shape = ir.Shape(["r", 4])
        values = graphs.Picture(None, size, factor)
        refinement = changed(changed(usual, "class_agnostic", class_agnostic), "stds", (0.1, 0.1, 0.2, 0.2))
        refined = graph_refine(op, cls, reg, rois, size, refinement)
        return (*graphs.postprocess.detect(op, cls, reg, rois, values, settings)[:3], refined)

    usual = Refinement(means=(0, 0, 0, 0), stds=(0.1, 0.1, 0.2, 0.2), class_agnostic=False)
    found = compute(detect, cls, reg, rois, picture.image_size, picture.scale_factor)
    numpy_picture = SimpleNamespace(image_size=(480, 640), scale_factor=picture.scale_factor)
    expected = postprocess.detect(cls, reg, rois, numpy_picture, settings)
    everything = postprocess.detect(cls, reg, rois, numpy_picture, changed(settings, "min_bbox_size", -1))
    assert 20 < len(expected.boxes) < len(everything.boxes)
    np.testing.assert_allclose(found[0], expected.boxes, atol=1e-3)
    np.testing.assert_allclose(found[1], expected.scores, atol=1e-6)
    np.testing.assert_array_equal(found[2], expected.labels)
    refined = refine(cls, reg, rois, (480, 640), changed(usual, "class_agnostic", class_agnostic))
    np.testing.assert_allclose(found[3], refined, atol=1e-3)


def test_rois_read_the_same_levels(rng):
    sizes = np.float32([*rng.uniform(0, 900, 500), 0, 111.9, 111.99997, 112, 224, 447.9, 448, 1e5, -200])
    rois = np.stack([0 * sizes, 0 * sizes, sizes, sizes], axis=1)
    found = compute(lambda op, values: graphs.postprocess.assign_levels(op, values, 4), rois)
    np.testing.assert_array_equal(found, postprocess.assign_levels(rois, 4))
    assert set(found) == {0, 1, 2, 3}


def test_boxes_are_rescaled_both_ways(rng):
    settings, boxes = load(SHAPES).settings, random_boxes(rng, 40)
    for size in rng.integers(100, 3000, (30, 2)).tolist():
        picture = preprocess(np.zeros((*size, 3), np.uint8), settings.preprocess)
        for multiplied in (False, True):
            head = changed(settings.head, "multiplied_back", multiplied)

            def rescale(op, boxes, size, factor, head=head):
                return graphs.postprocess.rescale(op, boxes, graphs.Picture(None, size, factor), head)

            found = compute(rescale, boxes, np.float32(picture.image_size), picture.scale_factor)
            np.testing.assert_array_equal(found, postprocess.rescale(boxes, picture, head))


WAYS = [
    {},
    {"scale": None},
    {"keep_ratio": False},
    {"to_rgb": False, "pad_value": 114},
    {"pad_to_square": True},
    {"scale": None, "canvas": 31},
    {"normalize_first": True},
    {"normalize_first": True, "keep_ratio": False},
]


@pytest.mark.parametrize("values", WAYS, ids=str)
def test_a_picture_is_prepared_in_the_graph_bit_by_bit(rng, photographs, values):
    settings = {"scale": (333, 250), "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
    settings = Preprocess(**{**settings, "to_rgb": True, "pad_divisor": 32, **values})
    sizes = rng.integers(20, 500, (12, 2)).tolist() + [(500, 666), (250, 333), (1, 400)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    for image in [*photographs.values(), *images[: 4 if settings.scale is None else None]]:
        try:
            expected = preprocess(image, settings)
        except ValueError:  # too thin
            continue
        found = compute(lambda op, value: tuple(graphs.preprocess(op, value, settings)), image)
        np.testing.assert_array_equal(found[1], expected.image_size)
        np.testing.assert_array_equal(found[2], expected.scale_factor)
        assert found[0].shape == expected.blob.shape
        # PyTorch's resize is rounded after every step here, and in OpenCV's products and sums in one step on some
        # processors.
        np.testing.assert_allclose(found[0], expected.blob, rtol=0, atol=2e-6 if settings.normalize_first else 0)


CHANGES = {
    "shapes": [{}, {"proposals__score_threshold": 1.5}, {"head__score_threshold": 1.5}, {"head__score_threshold": 0}],
    "shapes_mask": [{}, {"proposals__score_threshold": 1.5}, {"head__score_threshold": 0.9}],
    "shapes_atss": [{}, {"head__score_threshold": 1.5}],
}


def permutation(found, expected):
    """Return which row of `expected` each row of `found` is; both have the same rows, to 1e-3, in another order.

    Scores that differ in the last bit only are sorted differently.
    """
    found, expected = (np.column_stack(parts).astype(np.float64) for parts in (found, expected))
    assert found.shape == expected.shape
    order, left = [], np.zeros(len(expected))
    for row in found:
        distances = np.abs(expected - row).max(axis=1) + left
        order.append(distances.argmin())
        assert distances[order[-1]] < 1e-3
        left[order[-1]] = np.inf
    return np.array(order, int)


@pytest.mark.parametrize(("name", "values"), [(name, values) for name in BUNDLED for values in CHANGES[name]], ids=str)
def test_every_stage_is_numpy_s(photographs, drawn_pictures, name, values):
    detector = set_values(load(CKPT / name), **values)
    model = ir.to_proto(graphs.build(detector))
    recorded = [name for node in model.graph.node for name in node.output if "." in name and "/" not in name]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in recorded)
    session = whole.start(model)
    for image in (photographs["cat"], photographs["motorcycle"], drawn_pictures[0][0]):
        stages, found = recorded_stages(detector, image)
        outputs = whole.run(session, image, detector.settings)
        assert set(stages) - set(outputs) == {
            key for key in stages
            if key.split(".")[0] in ("preprocess", "paste") or key.endswith(".image")  # not in the graph
            or key in ("model2.roi_feats", "mask.roi_feats")  # those of "align" and "align_masks"
        }  # fmt: skip
        order = rows_of_stages(outputs, stages, found)
        for key in recorded:
            assert outputs[key].dtype == stages[key].dtype, key
            compare_stage(key, outputs[key], stages[key], order)


def recorded_stages(detector, image):
    """Return what the stages of a detector record in an image, {"stage.name": array}, and its Detections."""
    stages = {}
    found = detector(image, lambda stage, **arrays: stages.update({f"{stage}.{key}": a for key, a in arrays.items()}))
    return stages, found


def rows_of_stages(outputs, stages, found):
    """Return, for each stage, which row of NumPy's arrays each row of the graph's arrays is."""

    def rows(stage, *names):
        pairs = [(outputs[f"{stage}.{name}"], stages[f"{stage}.{name}"]) for name in names]
        return permutation(*zip(*pairs))

    final = permutation((outputs["boxes"], outputs["labels"]), (found.boxes, found.labels))
    order = {"detect": rows("detect", "candidates", "labels", "scores"), "align_masks": final, "mask": final}
    if "propose.candidates" in outputs:
        order["propose"] = rows("propose", "candidates", "levels", "scores")
        order["align"] = order["model2"] = rows("propose", "proposals")
    return order


def compare_stage(key, found, expected, order):
    """Check that the graph's array of a stage is NumPy's; order: as rows_of_stages returns it."""
    stage, name = key.split(".")
    if name == "kept":
        assert set(order[stage][found]) == set(expected[: len(found)])
        return
    if name == "rois":  # positions among the proposals
        found = order["align"][found]
    rows = order["align"] if name == "proposals" else order.get(stage, slice(None))
    exact = expected.dtype == np.int64
    np.testing.assert_allclose(found, expected[rows], rtol=0 if exact else 1e-4, atol=0 if exact else 2e-4, err_msg=key)


# ------------------------------------------------------------------ whole detectors


@pytest.mark.slow
@pytest.mark.parametrize("from_picture", [False, True])
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_detectors_find_the_same_in_one_file(drawn_pictures, photographs, name, from_picture):
    images = [picture[0] for picture in drawn_pictures[:36]] + list(photographs.values())
    title = f"{name}, from the picture" if from_picture else name
    assert_same(load(CKPT / name), images, least=300, name=title, from_picture=from_picture)


OF_TWO_STAGES = [
    {"proposals__rank_logits": True, "proposals__nms_pre": 50, "proposals__shrinks_freely": True},
    {"proposals__anchors__strides_of_maps": True, "preprocess__pad_divisor": 48, "proposals__anchors__rounded": True},
    {"proposals__min_bbox_size": 16, "proposals__score_threshold": 0.3, "proposals__max_per_img": 30},
    {"proposals__nms_class_agnostic": True, "proposals__nms_pre": 0, "proposals__nms_moved_up_to": 100},
    {"rois__aligned": False, "rois__sampling_ratio": 2, "rois__finest_scale": 20},
    {"head__nms_resized": True, "head__multiplied_back": True, "head__min_bbox_size": 0.01},
    {"head__nms_class_agnostic": True, "head__iou_threshold": 0.2},
    {"rois__strides": (8,), "masks__rois__strides": (4,)},
    {"head__nms_moved_up_to": 30, "head__nms_first_group": 1, "head__max_per_img": 7},
    {"preprocess__normalize_first": True, "head__shrinks_freely": True, "head__score_threshold": 0.0},
]


@pytest.mark.parametrize("values", OF_TWO_STAGES, ids=str)
def test_every_setting_of_two_stages_counts(drawn_pictures, photographs, values):
    detector, usual = set_values(load(CKPT / "shapes_mask"), **values), load(CKPT / "shapes_mask")
    images = [photographs["cat"], photographs["coffee"], drawn_pictures[0][0], drawn_pictures[1][0]]
    assert_same(detector, images, least=5)
    stages = [{}, {}]
    for one, recorded in zip((detector, usual), stages):
        for image in images:
            one(
                image, lambda stage, recorded=recorded, **arrays: recorded.setdefault(stage, []).extend(arrays.values())
            )
    assert str(stages[0]) != str(stages[1])  # or the settings would not matter in these pictures


def of_one_class(path, label):
    """Return the mask head in a file with the masks of one class alone."""
    model = onnx.load(str(path))
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    for weight in model.graph.initializer:
        if weight.name in last.input:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[label : label + 1], weight.name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    return model


@pytest.fixture
def cascade(tmp_path):
    """Return the folder of a cascade with a mask for all classes, made of the bundled networks."""
    settings = load(CKPT / "shapes_mask").settings
    models = {name: onnx.load(str(CKPT / "shapes_mask" / name)) for name in settings.networks}
    models = {"model1.onnx": models["model1.onnx"],
              **{f"model2_{i}.onnx": onnx.load(str(CKPT / "shapes_mask" / "model2.onnx")) for i in range(2)},
              **{f"mask_{i}.onnx": of_one_class(CKPT / "shapes_mask" / "mask.onnx", i) for i in range(2)}}  # fmt: skip
    stages = {name: getattr(settings, name) for name in ("classes", "preprocess", "proposals", "rois", "head")}
    stages["masks"] = changed(settings.masks, "class_agnostic", True)
    refinement = Refinement(means=(0, 0, 0, 0), stds=(0.05, 0.05, 0.1, 0.1), class_agnostic=False)
    save_networks(models, CascadeMaskRCNNSettings(**stages, refinements=(refinement,)), tmp_path)
    return tmp_path


def test_a_cascade_with_masks(cascade, drawn_pictures, photographs):
    detector = load(cascade)
    assert_same(detector, [picture[0] for picture in drawn_pictures[:10]] + [photographs["cat"]], least=100)


OF_ANCHORS = [
    {},
    {"max_shift": 5},
    {"head__softmax": True, "head__nms_pre": -1},
    {"head__factor": "centerness", "head__nms_pre": 30},
    {"head__factor": "iou", "head__combined": "root"},
    {"head__factor": "objectness", "head__combined": "product", "head__factor_threshold": 0.5},
    {"head__nms_pre_per_class": 9, "head__max_per_img": None},
    {"head__nms_resized": True, "head__multiplied_back": True, "anchors__strides_of_maps": True},
    {"head__nms_class_agnostic": True, "head__score_threshold": 0.0},
]
POINTS = CellPoints(strides=[8, 16], offset=0.5, units=[1, 1])
OF_PAA = [{"head__factor": "iou", "head__combined": "root", "head__nms_pre": limit} for limit in (40, -1)]
OF_YOLO = [
    {"head__factor": "objectness", "head__combined": "product", "head__one_class": True, "head__max_per_img": None},
    {"head__factor": "objectness", "head__factor_threshold": 0.3, "head__nms_pre": -1, "within_cell": True},
]
OF_POINTS = [
    {},
    {"points__exponential": True, "head__factor": "centerness"},
    {"points__bins": 9, "points__last_pixel": True},
    {"points__strides_of_maps": True, "points__offset": 0.0},
]
DELTAS = {"deltas": Coder(means=(0.3, -0.2, 0.1, 0), stds=(0.4, 0.2, 0.2, 0.3))}
OF_ONE_STAGE = [
    *[(anchored(RetinaNet, RetinaNetSettings, **DELTAS), values) for values in OF_ANCHORS],
    *[(anchored(PAA, PAASettings, **DELTAS), values) for values in OF_PAA],
    *[(anchored(YOLO, YOLOSettings, within_cell=False), values) for values in OF_YOLO],
    *[(pointed(strides=[8, 16], units=[8, 20]), values) for values in OF_POINTS],
    (TOOD(TOODSettings(classes=("a", "b"), preprocess=PREPROCESS, points=POINTS, head=HEAD), {}), {}),
]


@pytest.mark.parametrize(
    ("family", "values"),
    OF_ONE_STAGE,
    ids=lambda value: value.settings.type if hasattr(value, "settings") else str(value),
)
def test_every_setting_of_one_stage_counts(tmp_path, photographs, drawn_pictures, family, values):
    """ONNX's NMS turns a box around whose corners are in the wrong order; distances are positive in all families."""
    settings = set_values(copy.copy(family), **values).settings
    outputs = {}
    for name, shape in family.tensors(settings)["model.onnx"].items():
        distances = name.startswith("reg") and isinstance(settings, FCOSSettings) and not settings.points.bins
        if name != "image":
            outputs[name] = (shape[1], 8 * 2 ** int(name[-1]), [("Abs", {})] if distances else [])
    write_network(tmp_path / "model.onnx", settings, outputs)
    images = [picture[0] for picture in drawn_pictures[:36]] + list(photographs.values())
    assert_same(load(tmp_path), images)


def write_network(path, settings, outputs):
    """Write a network: outputs {name: (channels, pixels a cell, the operators that follow a convolution)}."""
    rng, weights, nodes, values = np.random.default_rng(2), [], [], []
    for name, (channels, cell, rest) in outputs.items():
        kernel = rng.normal(0, 2.4 / cell, (channels, 3, cell, cell)).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w_{name}"))
        steps = [("Conv", {"kernel_shape": [cell, cell], "strides": [cell, cell]}), *rest]
        for i, (operator, attributes) in enumerate(steps):
            taken = ["image", f"w_{name}"] if i == 0 else [f"{name}_{i}"]
            if operator == "Reshape":
                weights.append(numpy_helper.from_array(np.array(attributes.pop("shape")), f"shape_{name}"))
                taken.append(f"shape_{name}")
            made = name if i == len(steps) - 1 else f"{name}_{i + 1}"
            nodes.append(helper.make_node(operator, taken, [made], **attributes))
        values.append(helper.make_empty_tensor_value_info(name))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "H", "W"])
    graph = helper.make_graph(nodes, "a layer for each output", [image], values, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save_networks({path.name: onnx.shape_inference.infer_shapes(model)}, settings, path.parent)


@pytest.mark.parametrize("way", [changed(changed(PREPROCESS, "scale", None), "canvas", 31), PREPROCESS])
def test_peaks(tmp_path, photographs, drawn_pictures, way):
    squash = [("Sigmoid", {})]
    settings = CenterNetSettings(classes=("a", "b"), preprocess=way, head=Queries(max_per_img=50, score_threshold=0.3))
    write_network(
        tmp_path / "model.onnx", settings, {"heatmap": (2, 8, squash), "size": (2, 8, []), "offset": (2, 8, squash)}
    )
    images = [picture[0] for picture in drawn_pictures[:36]] + list(photographs.values())
    assert_same(load(tmp_path), images)


def test_queries(tmp_path, photographs, drawn_pictures):
    settings = DETRSettings(classes=("a", "b"), preprocess=PREPROCESS, head=Queries(max_per_img=9, score_threshold=0.4))
    answers = {
        "cls": (20 * 3, 32, [("GlobalMaxPool", {}), ("Reshape", {"shape": [1, 20, 3]})]),
        "reg": (20 * 4, 32, [("GlobalMaxPool", {}), ("Sigmoid", {}), ("Reshape", {"shape": [1, 20, 4]})]),
    }
    write_network(tmp_path / "model.onnx", settings, answers)
    images = [picture[0] for picture in drawn_pictures[:36]] + list(photographs.values())
    assert_same(load(tmp_path), images)


def test_of_fixed_size(drawn_pictures):
    detector = set_values(load(CKPT / "shapes_mask"), head__score_threshold=0.9)
    session = whole.start(whole.build(detector, fixed=5))
    shapes = {tensor.name: tensor.shape for tensor in session.get_outputs()}
    assert list(shapes) == ["num_dets", "boxes", "scores", "labels", "masks"]
    for image in (drawn_pictures[0][0], drawn_pictures[1][0], np.zeros((90, 160, 3), np.uint8)):
        outputs, expected = whole.run(session, image, detector.settings), detector(image)
        kept = min(len(expected.boxes), 5)
        assert [outputs[name].shape for name in shapes] == [(1, 1), (1, 5, 4), (1, 5), (1, 5), (1, 5, 28, 28)]
        assert outputs["num_dets"].dtype == outputs["labels"].dtype == np.int32
        assert outputs["num_dets"] == kept
        np.testing.assert_allclose(outputs["boxes"][0, :kept], expected.boxes[:kept], atol=1e-3)
        np.testing.assert_array_equal(outputs["labels"][0, :kept], expected.labels[:kept])
        assert not outputs["scores"][0, kept:].any()
    assert kept == 0


# ------------------------------------------------------------------ other runtimes


@pytest.mark.slow
@pytest.mark.parametrize("from_picture", [False, True])
@pytest.mark.parametrize("name", BUNDLED)
def test_openvino_finds_the_same(photographs, drawn_pictures, name, from_picture):
    """From the picture, nearly: OpenVINO computes in float32 where the pixels of a picture lie."""
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO: uv run --extra test pytest")
    detector, pairs = load(CKPT / name), []
    model = openvino.Core().read_model(whole.build(detector, from_picture=from_picture).SerializeToString())
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for image in [photographs["cat"], *(picture[0] for picture in drawn_pictures[:10])]:
        blob, image_size, scale_factor = preprocess(image, detector.settings.preprocess)[:3]
        inputs = {"image": blob, "image_size": np.float32(image_size), "scale_factor": scale_factor}
        outputs = compiled({"picture": image} if from_picture else inputs)
        outputs = {output.any_name: values for output, values in outputs.items()}
        pairs.append((whole.detections(outputs, image, detector.settings), detector(image)))
    for found, expected in pairs:
        if from_picture:
            ours, theirs = pair_detections(found, expected)
            assert len(ours.boxes) == len(found.boxes) == len(expected.boxes)
            np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=0.5)
            np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-2)
        else:
            assert_equal_detections(found, expected)
    tabulate("OpenVINO", f"{name}, from the picture" if from_picture else name, pairs)


def test_the_reference_evaluator_finds_the_same(drawn_pictures):
    """ONNX's own evaluator is slow and plain: one small picture."""
    from onnx.reference import ReferenceEvaluator

    detector = set_values(load(SHAPES), preprocess__scale=(96, 64), proposals__max_per_img=20)
    image = cv2.resize(drawn_pictures[0][0], (96, 64))
    blob, image_size, scale_factor = preprocess(image, detector.settings.preprocess)[:3]
    inputs = {"image": blob, "image_size": np.float32(image_size), "scale_factor": scale_factor}
    found = ReferenceEvaluator(whole.build(detector)).run(None, inputs)
    expected = detector(image)
    assert len(expected.boxes) > 3
    assert_equal_detections(Detections(*found), expected)
    tabulate("ONNX's evaluator", "shapes", [(Detections(*found), expected)])


# ------------------------------------------------------------------ the command line


def test_a_file_is_written_and_says_what_it_is(tmp_path):
    out = tmp_path / "shapes.onnx"
    run = call_whole(SHAPES, out, "--set", "head.score_threshold=0.9", "--from-picture")
    assert run.returncode == 0, run.stderr
    assert [line.split()[-1] for line in run.stdout.splitlines()[:2]] == ["True", "True"]
    model = onnx.load(str(out))
    assert {node.domain for node in model.graph.node} <= {""}
    text = {entry.key: entry.value for entry in model.metadata_props}["detector"]
    assert read(text, type(load(SHAPES).settings)).head.score_threshold == 0.9
    image = cv2.imread(str(ROOT / "asset" / "shapes.png"))
    _, scores, _ = whole.start(model).run(None, {"picture": image})
    assert len(scores) > 5
    assert scores.min() > 0.9
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.onnx"]


def test_of_fixed_size_on_the_command_line(tmp_path):
    run = call_whole(CKPT / "shapes_mask", tmp_path / "out.onnx", "--end-to-end-fixed", "12")
    assert run.returncode == 0, run.stderr
    assert "in one file: 12, with NumPy: 12, paired: 12" in run.stdout
    assert [tensor.name for tensor in onnx.load(str(tmp_path / "out.onnx")).graph.output][0] == "num_dets"


def test_networks_without_names_of_nodes(tmp_path, photographs):
    settings = pointed(exponential=True).settings
    write_network(tmp_path / "model.onnx", settings, {"cls_0": (2, 8, []), "reg_0": (4, 8, [])})
    assert not onnx.load(str(tmp_path / "model.onnx")).graph.node[0].name
    cv2.imwrite(str(tmp_path / "cat.png"), photographs["cat"])
    run = call_whole(tmp_path, "--picture", tmp_path / "cat.png")
    assert run.returncode == 0, run.stderr


def test_a_simplifier_that_changes_something_is_noticed(tmp_path, monkeypatch):
    build = graphs.build
    monkeypatch.setattr(whole.onnxscript.optimizer, "optimize", lambda model: build(other))
    other = set_values(load(SHAPES), head__max_per_img=3)
    run = call_whole(SHAPES, tmp_path / "out.onnx")
    assert run.returncode == 2
    assert_one_line(run.stderr, "simplified, the graph gives other")
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_it_is_written_beside_the_networks(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(CKPT / "shapes_atss", folder)
    assert call_whole(folder).returncode == 0
    assert (folder / "detector.onnx").exists()
    assert len(load(folder).classes) == 6  # it is still the export of networks


def test_what_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs.postprocess, "MAX_LOG_SCALE", 0.1)
    run = call_whole(SHAPES, tmp_path / "shapes.onnx")
    assert run.returncode == 1
    assert_one_line(run.stderr, "other objects are found", "was not written")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path):
    soft = call_whole(SHAPES, tmp_path / "out.onnx", "--set", "head.soft_min_score=0.01")
    assert soft.returncode == 2
    assert_one_line(soft.stderr, "head.soft_min_score", "Soft-NMS", "--set head.soft_min_score=null")
    soft = call_whole(SHAPES, tmp_path / "out.onnx", "--set", "proposals.soft_min_score=0.01")
    assert_one_line(soft.stderr, "--set proposals.soft_min_score=null")
    (tmp_path / "none").mkdir()
    thin = tmp_path / "thin.png"
    cv2.imwrite(str(thin), np.zeros((1, 2000, 3), np.uint8))
    for arguments, words in [
        (
            (tmp_path / "none", tmp_path / "out.onnx"),
            ["holds no export, neither model1.onnx nor model.onnx", "export.py"],
        ),
        ((SHAPES, tmp_path / "no" / "out.onnx"), ["no such folder"]),
        ((SHAPES, tmp_path / "none"), ["a folder: name a file in it"]),
        ((SHAPES, "--set", "head.max_per_img=9", tmp_path / "out.txt"), ["out.txt: name a file that ends in .onnx"]),
        ((SHAPES, SHAPES / ".." / "shapes" / "model2.onnx"), ["is a name of the export's networks"]),
        ((SHAPES, SHAPES / "model.onnx"), ["is a name of the export's networks"]),
        ((SHAPES, tmp_path / "out.onnx", "--picture", thin), ["thin.png", "too thin"]),
        ((SHAPES, tmp_path / "out.onnx", "--picture", ROOT / "README.md"), ["README.md", "not a picture"]),
        ((SHAPES, tmp_path / "out.onnx", "--picture", tmp_path / "no.png"), ["no.png"]),
        ((SHAPES, tmp_path / "out.onnx", "--set", "head.classes=3"), ["head.classes cannot be set"]),
    ]:
        run = call_whole(*arguments)
        assert run.returncode == 2
        assert_one_line(run.stderr, *words)
    for count in ("0", "-1", "1e3", "10000000"):
        assert call_whole(SHAPES, tmp_path / "out.onnx", "--end-to-end-fixed", count).returncode == 2
    assert not (tmp_path / "out.onnx").exists()


def test_operators_that_are_not_of_the_standard(tmp_path):
    shutil.copytree(CKPT / "shapes_atss", tmp_path / "model")
    model = onnx.load(str(tmp_path / "model" / "model.onnx"))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Gelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(tmp_path / "model" / "model.onnx"))
    run = call_whole(tmp_path / "model")
    assert run.returncode == 2
    assert_one_line(run.stderr, "it cannot be written as one file", "not standard ONNX: Gelu")


def test_a_family_that_is_not_written_is_named():
    with pytest.raises(ModelError, match="point_rend: not written as one file; these are: faster_rcnn"):
        whole.refuse(SimpleNamespace(type="point_rend"))


@pytest.mark.slow
def test_interrupted_it_leaves_nothing(tmp_path):
    """At the last moment: when everything is compared, and the file is about to be written."""
    arguments = [str(SHAPES), str(tmp_path / "out.onnx")]
    code = f"import sys, time, whole; whole.write_file = lambda *_: time.sleep(60); sys.exit(whole.main({arguments!r}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": default_sigint}
    process = subprocess.Popen([sys.executable, "-uc", code], cwd=ROOT, **pipes)
    assert "any score" not in process.stdout.readline()
    assert "any score" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert_one_line(stderr, "interrupted")
    assert list(tmp_path.iterdir()) == []
