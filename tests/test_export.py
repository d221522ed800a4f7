"""export.py: what it writes, what it refuses, what it leaves alone."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import cv2
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import MMDETECTION, ROOT, SHAPES, draw_shapes
from onnx import numpy_helper

from detectors import Detections, load
from detectors.settings import changed
from pictures import annotated_png

torch = pytest.importorskip("torch", reason=MMDETECTION)
mmdetection = pytest.importorskip("sources.mmdetection", reason=MMDETECTION, exc_type=ImportError)

import mmcv  # noqa: E402

import compare  # noqa: E402
import export  # noqa: E402
import sources  # noqa: E402
import whole  # noqa: E402
from sources import checkpoints  # noqa: E402
from sources.layers import GroupNorm, replace_layers  # noqa: E402
from sources.onnx_files import check_standard  # noqa: E402

PAIR = ("model1.onnx", "model2.onnx")


def run_export(*arguments):
    """Run export.py as a process."""
    command = [sys.executable, str(ROOT / "export.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture
def shapes(tmp_path):
    """Return the arguments that export the bundled model into a folder that holds an older pair."""
    for name in PAIR:
        (tmp_path / name).write_text("the old one")
    return [str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), "--out", str(tmp_path)]


def assert_refused(capfd, tmp_path, arguments, *words, status=2):
    """Run export.py's main; check its exit status, its one line, and that the older pair is untouched."""
    assert export.main(arguments) == status
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("export.py: ")
    for word in words:
        assert word in line
    assert [(tmp_path / name).read_text() for name in PAIR] == ["the old one"] * 2
    assert not list(tmp_path.glob(".export*"))


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(None, "no such file"), ([], "no pictures in this folder"), (range(1), "8 bits need at least 10 pictures")],
)
def test_folders_that_cannot_calibrate(tmp_path, shapes, capfd, seeds, words):
    """They are refused before anything else is done."""
    if seeds is not None:
        draw_shapes(tmp_path / "pictures", seeds)
    assert_refused(capfd, tmp_path, [*shapes, "--int8", str(tmp_path / "pictures")], words)


def test_what_demo_annotated_calibrates_nothing(tmp_path, capfd):
    paths = draw_shapes(tmp_path, range(10))
    (tmp_path / "shown.png").write_bytes(annotated_png(cv2.imread(str(paths[0]))))
    calibrating, measuring = export.divide_pictures(str(tmp_path), 48)
    assert sorted([*calibrating, *measuring]) == sorted(map(str, paths))
    assert "annotated by demo.py: 1" in capfd.readouterr().out


def test_a_number_of_pictures(shapes, capfd):
    with pytest.raises(SystemExit):
        export.main([*shapes, "--int8", "pictures", "--calibrate", "0"])
    assert "0 is not a number of pictures" in capfd.readouterr().err


@pytest.mark.slow
def test_smaller_numbers_from_the_command_line(tmp_path):
    draw_shapes(tmp_path / "pictures", range(12))
    arguments = ["--out", tmp_path / "out", "--int8", tmp_path / "pictures" / "*.png", "--calibrate", "6", "--fp16"]
    result = run_export(SHAPES / "config.py", SHAPES / "shapes.pth", *arguments)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith(("int8: in 6 pictures", "fp16: in 1 pict"))]
    assert [line.endswith("  True") for line in lines] == [True, True]
    for folder in ("int8", "fp16"):
        assert load(tmp_path / "out" / folder).settings.source[folder]
    assert load(tmp_path / "out" / "int8").settings.source["int8"]["pictures"] == 6


@pytest.mark.slow
def test_black_pictures_cannot_calibrate(tmp_path, capfd):
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((300, 400, 3), np.uint8))
    arguments = [SHAPES / "config.py", SHAPES / "shapes.pth", "--out", tmp_path / "out", "--int8", tmp_path]
    assert export.main(list(map(str, arguments))) == 1  # the export itself is there
    assert "the detector finds nothing above 0.3" in capfd.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(PAIR)


def assert_same_network(path, expected):
    """Check that two files are the same but for the last bits of weights: normalisation is folded into them.

    PyTorch does that with the processor's own operations, and these round differently.
    """
    models = [onnx.load(str(each)) for each in (path, expected)]
    weights = [[numpy_helper.to_array(tensor) for tensor in model.graph.initializer] for model in models]
    for ours, theirs in zip(*weights):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    for model in models:
        for tensor in model.graph.initializer:
            tensor.ClearField("raw_data")
        (entry,) = model.metadata_props
        entry.value = re.sub(r'"pair":"\w{16}"', "", entry.value)  # it is made from the weights
    assert models[0] == models[1]


@pytest.mark.slow
def test_bundled_files_are_what_export_makes(tmp_path):
    result = run_export(SHAPES / "config.py", SHAPES / "shapes.pth", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    names = [f"{kind}_{level}" for kind in ("cls", "reg", "feat") for level in range(5)] + ["cls", "reg"]
    assert [line.split()[0] for line in lines[:17]] == names
    assert all(line.endswith("True") for line in lines[:19])
    assert lines[17].startswith("detections: ")
    assert lines[18].startswith("with any score: 100, the framework's own: 100, paired: 100")
    for name in PAIR:
        assert_same_network(tmp_path / name, SHAPES / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == list(PAIR)


def test_bundled_model_is_small_and_standard():
    assert sum((SHAPES / name).stat().st_size for name in (*PAIR, "shapes.pth")) < 12e6
    for name in PAIR:
        model = onnx.load(str(SHAPES / name))
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]


def test_tensors_of_the_two_files():
    sessions = [onnxruntime.InferenceSession(str(SHAPES / name), providers=["CPUExecutionProvider"]) for name in PAIR]
    inputs = [[(i.name, i.shape) for i in session.get_inputs()] for session in sessions]
    assert inputs == [[("image", ["N", 3, "H", "W"])], [("roi_feats", ["B", 64, 7, 7])]]
    outputs = [[(o.name, o.shape[1]) for o in session.get_outputs()] for session in sessions]
    levels = range(5)
    assert outputs[0] == [(f"{k}_{i}", c) for k, c in (("cls", 3), ("reg", 12), ("feat", 64)) for i in levels]
    assert outputs[1] == [("cls", 7), ("reg", 24)]
    cls, reg = sessions[1].run(None, {"roi_feats": np.zeros((0, 64, 7, 7), np.float32)})
    assert (cls.shape, reg.shape) == ((0, 7), (0, 24))


def test_metadata_is_the_config():
    """The same values as config.py has, read from it as Python and not by export.py."""
    config = {}
    exec((SHAPES / "config.py").read_text(), config)
    model, metadata = config["model"], json.loads(load(SHAPES).networks["model1.onnx"].metadata)
    anchors, rpn, head = model["rpn_head"]["anchor_generator"], model["test_cfg"]["rpn"], model["roi_head"]["bbox_head"]
    extractor, rcnn = model["roi_head"]["bbox_roi_extractor"], model["test_cfg"]["rcnn"]
    assert metadata["classes"] == list(config["classes"])
    assert metadata["format"] == 2
    assert metadata["type"] == "faster_rcnn"
    assert metadata["networks"] == list(PAIR)
    assert metadata["preprocess"] == {
        "scale": list(config["img_scale"]),
        **config["img_norm_cfg"],
        "pad_divisor": 32,
    }
    assert metadata["proposals"] == {
        "anchors": {
            "strides": anchors["strides"],
            "base_sizes": anchors["strides"],
            "scales": anchors["scales"],
            "ratios": anchors["ratios"],
            "center_offset": 0.0,
        },
        "means": model["rpn_head"]["bbox_coder"]["target_means"],
        "stds": model["rpn_head"]["bbox_coder"]["target_stds"],
        "nms_pre": rpn["nms_pre"],
        "iou_threshold": rpn["nms"]["iou_threshold"],
        "max_per_img": rpn["max_per_img"],
        "min_bbox_size": rpn["min_bbox_size"],
    }
    assert metadata["rois"] == {
        "strides": extractor["featmap_strides"],
        "output_size": extractor["roi_layer"]["output_size"],
        "sampling_ratio": extractor["roi_layer"]["sampling_ratio"],
        "aligned": True,
        "finest_scale": extractor["finest_scale"],
    }
    assert metadata["head"] == {
        "means": head["bbox_coder"]["target_means"],
        "stds": head["bbox_coder"]["target_stds"],
        "class_agnostic": False,
        "score_threshold": rcnn["score_thr"],
        "iou_threshold": rcnn["nms"]["iou_threshold"],
        "max_per_img": rcnn["max_per_img"],
    }


def test_metadata_of_both_files_is_the_same():
    texts = [onnx.load(str(SHAPES / name)).metadata_props[0].value for name in PAIR]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["source"]["config"] == "config.py"


def test_soft_nms_has_the_minimum_of_mmcv_where_a_config_names_none(shapes_detector):
    head, cfg = shapes_detector.roi_head.bbox_head, dict(shapes_detector.test_cfg.rcnn)
    for nms, expected in (({}, None), ({"type": "soft_nms"}, 1e-3), ({"type": "soft_nms", "min_score": 0.2}, 0.2)):
        found = mmdetection.describe_head(head, mmcv.ConfigDict({**cfg, "nms": {"iou_threshold": 0.5, **nms}}))
        assert found.soft_min_score == expected


def test_an_opset_that_does_not_exist(tmp_path, shapes, capfd):
    assert_refused(capfd, tmp_path, [*shapes, "--opset", "99"], "opset 99")


def test_a_picture_that_cannot_be_read(tmp_path, shapes, capfd):
    assert_refused(capfd, tmp_path, [*shapes, "--picture", __file__], __file__, "not a picture")


def test_a_hundred_detections_are_compared_where_nothing_is_found(tmp_path, shapes_source, capfd):
    cv2.imwrite(str(tmp_path / "blank.png"), np.full((100, 200, 3), 90, np.uint8))
    assert export.verify(shapes_source, load(SHAPES), tmp_path / "blank.png") == []
    lines = capfd.readouterr().out.splitlines()
    assert lines[-2].startswith("detections: 0, the framework's own: 0, paired: 0")
    assert lines[-1].startswith("with any score: 100, the framework's own: 100, paired: 100")


def test_a_picture_in_which_nothing_reaches_the_head_is_no_proof(shapes_source):
    detector = load(SHAPES)
    detector.settings = changed(detector.settings, "proposals.min_bbox_size", 10_000)
    with pytest.raises(sources.SourceError, match=r"nothing reaches model2\.onnx.*--picture"):
        export.verify(shapes_source, detector, ROOT / "asset" / "shapes.png")


def detections(*rows):
    """Return Detections, a row for each: x1, y1, x2, y2, score, label."""
    rows = np.float64(rows).reshape(-1, 6)
    return Detections(np.float32(rows[:, :4]), np.float32(rows[:, 4]), rows[:, 5].astype(int))


def test_detections_are_paired_one_to_one(capfd):
    """Two equal boxes are two detections; one of them twice is not the same."""
    twice = detections((1, 1, 5, 1, 0.9, 0), (1, 1, 5, 1, 0.8, 0))
    assert len(compare.pair_detections(twice, twice)[0].boxes) == 2
    assert compare.verify_detections("detections", twice, twice)
    assert "2, the framework's own: 2, paired: 2" in capfd.readouterr().out
    other = detections((1, 1, 5, 1, 0.9, 0), (200, 1, 230, 30, 0.8, 0))
    assert not compare.verify_detections("detections", twice, other)
    assert not compare.verify_detections("detections", other, twice)
    assert not compare.verify_detections("detections", twice, twice.where([0]))
    assert not compare.verify_detections("detections", twice, twice._replace(labels=np.array([0, 1])))
    assert not compare.verify_detections("detections", twice, twice._replace(scores=np.float32([0.9, 0.7])))
    assert compare.verify_detections("detections", twice.where([]), twice.where([]))


@pytest.mark.parametrize(
    ("magnitude", "difference", "equal"), [(1, 9e-5, True), (1, 2e-4, False), (265, 4e-4, True), (265, 7e-4, False)]
)
def test_outputs_of_large_magnitude_may_differ_by_more(magnitude, difference, equal, capfd):
    """In units of float32: at 265, 4e-4 is less than 2e-6 of it, and 7e-4 more."""

    class Scaled(torch.nn.Module):
        def forward(self, x):
            return (x * magnitude,)

    network = sources.Network(Scaled(), None, {"x": {0: "N"}}, {"y": {0: "N"}})
    source = type("Source", (), {"networks": {"model.onnx": network}, "settings": load(SHAPES).settings})
    detector = type("Detector", (), {"networks": {"model.onnx": lambda x: [x * magnitude + np.float32(difference)]}})
    different = export.verify_outputs(source, detector, {"model": {"x": np.ones((3, 2), np.float32)}})
    assert different == ([] if equal else ["y"])
    line = capfd.readouterr().out
    assert f"of {magnitude:.1e}  {equal}" in line


@pytest.mark.slow
def test_another_opset(tmp_path):
    assert (
        export.main([str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), "--out", str(tmp_path), "--opset", "17"])
        == 0
    )
    assert onnx.load(str(tmp_path / "model1.onnx")).opset_import[0].version == 17


def test_group_norm_loses_no_digit(tmp_path):
    """On as many numbers as a picture of 800 x 1333 has; ONNX Runtime's own operator loses 6e-5."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, 256)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    replace_layers(norm, {torch.nn.GroupNorm: GroupNorm})
    x = torch.randn(1, 256, 200, 336) * 3 + 5
    axes = {0: "N", 2: "H", 3: "W"}
    network = sources.Network(norm, x[..., :8, :8], {"x": axes}, {"y": axes})
    export.to_onnx(network, tmp_path / "norm.onnx", opset=13)
    session = onnxruntime.InferenceSession(str(tmp_path / "norm.onnx"), providers=["CPUExecutionProvider"])
    expected = norm.double()(x.double()).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, atol=5e-6, rtol=0)


def test_windows_are_laid_as_mmdetection_lays_them(monkeypatch):
    from mmdet.models.backbones.swin import ShiftWindowMSA

    module = ShiftWindowMSA(8, 2, window_size=4)
    windows = torch.randn(3 * 2 * 5, 4, 4, 8)
    expected = module.window_reverse(windows, 8, 20)
    replace_layers(module, {ShiftWindowMSA: mmdetection.WindowAttention})
    assert type(module) is mmdetection.WindowAttention
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # else it is MMDetection's own that computes
    assert torch.equal(module.window_reverse(windows, 8, 20), expected)


def break_weight(model1, name):
    """Change one weight of model1 that only a few outputs depend on."""
    model = onnx.load(str(model1))
    initializer = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    values = onnx.numpy_helper.to_array(initializer).copy()
    values.flat[0] += 0.01
    initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    onnx.save(model, str(model1))


def test_a_wrong_weight_is_found_and_nothing_is_replaced(tmp_path, shapes, monkeypatch, capfd):
    write_networks = export.write_networks

    def write_wrong_networks(source, folder, *arguments):
        write_networks(source, folder, *arguments)
        break_weight(folder / "model1.onnx", "rpn_reg.bias")

    monkeypatch.setattr(export, "write_networks", write_wrong_networks)
    assert export.main(shapes) == 1
    out, err = capfd.readouterr()
    lines = {line.split()[0]: line.split()[-1] for line in out.splitlines()[:17]}
    assert {name for name, verdict in lines.items() if verdict == "False"} == {f"reg_{level}" for level in range(5)}
    assert "differ in reg_0, reg_1, reg_2, reg_3, reg_4" in err.splitlines()[-1]
    assert [(tmp_path / name).read_text() for name in PAIR] == ["the old one"] * 2
    assert not list(tmp_path.glob(".export*"))


def test_wrong_detections_are_found(tmp_path, shapes_source, drawn_pictures, capfd):
    """The whole comparison fails where NMS of the export is another one, though all outputs are equal."""
    detector = load(SHAPES)
    cv2.imwrite(str(tmp_path / "picture.png"), drawn_pictures[3][0])
    assert export.verify(shapes_source, detector, tmp_path / "picture.png") == []
    detector.settings = changed(detector.settings, "head.iou_threshold", 0.05)
    assert export.verify(shapes_source, detector, tmp_path / "picture.png") == ["detections"]
    assert capfd.readouterr().out.splitlines()[-1].endswith("False")


# ------------------------------------------------------------------ checkpoints


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (functools.partial(open, self.path, "w"), ())


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path, shapes, capfd):
    torch.save({"state_dict": {}, "meta": Payload(str(tmp_path / "ran"))}, tmp_path / "bad.pth")
    shapes[1] = str(tmp_path / "bad.pth")
    assert_refused(capfd, tmp_path, shapes, "bad.pth", "--trust-checkpoint")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_checkpoint_may_hold_more_than_tensors(tmp_path, shapes):
    content = torch.load(SHAPES / "shapes.pth", weights_only=True)
    content["meta"]["date"] = np.datetime64("2020-01-30")
    torch.save(content, tmp_path / "more.pth")
    shapes[1] = str(tmp_path / "more.pth")
    assert export.main(shapes) == 2
    assert export.main([*shapes, "--trust-checkpoint"]) == 0
    assert load(tmp_path).settings.source["checkpoint"] == "more.pth"


def test_a_pytorch_that_cannot_load_safely_is_named(tmp_path, shapes, capfd, monkeypatch):
    """Before 1.13, torch.load has no weights_only."""
    load_anything = torch.load
    monkeypatch.setattr(
        checkpoints.torch, "load", lambda f, map_location=None, **pickle: load_anything(f, map_location, **pickle)
    )
    assert_refused(capfd, tmp_path, shapes, torch.__version__, "1.13", "--trust-checkpoint")
    assert mmdetection.load_checkpoint(shapes[1], trust=True)["state_dict"]


@pytest.mark.parametrize("content", [None, b"", b"text", "truncated"])
@pytest.mark.parametrize("trust", [[], ["--trust-checkpoint"]])
def test_files_that_are_no_checkpoint(tmp_path, shapes, capfd, content, trust):
    path = tmp_path / "bad.pth"
    if content == "truncated":
        content = (SHAPES / "shapes.pth").read_bytes()[:100000]
    if content is not None:
        path.write_bytes(content)
    assert_refused(capfd, tmp_path, [shapes[0], str(path), *shapes[2:], *trust], "bad.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("rpn_head.rpn_cls.bias"), ["rpn_head.rpn_cls.bias is missing"]),
        (lambda state: state.update(extra=torch.zeros(1)), ["extra is left over"]),
        (lambda state: state.update({"rpn_head.rpn_cls.bias": torch.zeros(5)}), ["is [5] instead of [3]"]),
        (lambda state: state.clear(), ["is missing;", "more"]),
        (lambda state: state["rpn_head.rpn_cls.bias"].fill_(np.nan), ["rpn_head.rpn_cls.bias holds NaN or infinity"]),
        (lambda state: state.update({"rpn_head.rpn_cls.bias": torch.zeros(3).to_sparse()}), ["not a plain tensor"]),
        (lambda state: state.update({"rpn_head.rpn_cls.bias": torch.zeros(3) * 1j}), ["not a plain tensor"]),
        (lambda state: state.update({"backbone.bn1.num_batches_tracked": 7}), ["not a plain tensor"]),
    ],
)
def test_weights_of_another_detector(tmp_path, shapes, capfd, change, words):
    content = torch.load(SHAPES / "shapes.pth", weights_only=True)
    change(content["state_dict"])
    torch.save(content, tmp_path / "other.pth")
    shapes[1] = str(tmp_path / "other.pth")
    assert_refused(capfd, tmp_path, shapes, "does not fit", *words)


@pytest.mark.parametrize("content", [{1: 2}, {"state_dict": [1]}, [torch.zeros(1)]])
def test_checkpoints_without_weights(tmp_path, shapes, capfd, content):
    torch.save(content, tmp_path / "other.pth")
    shapes[1] = str(tmp_path / "other.pth")
    assert_refused(capfd, tmp_path, shapes, "holds no state dict")


def test_class_names_must_be_as_many_as_the_classes(tmp_path, shapes, capfd):
    content = torch.load(SHAPES / "shapes.pth", weights_only=True)
    content["meta"]["CLASSES"] = ["one", "two"]
    torch.save(content, tmp_path / "other.pth")
    shapes[1] = str(tmp_path / "other.pth")
    assert_refused(capfd, tmp_path, shapes, "6 classes", "2 names")


def change_checkpoint(change):
    """Return a function that changes the checkpoint in a folder."""

    def spoil(folder):
        content = torch.load(folder / "weights.pth", weights_only=True)
        change(content, folder)
        torch.save(content, folder / "weights.pth")

    return spoil


def change_config(old, new):
    """Return a function that changes the text of the config in a folder."""

    def spoil(folder):
        text = (folder / "config.py").read_text()
        assert old in text
        (folder / "config.py").write_text(text.replace(old, new))

    return spoil


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "weights.pth").unlink(), ["weights.pth: no such file"]),
        (lambda folder: (folder / "weights.pth").write_text("no weights"), ["weights.pth is not a checkpoint"]),
        (lambda folder: (folder / "weights.pth").write_bytes(bytes(100_000)), ["weights.pth is"]),
        (change_checkpoint(lambda content, folder: content.update(x=Payload(str(folder / "ran")))), ["could run code"]),
        (
            change_checkpoint(lambda content, folder: content["state_dict"].clear()),
            ["does not fit", "is missing;", "more"],
        ),
        (change_checkpoint(lambda content, folder: content["meta"].update(CLASSES=["a"])), ["6 classes", "1 names"]),
        (
            change_checkpoint(lambda content, folder: content["state_dict"]["rpn_head.rpn_cls.bias"].fill_(np.nan)),
            ["rpn_head.rpn_cls.bias holds NaN"],
        ),
        (change_config("num_classes=6", "num_classes=80"), ["is [7] instead of [81]"]),
        (change_config("depth=18", "depth=34"), ["backbone", "is missing"]),
        (change_config("model = dict(", "model = dict(("), ["config.py cannot be read"]),
        (change_config("model = dict(", "1 / 0\nmodel = dict("), ["config.py cannot be read", "division by zero"]),
        (change_config("model = dict(", "raise SystemExit(0)\nmodel = dict("), ["config.py cannot be read"]),
    ],
)
def test_bad_checkpoints_and_configs_as_processes(tmp_path, shapes, spoil, words):
    (tmp_path / "config.py").write_bytes((SHAPES / "config.py").read_bytes())
    (tmp_path / "weights.pth").write_bytes((SHAPES / "shapes.pth").read_bytes())
    spoil(tmp_path)
    result = run_export(tmp_path / "config.py", tmp_path / "weights.pth", "--out", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("export.py: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert [(tmp_path / name).read_text() for name in PAIR] == ["the old one"] * 2
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------ configs


def test_configs_that_mmdetection_ships_are_found_by_name():
    for name in ("faster_rcnn_r50_fpn_1x_coco", "faster_rcnn_r50_fpn_1x_coco.py"):
        assert mmdetection.find_config(name).name == "faster_rcnn_r50_fpn_1x_coco.py"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("nowhere", "no config of this name"),
        ("/nowhere/config.py", "no config of this name"),
        ("ms_rcnn_r50_fpn_1x_coco", "model.type"),
        ("ga_faster_r50_fpn_1x_coco", "GARPNHead"),
        ("crpn_faster_rcnn_r50_caffe_fpn_1x_coco", "CascadeRPNHead"),
        ("sabl_faster_rcnn_r50_fpn_1x_coco", "SABLHead"),
        ("faster_rcnn_r50_fpn_dpool_1x_coco", "DeformRoIPoolPack"),
    ],
)
def test_configs_that_cannot_be_exported(tmp_path, shapes, capfd, config, word):
    assert_refused(capfd, tmp_path, [config, *shapes[1:]], word)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('type="AnchorGenerator",', 'type="AnchorGenerator", scale_major=False,', "prior_generator.scale_major"),
        ('type="AnchorGenerator",', 'type="AnchorGenerator", centers=[(0, 0)] * 5,', "prior_generator.centers"),
        ("strides=[4, 8, 16, 32, 64]", "strides=[(4, 8), 8, 16, 32, 64]", "anchor_generator.strides"),
        (
            'type="DeltaXYWHBBoxCoder", target_means',
            'type="DeltaXYWHBBoxCoder", clip_border=False, target_means',
            "clip_border",
        ),
        ("output_size=7", "output_size=(7, 14)", "output_size"),
        ('type="RoIAlign"', 'type="RoIAlign", pool_mode="max"', "pool_mode"),
        ('type="RoIAlign", output_size=7, sampling_ratio=0', 'type="RoIPool", output_size=7', "RoIPool"),
        ('type="SingleRoIExtractor"', 'type="GenericRoIExtractor"', "GenericRoIExtractor"),
        ('type="nms", iou_threshold=0.5', 'type="soft_nms", method="gaussian", iou_threshold=0.5', "gaussian"),
        ('type="nms", iou_threshold=0.5', 'type="soft_nms", split_thr=5000, iou_threshold=0.5', "split_thr"),
        ('type="nms", iou_threshold=0.5', 'type="soft_nms", min_score=None, iou_threshold=0.5', "min_score=None"),
        ("iou_threshold=0.7), min_bbox_size", "iou_threshold=0.7, max_num=50), min_bbox_size", "max_num"),
        ("nms_pre=1000, max_per_img=1000,", "nms_pre=1000, max_per_img=0,", "max_per_img"),
        ('dict(type="Resize", keep_ratio=True)', 'dict(type="Resize", backend="pillow")', "Resize(backend='pillow')"),
        ("flip=False", "flip=True", "flip"),
        ("img_scale=img_scale,\n        flip", "img_scale=[img_scale, (333, 200)],\n        flip", "img_scale"),
        ("size_divisor=32", "size_divisor=32, pad_val=114", "pad_val"),
        ('dict(type="Pad"', 'dict(type="CLAHE"', "CLAHE"),
        ('type="FasterRCNN"', 'type="GridRCNN"', "model.type"),
        ('type="FasterRCNN"', 'typ="FasterRCNN"', "model.type is None"),
        ("dataset_type =", "model = None\ndataset_type =", "model.type is None"),
        ("dataset_type =", "model = 7\ndataset_type =", "model.type is 7"),
        ("finest_scale=28", "finest_scale=-28", "rois.finest_scale: expected `float` >= 1e-06"),
        ("depth=18", "depth=19", "cannot build"),
        ("norm_cfg = dict(", "norm_cfg = dict((", "cannot be read"),
    ],
)
def test_parts_that_cannot_be_exported_are_named(tmp_path, shapes, capfd, old, new, word):
    text = (SHAPES / "config.py").read_text()
    assert old in text
    (tmp_path / "config.py").write_text(text.replace(old, new))
    assert_refused(capfd, tmp_path, [str(tmp_path / "config.py"), *shapes[1:]], word)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data = dict(", "dat = dict("),
        ("backbone=dict(", "backbon=dict("),
        ("nms_pre=", "nms_pr="),
        ("min_bbox_size=", "min_box_size="),
    ],
)
def test_a_config_that_lacks_something(tmp_path, shapes, capfd, old, new):
    text = (SHAPES / "config.py").read_text()
    assert old in text
    (tmp_path / "config.py").write_text(text.replace(old, new))
    assert_refused(capfd, tmp_path, [str(tmp_path / "config.py"), *shapes[1:]], "config.py")


@pytest.mark.parametrize("meta", ["text", {"CLASSES": 7}, {"CLASSES": [1, 2, 3, 4, 5, 6]}])
def test_a_checkpoint_whose_meta_is_none(tmp_path, shapes, capfd, meta):
    checkpoint = torch.load(SHAPES / "shapes.pth", weights_only=True)
    torch.save({**checkpoint, "meta": meta}, tmp_path / "weights.pth")
    if meta == "text":
        assert len(mmdetection.load_detector(SHAPES / "config.py", tmp_path / "weights.pth").CLASSES) == 6
    else:
        word = "'int' object is not iterable" if meta["CLASSES"] == 7 else "classes[0]: expected `str`, got `int`"
        assert_refused(capfd, tmp_path, [shapes[0], str(tmp_path / "weights.pth"), *shapes[2:]], word)


def test_a_checkpoint_cannot_name_a_file(tmp_path, shapes, capfd):
    """Its only class may have the name of a file, which is not read into the model."""
    (tmp_path / "names.txt").write_text("\n".join("abcdef"))
    checkpoint = torch.load(SHAPES / "shapes.pth", weights_only=True)
    torch.save({**checkpoint, "meta": {"CLASSES": str(tmp_path / "names.txt")}}, tmp_path / "weights.pth")
    assert_refused(capfd, tmp_path, [shapes[0], str(tmp_path / "weights.pth"), *shapes[2:]], "6 classes, but 1 names")


def test_a_config_may_name_a_file_of_classes(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("abcdef"))
    text = (
        (SHAPES / "config.py")
        .read_text()
        .replace(
            'classes = ("circle", "triangle", "square", "star", "cross", "crescent")',
            f'classes = "{tmp_path}/names.txt"',
        )
    )
    (tmp_path / "config.py").write_text(text)
    checkpoint = torch.load(SHAPES / "shapes.pth", weights_only=True)
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "weights.pth")
    detector = mmdetection.load_detector(tmp_path / "config.py", tmp_path / "weights.pth")
    assert list(detector.CLASSES) == list("abcdef")


@pytest.mark.parametrize(
    "option",
    [
        'channel_order="rgb"',
        'color_type="grayscale"',
        'color_type="color_ignore_orientation"',
        "to_float32=True",
        'file_client_args={"backend": "petrel"}',
        "rotate=90",
    ],
)
def test_other_ways_to_load_a_picture_are_refused(tmp_path, shapes, capfd, option):
    """An export reads every picture in one way, with EXIF and in colour; the comparison could not notice another."""
    head, tail = (SHAPES / "config.py").read_text().split("test_pipeline = [")
    tail = tail.replace('dict(type="LoadImageFromFile")', f'dict(type="LoadImageFromFile", {option})', 1)
    (tmp_path / "config.py").write_text(f"{head}test_pipeline = [{tail}")
    assert_refused(capfd, tmp_path, [str(tmp_path / "config.py"), *shapes[1:]], f"({option.split('=')[0]}=")


def test_the_reference_reads_the_picture_itself(tmp_path, shapes_detector):
    """So a reference with another way to load gives other detections, and the verification would notice."""
    picture = ROOT / "asset" / "shapes.png"
    expected = mmdetection.reference(shapes_detector, picture)
    pipeline = shapes_detector.cfg.data.test.pipeline
    pipeline[0]["channel_order"] = "rgb"
    try:
        found = mmdetection.reference(shapes_detector, picture)
    finally:
        del pipeline[0]["channel_order"]
    assert not compare.verify_detections("detections", found, expected)
    assert shapes_detector.roi_head.test_cfg.score_thr == 0.05


def test_stdout_that_is_closed(tmp_path):
    arguments = [SHAPES / "config.py", SHAPES / "shapes.pth", "--out", tmp_path / "out"]
    command = ["bash", "-c", '"$0" "$@" >&-', sys.executable, ROOT / "export.py", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(PAIR)


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2)])
def test_help_works_without_pytorch(tmp_path, arguments, status):
    """And what is missing is one line with the command that installs it."""
    for name in ("torch", "mmdet"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    command = [sys.executable, str(ROOT / "export.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == status
    if status:
        assert result.stderr == (
            "export.py: No module named torch: "
            "uv run --extra torchvision, or --extra export for MMDetection, installs it\n"
        )
    else:
        assert "--trust-checkpoint" in result.stdout
        assert result.stderr == ""


def test_without_mmdetection_the_command_that_installs_it_is_named(monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "sources.mmdetection")
    monkeypatch.delattr(sources, "mmdetection")
    monkeypatch.setitem(sys.modules, "mmcv", None)
    assert export.main([]) == 2
    line = capfd.readouterr().err
    assert line.startswith("export.py: ")
    assert "mmcv" in line
    assert "uv run --extra export export.py" in line


def test_a_picture_too_thin_to_compare_on(tmp_path, shapes, capfd):
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((3, 5000, 3), np.uint8))
    assert_refused(capfd, tmp_path, [*shapes, "--picture", str(tmp_path / "thin.png")], "thin.png", "too thin")


def test_the_config_is_changed_as_by_mmdetection(tmp_path, shapes):
    changes = ["model.test_cfg.rcnn.score_thr=0.4", "model.rpn_head.anchor_generator.ratios=[0.5,1.0,2.5]"]
    assert export.main([*shapes, "--cfg-options", *changes]) == 0
    settings = load(tmp_path).settings
    assert settings.head.score_threshold == 0.4
    assert settings.proposals.anchors.ratios == (0.5, 1.0, 2.5)
    assert settings.source["cfg_options"] == changes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cfg-options", "model.type.a=1"], ["--cfg-options model.type.a=1"]),
        (["--cfg-options", "model.backbone.nonsense=1"], ["cannot build its model", "nonsense"]),
        (["--set", "min_size=400"], ["--set is not for mmdetection: use --cfg-options"]),
    ],
)
def test_changes_that_cannot_be_made(tmp_path, shapes, capfd, arguments, words):
    assert_refused(capfd, tmp_path, [*shapes, *arguments], *words)


def test_a_config_behind_its_changes(shapes, capfd):
    """It would be taken for one of them, and the default detector would be downloaded."""
    with pytest.raises(SystemExit):
        export.main(["--cfg-options", "model.test_cfg.rcnn.score_thr=0.1", *shapes])
    assert f"{shapes[0]} is not KEY=VALUE; CONFIG and CHECKPOINT come before --cfg-options" in capfd.readouterr().err


PAD = "data.test.pipeline.1.transforms.3"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([f"{PAD}.pad_val=(114,114,114)"], "data.test.pipeline: MMDetection cannot build it: MultiScaleFlipAug: Pad"),
        ([f"{PAD}.pad_to_square=True"], "data.test.pipeline: MMDetection cannot build it"),
        (["data.test.pipeline.1.img_scale=[512,512]"], "data.test.pipeline: MMDetection cannot build it"),
        ([f"{PAD}.size_divisor=0"], "pad_divisor: expected `int` >= 1"),
        (["model.test_cfg.rpn.max_per_img=None"], "model.test_cfg.rpn needs nms.iou_threshold, and a max_per_img"),
        (["model.test_cfg.rpn.nms.type=soft_nms"], "model.test_cfg.rpn.nms has type='soft_nms'"),
    ],
)
def test_configs_that_mmdetection_or_an_export_cannot_run(tmp_path, shapes, capfd, changes, words):
    assert_refused(capfd, tmp_path, [*shapes, "--cfg-options", *changes], words)


def test_trident_runs_its_nms_twice(tmp_path, shapes, capfd):
    trident = ["model.roi_head.type=TridentRoIHead", "model.roi_head.num_branch=3", "model.roi_head.test_branch_idx=1"]
    soft = [*trident, "model.test_cfg.rcnn.nms.type=soft_nms"]
    assert_refused(capfd, tmp_path, [*shapes, "--cfg-options", *soft], "model.test_cfg.rcnn.nms has type='soft_nms'")
    shapes[:2] = [str(SHAPES.parent / "shapes_mask" / name) for name in ("config.py", "shapes_mask.pth")]
    assert_refused(capfd, tmp_path, [*shapes, "--cfg-options", *trident], "TridentRoIHead with masks")


@pytest.mark.parametrize("scale", [(640, 640), (1333, 800)])
def test_squares_have_one_size_only_if_both_limits_are_one(scale):
    settings = load(SHAPES).settings.preprocess
    settings = msgspec.structs.replace(settings, scale=scale, pad_to_square=True, pad_divisor=32)
    first, second = export.replayed(np.zeros((1, 3, 640, 640), np.float32), {0: "N", 2: "H", 3: "W"}, settings)
    assert second.shape == (1, 3, 640, 640)
    assert first.shape == ((2, 3, 640, 640) if scale == (640, 640) else (2, 3, 320, 320))


def test_what_mmdetection_cannot_do_is_one_line(tmp_path, shapes, capfd, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(mmdetection, "inference_detector", fail)
    assert_refused(capfd, tmp_path, shapes, "MMDetection fails with", "shapes.png: ZeroDivisionError: by zero")


def test_what_fails_leaves_no_folder(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(compare, "BOX_TOLERANCE", -1)
    out, kept = tmp_path / "new", tmp_path / "kept"
    kept.mkdir()
    for folder in (out, kept):
        assert export.main([str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), "--out", str(folder)]) == 1
    assert list(tmp_path.iterdir()) == [kept]


# ------------------------------------------------------------------ checkpoints that MMDetection reads otherwise


def test_weights_beside_which_averages_were_kept(tmp_path):
    """MMDetection's own hook adds them; YOLOX is trained so."""
    from mmdet.core.hook import ExpMomentumEMAHook
    from mmdet.models import build_detector

    folder = SHAPES.parent / "shapes_atss"
    detector = build_detector(mmcv.Config.fromfile(str(folder / "config.py")).model)
    content = torch.load(folder / "shapes_atss.pth", weights_only=True)
    detector.load_state_dict(content["state_dict"])
    ExpMomentumEMAHook().before_run(SimpleNamespace(model=detector))
    content["state_dict"] = detector.state_dict()
    assert "ema_bbox_head_atss_cls_weight" in content["state_dict"]
    torch.save(content, tmp_path / "averaged.pth")
    arguments = [str(folder / "config.py"), str(tmp_path / "averaged.pth"), "--out", str(tmp_path / "out")]
    assert export.main(arguments) == 0
    image = cv2.imread(str(ROOT / "asset" / "shapes.png"))
    found, expected = load(tmp_path / "out")(image), load(folder)(image)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    content["state_dict"]["ema_nothing"] = torch.zeros(1)
    torch.save(content, tmp_path / "averaged.pth")
    assert export.main(arguments) == 2


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("detr_r50_8x2_150e_coco", {
            ".decoder.post_norm.": ".decoder.norm.", ".attentions.0.": ".self_attn.",
            ".attentions.1.": ".multihead_attn.", ".ffns.0.": ".ffn.",
        }),
        ("fcos_r50_caffe_fpn_gn-head_1x_coco", {
            "bbox_head.conv_cls": "bbox_head.fcos_cls", "bbox_head.conv_reg": "bbox_head.fcos_reg",
            "bbox_head.conv_centerness": "bbox_head.fcos_centerness",
        }),
        ("fovea_r50_fpn_4x4_1x_coco", {
            "bbox_head.conv_cls": "bbox_head.fovea_cls", "bbox_head.conv_reg": "bbox_head.fovea_reg",
        }),
        ("faster_rcnn_r50_fpn_dconv_c3-c5_1x_coco", {".conv2.conv_offset.": ".conv2_offset."}),
    ],
)  # fmt: skip
def test_names_of_earlier_versions(config, names, tmp_path):
    """They are those that MMDetection itself understands."""
    from mmcv.runner import load_checkpoint
    from mmdet.models import build_detector

    cfg = mmdetection.read_config(mmdetection.find_config(config), ())
    cfg.model.backbone.init_cfg = cfg.model.pretrained = cfg.model.train_cfg = None
    detector = build_detector(cfg.model)
    other = copy.deepcopy(detector)
    state, old = detector.state_dict(), {}
    for name, value in state.items():
        for new_part, old_part in names.items():
            if name.startswith("bbox_head") or config.startswith("faster"):
                name = name.replace(new_part, old_part)
        old[name] = value
    assert len(old.keys() - state.keys()) >= 2 * len(names)
    assert mmdetection.renamed(old, mmdetection.OLD_NAMES).keys() == state.keys()
    assert mmdetection.renamed(state, mmdetection.OLD_NAMES).keys() == state.keys()
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    for value in other.state_dict().values():
        value.zero_()
    load_checkpoint(other, str(tmp_path / "old.pth"))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_changes_of_a_config_are_not_for_torchvision(tmp_path, shapes, capfd):
    arguments = ["torchvision:fasterrcnn_resnet50_fpn", *shapes[2:], "--cfg-options", "a=1"]
    assert_refused(capfd, tmp_path, arguments, "--cfg-options is not for torchvision: use --set")


def test_a_config_without_a_checkpoint():
    result = run_export(SHAPES / "config.py")
    assert result.returncode == 2
    assert "CONFIG and CHECKPOINT go together" in result.stderr


def test_the_whole_detector_as_one_file(tmp_path, capfd):
    arguments = [str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), "--out", str(tmp_path)]
    assert export.main([*arguments, "--whole"]) == 0
    out = capfd.readouterr().out
    assert len(re.findall(r"^in one file(, with any score)?: .*with NumPy: .*True$", out, flags=re.MULTILINE)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector.onnx", *PAIR]
    check_standard(onnx.load(str(tmp_path / "detector.onnx")))
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "model1.onnx").write_text("in 8 bits")
    assert export.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == list(PAIR)  # they were of the older networks


def test_a_whole_detector_that_cannot_be_written_is_refused_at_once(tmp_path, capfd, monkeypatch):
    soft = ["--cfg-options", "model.test_cfg.rcnn.nms.type=soft_nms", "--out", str(tmp_path), "--whole"]
    assert export.main([str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), *soft]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("export.py: head.soft_min_score: Soft-NMS is no operator of ONNX")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(whole, "MISSING", ModuleNotFoundError("No module named 'onnxscript'"))
    assert export.main([str(SHAPES / "config.py"), str(SHAPES / "shapes.pth"), "--whole"]) == 2
    assert "--whole: No module named 'onnxscript': uv run --extra whole" in capfd.readouterr().err
