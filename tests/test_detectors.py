"""detectors/: preprocessing against MMDetection's, and files that do not fit, each refused in one line."""

import concurrent.futures
import json

import cv2
import numpy as np
import onnx
import pytest
from conftest import MMDETECTION, ROOT, SHAPES
from onnx import TensorProto, helper, numpy_helper
from test_demo import assert_one_line, call_demo

import detectors
from detectors import networks
from detectors.preprocess import preprocess
from detectors.settings import Preprocess, SettingsError, changed, read, write

PICTURE = ROOT / "asset" / "shapes.png"
FILES = ("model1.onnx", "model2.onnx")

# ------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("scale", [(1333, 800), (512, 384), (333, 200)])
def test_preprocessing_is_bit_equal_to_mmdetection(photographs, scale):
    pytest.importorskip("mmdet", reason=MMDETECTION)
    from mmdet.datasets.pipelines import Compose

    norm = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 65.478, 57.375], "to_rgb": scale != (512, 384)}
    steps = [{"type": "Resize", "keep_ratio": True}, {"type": "RandomFlip"}, {"type": "Normalize", **norm}]
    steps += [{"type": "Pad", "size_divisor": 32}, {"type": "ImageToTensor", "keys": ["img"]}]
    steps += [{"type": "Collect", "keys": ["img"]}]
    augmentation = {"type": "MultiScaleFlipAug", "img_scale": scale, "flip": False, "transforms": steps}
    pipeline = Compose([{"type": "LoadImageFromWebcam"}, augmentation])
    settings = Preprocess(scale=scale, pad_divisor=32, **norm)
    odd = [np.ascontiguousarray(photographs["cat"][:37, :301]), np.ascontiguousarray(photographs["cat"][:300, :2])]
    for image in [*photographs.values(), *odd]:
        expected = pipeline({"img": image})
        meta = expected["img_metas"][0].data
        blob, image_size, scale_factor, original_size, offset = preprocess(image, settings)
        assert offset == (0, 0)
        assert original_size == meta["ori_shape"][:2]
        assert blob.dtype == np.float32
        np.testing.assert_array_equal(blob[0], expected["img"][0].numpy())
        assert tuple(image_size) == meta["img_shape"][:2]
        np.testing.assert_array_equal(scale_factor, meta["scale_factor"])


@pytest.mark.parametrize(
    "image",
    [
        None,  # what cv2.imread returns for a file that is not there
        np.zeros((40, 60), np.uint8),
        np.zeros((40, 60, 4), np.uint8),
        np.zeros((40, 60, 3), np.float32),
        np.zeros((0, 60, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_image(image):
    with pytest.raises(ValueError, match="uint8"):
        detectors.load(SHAPES)(image)


# ------------------------------------------------------------------ an export, copied and changed


def copy_model(folder, change=lambda text, name: text):
    """Copy the bundled pair, its metadata changed by a function of the text (None: metadata left out)."""
    folder.mkdir()
    for name in FILES:
        model = onnx.load(str(SHAPES / name))
        text = model.metadata_props[0].value
        del model.metadata_props[:]
        if change:
            helper.set_model_props(model, {"detector": change(text, name)})
        onnx.save(model, str(folder / name))
    return folder


def change_json(**values):
    """Return a function that sets keys of the metadata."""
    return lambda text, name: json.dumps({**json.loads(text), **values})


def change_metadata(path, value):
    """Return a change of one value of the metadata, named with dots."""

    def change(text, name):
        metadata = json.loads(text)
        *sections, key = path.split(".")
        place = metadata
        for section in sections:
            place = place[section]
        place[key] = value
        return json.dumps(metadata)

    return change


def load_error(folder):
    """Return the one line that says why a folder's export is refused."""
    with pytest.raises(detectors.ModelError) as caught:
        detectors.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, ["model1.onnx", "not written by export.py"]),
        (lambda text, name: text[:-1], ["model1.onnx", "not JSON"]),
        (lambda text, name: "", ["model1.onnx", "not JSON"]),
        (lambda text, name: "[]", ["model1.onnx", "detector", "object"]),
        (change_json(format=1), ["model1.onnx", "format 1", "format 2", "export again"]),
        (change_json(format=3), ["model1.onnx", "format 3", "format 2"]),
        (change_json(type="yolo_v9"), ["model1.onnx", "'yolo_v9'", "faster_rcnn"]),
        (lambda text, name: '{"format": 2, "type": "faster_rcnn", "pair": "x"}', ["model1.onnx", "missing", "classes"]),
        (lambda text, name: '{"pair": "x"}', ["model1.onnx", "format 0"]),
        (lambda text, name: change_json(pair=name)(text, name), ["different exports", "model1.onnx and model2.onnx"]),
        (
            change_json(networks=["model1.onnx"]),
            ["its networks are ('model1.onnx',), not ('model1.onnx', 'm"],
        ),
        (change_json(networks=[*FILES, "../mask.onnx"]), ["its networks are", "'../mask.onnx'"]),
    ],
)
def test_models_that_do_not_fit(tmp_path, change, words):
    message = load_error(copy_model(tmp_path / "model", change))
    for word in words:
        assert word in message


def test_a_model_that_does_not_fit_as_a_process(tmp_path):
    model = copy_model(tmp_path / "model", change_json(format=1))
    result = call_demo("--model", model, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, "model1.onnx is format 1")
    assert not (tmp_path / "out").exists()


def test_missing_broken_and_swapped_models(tmp_path):
    assert "nowhere holds no export" in load_error(tmp_path / "nowhere")
    assert "export.py" in load_error(tmp_path / "nowhere")
    (tmp_path / "detector.onnx").write_text("in one file")
    assert f"for the detector in one file, name {tmp_path / 'detector.onnx'}" in load_error(tmp_path)

    half = copy_model(tmp_path / "half")
    (half / "model2.onnx").unlink()
    assert "half/model2.onnx does not exist" in load_error(half)

    broken = copy_model(tmp_path / "broken")
    (broken / "model1.onnx").write_bytes((broken / "model1.onnx").read_bytes()[:1000])
    assert "model1.onnx cannot be loaded" in load_error(broken)

    swapped = copy_model(tmp_path / "swapped")
    (swapped / "model1.onnx").rename(swapped / "x")
    (swapped / "model2.onnx").rename(swapped / "model1.onnx")
    (swapped / "x").rename(swapped / "model2.onnx")
    assert "swapped/model1.onnx takes and gives roi_feats, cls, reg instead of image, cls_0" in load_error(swapped)


LEVELS = (4, 8, 16, 32)
FOUR_LEVELS = {"strides": LEVELS, "base_sizes": LEVELS, "scales": [4], "ratios": [0.5, 1, 2], "center_offset": 0}
CONTROL = "regex"  # what msgspec says of a text with control characters


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("preprocess.scale", [512], ["preprocess.scale", "length 2"]),
        ("preprocess.scale", [512, 0], ["preprocess.scale", ">= 1"]),
        ("preprocess.mean", [1, 2, "3"], ["preprocess.mean", "`float`, got `str`"]),
        ("preprocess.to_rgb", 1, ["preprocess.to_rgb", "`bool`, got `int`"]),
        ("preprocess.std", [1, 0, 1], ["preprocess.std", ">= 1e-06"]),
        ("preprocess.rotate", 90, ["preprocess", "unknown field", "rotate"]),
        ("preprocess.pad_divisor", 0, ["preprocess.pad_divisor", ">= 1"]),
        ("proposals.anchors.ratios", [0.5, 1, -2], ["proposals.anchors.ratios", ">= 1e-06"]),
        ("proposals.anchors.scales", [0], ["proposals.anchors.scales", ">= 1e-06"]),
        ("proposals.anchors.base_sizes", [4, 8, 16, 32, 0], ["proposals.anchors.base_sizes", ">= 1e-06"]),
        ("proposals.anchors.strides", [], ["proposals.anchors.strides", "length >= 1"]),
        ("proposals.anchors.strides", [4, 8], ["proposals.anchors", "2 strides, but 5 base sizes"]),
        ("proposals.anchors.strides", [4] * 20, ["proposals.anchors", "20 strides, but 5 base sizes"]),
        ("proposals.anchors", FOUR_LEVELS, ["model1.onnx takes and gives", "cls_4", "instead of image, cls_0"]),
        ("proposals.anchors.ratios", [1.0], ["model1.onnx", "cls_0 is [N, 3", "instead of [N, 1"]),
        ("proposals.softmax", True, ["model1.onnx", "cls_0 is [N, 3", "instead of [N, 6"]),
        ("proposals.anchors.scales", float("nan"), ["not JSON"]),
        ("proposals.nms_pre", 1.5, ["proposals.nms_pre", "`int`, got `float`"]),
        ("proposals.means", [0, 0, 0, float("inf")], ["not JSON"]),
        ("proposals.means", [0, 0, 0, 1e300], ["proposals.means", "<= 1000000"]),
        ("rois.finest_scale", -5, ["rois.finest_scale", ">= 1e-06"]),
        ("rois.output_size", 14, ["model2.onnx", "roi_feats is [B, 64, 7, 7] instead of [B, 64, 14, 14]"]),
        ("rois.strides", [4] * 9, ["9 levels for RoIs of 5"]),
        ("head.max_per_img", 10**9, ["head.max_per_img", "<= 1000000"]),
        ("head.class_agnostic", True, ["model2.onnx", "reg is [B, 24] instead of [B, 4]"]),
        ("head.iou_threshold", None, ["head.iou_threshold", "`float`, got `null`"]),
        ("classes", ["a"], ["model2.onnx", "cls is [B, 7] instead of [B, 2]"]),
        ("classes", [], ["classes", "length >= 1"]),
        ("classes", "circle", ["classes", "`array`, got `str`"]),
        ("classes", ["circle"] * 5 + ["\ud800"], ["not JSON"]),  # with it, OpenCV would crash
        ("classes", ["circle"] * 5 + ["a\nb"], ["classes", CONTROL]),
        ("classes", ["circle"] * 5 + ["\x1b[2J"], ["classes", CONTROL]),
        ("networks", ["model1.onnx\n", "model2.onnx"], ["networks", CONTROL]),
        ("proposals", [], ["proposals", "`object`, got `array`"]),
        ("format", "2", ["format", "`int`, got `str`"]),
    ],
)
def test_metadata_that_is_wrong(tmp_path, path, value, words):
    message = load_error(copy_model(tmp_path / "model", change_metadata(path, value)))
    for word in ["model1.onnx" if "model2.onnx" not in words else "model2.onnx", *words]:
        assert word in message


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text, name: DEEP, "detector: expected `object`, got `array`"),
        (lambda text, name: text.replace('"aligned":true', '"aligned":' + DEEP), "nested too deep"),
        (lambda text, name: text.replace('"config.py"', DEEP), "nested too deep"),
        (lambda text, name: text.replace('"format":2', '"format":' + DEEP), "format: expected `int`, got `array`"),
    ],
)
def test_metadata_nested_too_deep(tmp_path, change, words):
    model = copy_model(tmp_path / "model", change)
    assert DEEP in onnx.load(str(model / "model1.onnx")).metadata_props[0].value
    assert f"model1.onnx: its metadata is damaged: {words}" in load_error(model)


def test_settings_are_written_as_they_are_read():
    settings = detectors.load(SHAPES).settings
    assert read(write(settings), type(settings)) == settings
    other = changed(settings, "proposals.anchors.scales", (8.0,))
    assert other.proposals.anchors.scales == (8.0,)
    assert changed(other, "proposals.anchors.scales", settings.proposals.anchors.scales) == settings
    with pytest.raises(AttributeError):
        settings.head.iou_threshold = 0.5
    with pytest.raises(SettingsError, match="head.iou_threshold"):
        write(changed(settings, "head.iou_threshold", "high"))


def test_no_proposals(tmp_path):
    """An RPN that proposes nothing: the head runs on nothing, and nothing is found."""
    model = copy_model(tmp_path / "model", change_metadata("proposals.min_bbox_size", 10000))
    result = call_demo("--out", tmp_path / "out", "--model", model)
    assert result.returncode == 0, result.stderr
    assert "0 detections" in result.stdout


# ------------------------------------------------------------------ right metadata, another network


def edit(folder, name, change):
    """Change one of an export's networks with a function of its graph."""
    model = onnx.load(str(folder / name))
    change(model.graph)
    onnx.save(model, str(folder / name))


def output_of(graph, name):
    """Return an output of a graph."""
    return next(output for output in graph.output if output.name == name)


def declare(tensor, sides, kind=TensorProto.FLOAT):
    """Say that a tensor has this type and shape; None: no shape is said."""
    tensor.CopyFrom(helper.make_tensor_value_info(tensor.name, kind, sides))


def replace_output(graph, name, nodes, sides, kind=TensorProto.FLOAT, **constants):
    """Let nodes (operator, inputs, attributes), one after the other, make an output of what was it: "before"."""
    for node in graph.node:
        node.output[:] = ["before" if output == name else output for output in node.output]
        node.input[:] = ["before" if used == name else used for used in node.input]
    for constant, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value), constant))
    for number, (operator, inputs, attributes) in enumerate(nodes, 1):
        made = name if number == len(nodes) else f"between_{number}"
        graph.node.append(helper.make_node(operator, inputs, [made], **attributes))
    declare(output_of(graph, name), sides, kind)


def flatten(name, sides=("X",)):
    """Return a change: an output of rank 1."""
    nodes = [("Reshape", ["before", "shape"], {})]
    return lambda graph: replace_output(graph, name, nodes, sides, shape=[-1])


def cut(name, axis, stop, sides):
    """Return a change: an output has no more than so many entries along one axis."""
    nodes = [("Slice", ["before", "start", "stop", "axis"], {})]
    return lambda graph: replace_output(graph, name, nodes, sides, start=[0], stop=[stop], axis=[axis])


def without_last(name, axis, length):
    """Return a change: an output lacks its last entry along one axis; onnxruntime cannot know before it runs."""
    nodes = [("Compress", ["before", "chosen"], {"axis": axis})]
    return lambda graph: replace_output(graph, name, nodes, None, chosen=[True] * (length - 1) + [False])


def several(*changes):
    """Return the change that makes several, of which each keeps names of its own."""

    def change(graph):
        for number, one in enumerate(changes):
            old = {initializer.name for initializer in graph.initializer}
            one(graph)
            own = [value.name for value in graph.initializer if value.name not in old] + ["before"]
            rename(graph, {name: f"{name} {number}" for name in own})

    return change


def rename(graph, names):
    """Give tensors of a graph other names."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in [*graph.initializer, *graph.input, *graph.output]:
        tensor.name = names.get(tensor.name, tensor.name)


def constant_outputs(graph):
    """Let a network take nothing and give constants."""
    del graph.input[:], graph.node[:], graph.initializer[:]
    for output in graph.output:
        sides = [side.dim_value or 1 for side in output.type.tensor_type.shape.dim]
        value = numpy_helper.from_array(np.zeros(sides, np.float32))
        graph.node.append(helper.make_node("Constant", [], [output.name], value=value))


def two_inputs(graph):
    """Let a network take another tensor, too."""
    graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N"]))


def strings(graph):
    """Let the head's cls be texts."""
    sides = ["B", 7]
    replace_output(graph, "cls", [("Cast", ["before"], {"to": TensorProto.STRING})], sides, TensorProto.STRING)


def doubles(graph):
    """Let the head's cls be numbers of 64 bits."""
    sides = ["B", 7]
    replace_output(graph, "cls", [("Cast", ["before"], {"to": TensorProto.DOUBLE})], sides, TensorProto.DOUBLE)


def swap_order(graph):
    """Let the head give reg first."""
    outputs = [*graph.output][::-1]
    del graph.output[:]
    graph.output.extend(outputs)


def swap(first, second):
    """Return a change: two outputs have each other's names."""

    def change(graph):
        rename(graph, {first: second, second: first})
        outputs = {output.name: output for output in graph.output}
        order = [{first: second, second: first}.get(output.name, output.name) for output in graph.output]
        copies = [helper.make_tensor_value_info("", TensorProto.FLOAT, []) for _ in order]
        for copy, name in zip(copies, order):
            copy.CopyFrom(outputs[name])
        del graph.output[:]
        graph.output.extend(copies)

    return change


def one_row(graph):
    """Let the head give one row whatever it gets, without saying so."""
    several(cut("cls", 0, 1, ["B", 7]), cut("reg", 0, 1, ["B", 24]))(graph)


def fewer_channels(graph):
    """Let the head take half of the channels, which it doubles."""
    rename(graph, {"roi_feats": "doubled"})
    graph.input[0].CopyFrom(helper.make_tensor_value_info("roi_feats", TensorProto.FLOAT, ["B", 32, 7, 7]))
    graph.node.insert(0, helper.make_node("Concat", ["roi_feats", "roi_feats"], ["doubled"], axis=1))


AT_START = [
    ("model2.onnx", flatten("cls"), "cls is [X] instead of [B, 7]"),
    ("model2.onnx", flatten("cls", None), "cls is [?] instead of [B, 7]"),
    ("model1.onnx", flatten("cls_3"), "cls_3 is [X] instead of [N, 3,"),
    ("model1.onnx", constant_outputs, "takes and gives cls_0, cls_1"),
    ("model2.onnx", constant_outputs, "takes and gives cls, reg instead of roi_feats, cls, reg"),
    ("model2.onnx", two_inputs, "takes and gives roi_feats, mask, cls, reg"),
    ("model2.onnx", strings, "cls is a tensor(string)"),
    ("model2.onnx", doubles, "cls is a tensor(double)"),
    ("model2.onnx", cut("cls", 1, 6, ["B", "C"]), "cls is [B, 6] instead of [B, 7]"),
    ("model2.onnx", cut("reg", 1, 20, ["B", 20]), "reg is [B, 20] instead of [B, 24]"),
    ("model1.onnx", cut("reg_2", 1, 8, ["N", 8, "H", "W"]), "reg_2 is [N, 8, H, W] instead of [N, 12,"),
    ("model1.onnx", cut("feat_0", 1, 32, ["N", 32, "H", "W"]), "feat_1 is [N, 64,"),
    ("model2.onnx", fewer_channels, "roi_feats is [B, 32, 7, 7] instead of [B, 64, 7, 7]"),
    ("model2.onnx", swap_order, "takes and gives roi_feats, reg, cls instead of roi_feats, cls, reg"),
    ("model2.onnx", swap("cls", "reg"), "cls is [B, 24] instead of [B, 7]"),
    ("model1.onnx", swap("cls_1", "reg_1"), "cls_1 is [N, 12,"),
]


@pytest.mark.parametrize(("name", "change", "words"), AT_START)
def test_another_network_is_refused_at_the_start(tmp_path, name, change, words):
    model = copy_model(tmp_path / "model")
    edit(model, name, change)
    result = call_demo("--model", model, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, model / name, words)
    assert not (tmp_path / "out").exists()


AT_THE_FIRST_PICTURE = [
    ("model2.onnx", one_row, "cls is [1, 7] instead of ["),
    ("model2.onnx", cut("reg", 0, 1, ["B", 24]), "reg is [1, 24] instead of ["),
    ("model2.onnx", without_last("cls", 1, 7), "6] instead of ["),
    ("model2.onnx", without_last("reg", 1, 24), "23] instead of ["),
    ("model1.onnx", without_last("cls_3", 1, 3), "cls_3 is [1, 2, 10, 16] instead of [1, 3, 10, 16]"),
    ("model1.onnx", without_last("feat_0", 1, 64), "feat_1 is [1, 64, 40, 64] instead of [1, 63, 40, 64]"),
    ("model1.onnx", cut("reg_0", 2, 10, ["N", 12, "H", "W"]), "reg_0 is [1, 12, 10, 128] instead of [1, 12, 80, 128]"),
    ("model1.onnx", cut("feat_1", 3, 10, ["N", 64, "H", "W"]), "feat_1 is [1, 64, 40, 10] instead of [1, 64, 40, 64]"),
    ("model1.onnx", swap("cls_0", "cls_1"), "reg_0 is [1, 12, 80, 128] instead of [1, 12, 40, 64]"),
]


@pytest.mark.parametrize(("name", "change", "words"), AT_THE_FIRST_PICTURE)
def test_another_network_is_refused_at_the_first_picture(tmp_path, name, change, words):
    """It does not say of what shape its outputs are, or says something else."""
    model = copy_model(tmp_path / "model")
    edit(model, name, change)
    result = call_demo("--model", model, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, PICTURE, name, "does not fit its settings", words)
    assert not list((tmp_path / "out").iterdir())


def test_another_count_of_input_channels(tmp_path):
    """A network for grey pictures, which onnxruntime would run."""

    def grey(graph):
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
        first = next(node for node in graph.node if "image" in node.input)
        weight = next(initializer for initializer in graph.initializer if initializer.name == first.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :1], weight.name))

    model = copy_model(tmp_path / "model")
    edit(model, "model1.onnx", grey)
    assert "model1.onnx does not fit its settings: image is [N, 1, H, W] instead of [N, 3, " in load_error(model)


@pytest.mark.parametrize(("old", "new"), [(b'"circle"', b'"\xffircle"'), (b"cls_4", b"\xffls_4"), (b"H_3", b"\xff_3")])
def test_names_that_are_no_utf_8(tmp_path, old, new):
    model = copy_model(tmp_path / "model", lambda text, name: text)
    content = (model / "model1.onnx").read_bytes()
    assert old in content
    (model / "model1.onnx").write_bytes(content.replace(old, new))
    with pytest.raises(detectors.ModelError, match=r"model1\.onnx cannot be loaded.*utf-8"):
        detectors.load(model)


def test_what_is_printed_cannot_command_a_terminal(tmp_path):
    model = copy_model(tmp_path / "model", lambda text, name: text.replace('"scale"', '"\\u001b[31mscale"'))
    result = call_demo("--model", model, "--out", tmp_path / "out")
    assert_one_line(result.stderr, r"unknown field `\x1b[31mscale`")


def test_a_model_of_somebody_else(tmp_path):
    """Their y = x + x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    for name in FILES:
        opset = helper.make_opsetid("", 13)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(tmp_path / name))
    assert "model1.onnx was not written by export.py" in load_error(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no network", bytes(1000)])
def test_files_that_are_no_networks(tmp_path, content):
    for name in FILES:
        (tmp_path / name).write_bytes(content)
    message = load_error(tmp_path)
    assert "model1.onnx cannot be loaded" in message or "model1.onnx was not written by export.py" in message


# ------------------------------------------------------------------ damaged weights


def change_weight(path, find, value):
    """Set a weight of a network."""
    model = onnx.load(str(path))
    initializer = next(tensor for tensor in model.graph.initializer if find in tensor.name)
    values = numpy_helper.to_array(initializer).copy()
    values.flat[0] = value
    initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("network", "weight", "output"),
    [("model1", "rpn_reg.bias", "reg_0"), ("model2", "fc_cls.bias", "cls")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_named(tmp_path, network, weight, output, value):
    model = copy_model(tmp_path / "model")
    change_weight(model / f"{network}.onnx", weight, value)
    result = call_demo(PICTURE, "--model", model, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, "NaN or infinity", f"{output} of {network}.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_weights_in_another_file_that_is_not_there(tmp_path):
    model = copy_model(tmp_path / "model")
    network = onnx.load(str(model / "model1.onnx"))
    onnx.save(network, str(model / "model1.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert len(detectors.load(model).classes) == 6  # with it, all is well
    (model / "weights.bin").unlink()
    message = load_error(model)
    assert "model1.onnx" in message
    assert "weights.bin" in message


# ------------------------------------------------------------------ the same answer, always


def test_large_inputs_are_taken_in_blocks(monkeypatch):
    """What a head takes of a C4 detector is a gigabyte: less at once, and the outputs are the same."""
    network, rois = detectors.load(SHAPES).networks["model2.onnx"], np.random.default_rng(0)
    rois = rois.random((100, 64, 7, 7), np.float32)
    expected, sizes, run = network(rois), [], network.session.run
    monkeypatch.setattr(networks, "BLOCK", 30 * rois[0].nbytes)

    def count(names, inputs):
        sizes.append(len(inputs["roi_feats"]))
        return run(names, inputs)

    monkeypatch.setattr(network, "session", type("Session", (), {"run": staticmethod(count)}))
    for found, whole in zip(network(rois), expected):
        np.testing.assert_allclose(found, whole, atol=1e-5)
    assert sizes == [30, 30, 30, 10]
    assert [len(output) for output in network(rois[:0])] == [0, 0]


def test_eight_threads_and_a_hundred_runs_give_the_same_bits():
    detector, image = detectors.load(SHAPES), cv2.imread(str(PICTURE))
    detector.settings = changed(detector.settings, "preprocess.scale", (256, 192))  # a fourth of the time
    upright = np.ascontiguousarray(image.transpose(1, 0, 2))
    expected = [detector(image), detector(upright)]
    assert min(len(found.boxes) for found in expected) > 10
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(detector, [image, upright] * 50))
    for number, run in enumerate(runs):
        for field, other in zip(run[:3], expected[number % 2]):
            assert field.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("values", "finite"),
    [([], True), ([3e38, -3e38, 0], True), ([1, np.nan], False), ([-np.inf, np.inf], False), ([1e30, np.inf], False)],
)
def test_what_is_finite(values, finite):
    assert networks.is_finite(np.float32(values).reshape(1, -1)) is finite
