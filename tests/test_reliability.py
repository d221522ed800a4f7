"""Bad input, broken and hostile files: one clear line, the documented exit status, nothing lost, the rest done."""

import concurrent.futures
import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import onnx
import pytest
from conftest import ROOT, SHAPES
from PIL import Image
from test_demo import assert_one_line, copy_model, run_demo

import demo

PICTURE = ROOT / "asset" / "shapes.png"


def run_on(tmp_path, *arguments, **settings):
    """Run demo.py with the bundled model into tmp_path/out."""
    return run_demo("--model", SHAPES, "--out", tmp_path / "out", *arguments, **settings)


def good_and(tmp_path, name, content):
    """Write a good picture and another file; run demo.py on both; check that the good one is done and return stderr."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(PICTURE.read_bytes())
    (folder / name).write_bytes(content)
    result = run_on(tmp_path, folder)
    assert result.returncode == 1, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detections.json", "good.png"]
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in entries} == {"good"}
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("demo.py: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


# ------------------------------------------------------------------ pictures


def png_header(width, height):
    """Return a PNG that says it has this size and ends."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def encoded(image, suffix):
    """Return an image as the bytes of a file."""
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.png", b"", "not a picture"),
        ("text.jpg", b"this is no picture", "not a picture"),
        ("huge.png", png_header(30_000, 30_000), "134217728 pixels"),
        ("thin.png", encoded(np.zeros((1, 5000, 3), np.uint8), ".png"), "too thin"),
        ("high.png", encoded(np.zeros((5000, 1, 3), np.uint8), ".png"), "too thin"),
        ("cut.png", PICTURE.read_bytes()[:40], "not a picture"),
        ("cut.jpg", encoded(cv2.imread(str(PICTURE)), ".jpg")[:9000], "not a picture"),
        ("new\nline.png", b"", r"new\nline"),
        (os.fsdecode(b"not utf-8 \xff.png"), b"", r"\udcff"),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path, name, content, word):
    assert word in good_and(tmp_path, name, content)


def colour_modes(folder):
    """Write a picture in every mode that is not plain RGB; return the paths."""
    picture = Image.open(PICTURE).convert("RGB").resize((120, 80))
    modes = {"grey.png": "L", "grey_alpha.png": "LA", "rgba.png": "RGBA", "palette.png": "P", "cmyk.jpg": "CMYK"}
    for name, mode in modes.items():
        picture.convert(mode).save(folder / name)
    cv2.imwrite(str(folder / "16_bit.png"), np.asarray(picture).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.save(folder / "animated.webp", save_all=True, append_images=[picture.rotate(90)], lossless=True)
    return sorted(folder.iterdir())


def test_every_kind_of_picture_is_read_as_mmdetection_reads_it(tmp_path):
    from mmdet.datasets.pipelines import LoadImageFromFile

    for path in colour_modes(tmp_path):
        expected = LoadImageFromFile()({"img_info": {"filename": str(path)}, "img_prefix": None})["img"]
        np.testing.assert_array_equal(demo.read_picture(path), expected, err_msg=path.name)
    assert demo.read_picture(tmp_path / "turned.jpg").shape == (120, 80, 3)


def test_every_kind_of_picture_as_a_process(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = colour_modes(tmp_path / "pictures")
    result = run_on(tmp_path, *paths)
    assert result.returncode == 0, result.stderr
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {path.stem for path in paths} - {"animated"} | {
        "animated",
        "animated_2",
    }
    turned = cv2.imread(str(tmp_path / "out" / "turned.png"))
    assert turned.shape == (120, 80, 3)


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    first = Image.open(PICTURE).convert("P")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    Image.open(tmp_path / "moving.gif").convert("RGB").save(tmp_path / "still.png")
    result = run_on(tmp_path, tmp_path / "moving.gif", tmp_path / "still.png")
    assert result.returncode == 0, result.stderr
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    moving, still = ([entry for entry in entries if entry["image_id"] == name] for name in ("moving", "still"))
    assert len(moving) > 5
    assert [entry["bbox"] for entry in moving] == [entry["bbox"] for entry in still]


NAMES = ["with space.png", "图片 é.png", "-dash.png", "1.png", "[x]*.png", "new\nline.png", "n" * 251 + ".png"]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"not utf-8 \xff.png")])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of stdout
def test_names_of_every_kind(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(PICTURE.read_bytes())
    path = tmp_path / name
    result = run_on(tmp_path, path, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / name).exists()
    assert json.loads((tmp_path / "out" / "detections.json").read_text())[0]["file_name"] == name
    shown = str(tmp_path / "out" / name)
    if not shown.isprintable() or (encoding == "ascii" and not shown.isascii()):
        shown = ascii(shown)[1:-1]
    assert f"1 annotated, 11 detections: {shown}, " in result.stdout.splitlines()[-1].replace("'", "")
    assert result.stdout.splitlines()[-1].endswith("detections.json")


def test_a_name_that_begins_with_a_dash(tmp_path):
    (tmp_path / "-dash.png").write_bytes(PICTURE.read_bytes())
    result = run_on(tmp_path, "--", "-dash.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "-dash.png").exists()


def test_one_pixel(tmp_path):
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((1, 1, 3), np.uint8))
    result = run_on(tmp_path, tmp_path / "one.png")
    assert result.returncode == 0, result.stderr


def test_two_pictures_of_the_same_name(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(PICTURE.read_bytes())
    result = run_on(tmp_path, tmp_path / "a", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"same.png", "same_2.png", "detections.json"}


def test_a_folder_with_ten_thousand(tmp_path):
    """All but one of which cannot be read; and links to that one, which is done once."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10_000):
        (folder / f"{number}.jpg").touch()
        (folder / f"link {number}.jpg").symlink_to(PICTURE)
    result = run_on(tmp_path, folder)
    assert result.returncode == 1
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("demo.py: ")]
    assert len(set(lines)) == 10_000
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 11
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "text.txt").touch()
    result = run_on(tmp_path, tmp_path)
    assert result.returncode == 2
    assert_one_line(result.stderr, tmp_path, "no pictures in this folder")
    assert not (tmp_path / "out").exists()


def small_files_only():
    """Let a process write no file larger than 4 kB, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_full_disk(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shapes.png").write_text("the old one")
    result = run_on(tmp_path, PICTURE, preexec_fn=small_files_only)
    assert result.returncode == 2
    assert "too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [("shapes.png", "the old one")]


def obey_permissions():
    """Let root, too, read and write only what the permissions of a file allow it."""
    drop_capability = 24  # PR_CAPBSET_DROP of Linux's prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop_capability, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="root may read and write everything")
def test_permissions(tmp_path):
    closed, unlisted, read_only = tmp_path / "closed.png", tmp_path / "unlisted", tmp_path / "read only"
    closed.write_bytes(PICTURE.read_bytes())
    closed.chmod(0)
    unlisted.mkdir(mode=0)
    result = run_on(tmp_path, closed, unlisted, PICTURE, preexec_fn=obey_permissions)
    assert result.returncode == 1
    assert f"demo.py: {closed}: [Errno 13] Permission denied" in result.stderr
    assert f"demo.py: {unlisted}: this folder may not be read" in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shapes.png", "detections.json"}
    read_only.mkdir(mode=0o500)
    result = run_on(tmp_path, PICTURE, "--out", read_only, preexec_fn=obey_permissions)
    assert result.returncode == 2
    assert_one_line(result.stderr, PICTURE, "Permission denied")
    assert not list(read_only.iterdir())


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "out").write_text("a file")
    result = run_on(tmp_path, PICTURE)
    assert result.returncode == 2
    assert_one_line(result.stderr, tmp_path / "out")


def test_ctrl_c_keeps_what_is_done(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(PICTURE.read_bytes())
    command = [
        sys.executable,
        str(ROOT / "demo.py"),
        str(tmp_path),
        "--model",
        str(SHAPES),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.png"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    done = {path.stem for path in (tmp_path / "out").glob("*.png")}
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert 3 <= len(done) < 60
    assert {str(entry["image_id"]) for entry in entries} >= done - {max(done, key=int)}
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize("display", [{}, {"DISPLAY": ""}, {"DISPLAY": ":77"}, {"WAYLAND_DISPLAY": "wayland-7"}])
def test_a_window_needs_a_display(tmp_path, display):
    """Without, Qt would abort the whole program."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    result = run_on(tmp_path, PICTURE, "--show", env={**environment, **display})
    assert result.returncode == 2
    assert "--show needs a display" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("score", ["nan", "-0.1", "1.1", "high"])
def test_scores_that_there_are_not(tmp_path, score):
    result = run_on(tmp_path, PICTURE, f"--score-thr={score}")
    assert result.returncode == 2
    assert "--score-thr" in result.stderr.splitlines()[-1]
    assert f"{score} is not between 0 and 1" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("program", ["demo.py", "explain.py"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("stdout", ["closed pipe", "full disk", "none"])
def test_stdout_that_takes_nothing(tmp_path, program, unbuffered, stdout):
    """The first as in `demo.py picture.png | head -1`: the work is done; what was not printed is said in one line."""
    read, write = os.pipe()
    os.close(read)
    out = {"closed pipe": f">&{write}", "full disk": ">/dev/full", "none": ">&-"}[stdout]
    command = f'"$0" {ROOT / program} {PICTURE} --model {SHAPES} --out {tmp_path} {out}'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        pass_fds=[write],
        timeout=300,
        check=False,
    )
    os.close(write)
    if stdout == "none":
        assert (result.returncode, result.stderr) == (0, "")
    else:
        assert result.returncode == (2 if unbuffered else 1)
        assert result.stderr.startswith(f"{program}: ")
        assert result.stderr.count("\n") == 1
    if not unbuffered or stdout == "none":
        assert len(list(tmp_path.iterdir())) == (2 if program == "demo.py" else 10)


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
        demo.FasterRCNN(SHAPES)(image)


# ------------------------------------------------------------------ models


def change_metadata(section, key, value):
    """Return a change of the metadata of both files."""

    def change(text, name):
        config = json.loads(text)
        (config[section] if section else config)[key] = value
        return json.dumps(config)

    return change


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("preprocess", "scale", [512], ["preprocess.scale", "list of 2"]),
        ("preprocess", "scale", [512, 0], ["preprocess.scale", "count"]),
        ("preprocess", "mean", [1, 2, "3"], ["preprocess.mean", "number"]),
        ("preprocess", "to_rgb", 1, ["preprocess.to_rgb", "true or false"]),
        ("preprocess", "std", [1, 0, 1], ["preprocess.std", "above 0"]),
        ("anchors", "ratios", [0.5, 1, -2], ["anchors.ratios", "above 0"]),
        ("anchors", "scales", [0], ["anchors.scales", "above 0"]),
        ("anchors", "base_sizes", [4, 8, 16, 32, 0], ["anchors.base_sizes", "above 0"]),
        ("roi", "finest_scale", -5, ["roi.finest_scale", "above 0"]),
        ("preprocess", "rotate", 90, ["preprocess", "unknown", "rotate"]),
        ("anchors", "strides", [], ["anchors.strides"]),
        ("anchors", "strides", [4, 8], ["fit", "2 levels"]),
        ("anchors", "strides", [4] * 20, ["fit", "20 levels"]),
        ("anchors", "ratios", [1.0], ["objectness logits"]),
        ("anchors", "scales", float("nan"), ["anchors.scales"]),
        ("rpn", "nms_pre", 1.5, ["rpn.nms_pre", "whole number"]),
        ("rpn", "means", [0, 0, 0, float("inf")], ["rpn.means"]),
        ("roi", "output_size", 14, ["sides of roi_feats"]),
        ("roi", "strides", [4] * 9, ["levels for RoIs"]),
        ("rcnn", "max_per_img", 10**9, ["rcnn.max_per_img"]),
        ("rcnn", "class_agnostic", True, ["class deltas"]),
        (None, "classes", ["a"], ["class logits"]),
        (None, "classes", "circle", ["classes"]),
        (
            None,
            "classes",
            ["circle"] * 5 + ["\ud800"],
            ["classes", "control characters"],
        ),  # with it, OpenCV would crash
        (None, "classes", ["circle"] * 5 + ["a\nb"], ["classes", "control characters"]),
        (None, "classes", ["circle"] * 5 + ["\x1b[2J"], ["classes", "control characters"]),
        (None, "rpn", [], ["rpn", "no object"]),
        (None, "format", 2, ["'format': 2"]),
    ],
)
def test_metadata_that_is_wrong(tmp_path, section, key, value, words):
    model = copy_model(tmp_path / "model", change_metadata(section, key, value))
    with pytest.raises(demo.ModelError) as caught:
        demo.FasterRCNN(model)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of stdout
def test_class_names_that_opencv_cannot_draw(tmp_path, encoding):
    names = ["圆", "三角形", "square", "étoile", "十字", "月\u3000牙"]
    model = copy_model(tmp_path / "model", change_metadata(None, "classes", names))
    result = run_on(tmp_path, PICTURE, "--model", model, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert result.returncode == 0, result.stderr
    assert ("圆" if encoding == "utf-8" else r"\u5706") in result.stdout
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["category"] for entry in entries} == {"圆", "三角形", "square", "étoile", "月\u3000牙"}
    detections = demo.FasterRCNN(SHAPES)(cv2.imread(str(PICTURE)))
    detections = demo.Detections(*(field[detections.scores >= 0.3] for field in detections))
    drawable = ["class 1", "class 2", "square", "class 4", "class 5", "class 6"]
    expected = demo.draw(cv2.imread(str(PICTURE)), detections, drawable)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / "shapes.png")), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda text, name: "[" * 100_000,
        lambda text, name: text.replace('"aligned": true', '"aligned": ' + "[" * 985 + "]" * 985),
        lambda text, name: text.replace('"format": 1', '"format": ' + "[" * 985 + "]" * 985),
    ],
)
def test_metadata_nested_too_deep(tmp_path, change):
    model = copy_model(tmp_path / "model", change)
    result = run_on(tmp_path, PICTURE, "--model", model)
    assert result.returncode == 2
    assert_one_line(result.stderr, "model1.onnx", "")


def write_foreign_model(path):
    """Write a network of somebody else's: y = x + x."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    opset = onnx.helper.make_opsetid("", 13)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))


def test_a_model_of_somebody_else(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model1.onnx", "model2.onnx"):
        write_foreign_model(tmp_path / "model" / name)
    result = run_on(tmp_path, PICTURE, "--model", tmp_path / "model")
    assert result.returncode == 2
    assert_one_line(result.stderr, "model1.onnx", "was not written by export.py")


@pytest.mark.parametrize("content", [b"", b"this is no network", bytes(1000)])
def test_files_that_are_no_networks(tmp_path, content):
    (tmp_path / "model").mkdir()
    for name in ("model1.onnx", "model2.onnx"):
        (tmp_path / "model" / name).write_bytes(content)
    result = run_on(tmp_path, PICTURE, "--model", tmp_path / "model")
    assert result.returncode == 2
    assert_one_line(result.stderr, "model1.onnx", "")
    assert not (tmp_path / "out").exists()


def test_another_count_of_channels(tmp_path):
    """A network for grey pictures, which onnxruntime would run."""
    model = copy_model(tmp_path / "model", lambda text, name: text)
    network = onnx.load(str(model / "model1.onnx"))
    network.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    first = next(node for node in network.graph.node if "image" in node.input)
    weight = next(initializer for initializer in network.graph.initializer if initializer.name == first.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[:, :1], weight.name))
    onnx.save(network, str(model / "model1.onnx"))
    result = run_on(tmp_path, PICTURE, "--model", model)
    assert result.returncode == 2
    assert_one_line(result.stderr, "1 channels of image")


def limit_memory():
    """Let a process have eight gigabytes."""
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))


def test_a_network_that_wants_all_the_memory(tmp_path):
    """A hostile one: the largest of a million times a million zeros."""
    model = copy_model(tmp_path / "model", lambda text, name: text)
    network = onnx.load(str(model / "model2.onnx"))
    size = onnx.numpy_helper.from_array(np.int64([2**20, 2**20]), "size")
    cls = network.graph.output[0].name
    last = next(node for node in network.graph.node if cls in node.output)
    last.output[list(last.output).index(cls)] = "small"
    network.graph.initializer.append(size)
    network.graph.node.extend(
        [
            onnx.helper.make_node("ConstantOfShape", ["size"], ["huge"]),
            onnx.helper.make_node("ReduceMax", ["huge"], ["zero"], keepdims=0),
            onnx.helper.make_node("Add", ["small", "zero"], [cls]),
        ]
    )
    onnx.save(network, str(model / "model2.onnx"))
    result = run_on(tmp_path, PICTURE, "--model", model, preexec_fn=limit_memory)
    assert result.returncode == 2
    assert_one_line(result.stderr, "onnxruntime")


def change_weight(path, find, value):
    """Set a weight of a network."""
    model = onnx.load(str(path))
    initializer = next(tensor for tensor in model.graph.initializer if find in tensor.name)
    values = onnx.numpy_helper.to_array(initializer).copy()
    values.flat[0] = value
    initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("network", "weight", "output"),
    [("model1", "rpn_reg.bias", "reg_0"), ("model2", "fc_cls.bias", "cls")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_named(tmp_path, network, weight, output, value):
    model = copy_model(tmp_path / "model", lambda text, name: text)
    change_weight(model / f"{network}.onnx", weight, value)
    result = run_demo(PICTURE, "--model", model, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, "NaN or infinity", output)
    assert not list((tmp_path / "out").iterdir())


def test_weights_in_another_file_that_is_not_there(tmp_path):
    model = copy_model(tmp_path / "model", lambda text, name: text)
    network = onnx.load(str(model / "model1.onnx"))
    onnx.save(network, str(model / "model1.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert len(demo.FasterRCNN(model).classes) == 6  # with it, all is well
    (model / "weights.bin").unlink()
    result = run_demo(PICTURE, "--model", model, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, "model1.onnx", "weights.bin")


# ------------------------------------------------------------------ the same answer, always


def test_eight_threads_and_a_hundred_runs_give_the_same_bits():
    detector, image = demo.FasterRCNN(SHAPES), cv2.imread(str(PICTURE))
    upright = np.ascontiguousarray(image.transpose(1, 0, 2))
    expected = [detector(image), detector(upright)]
    assert len(expected[0].boxes) > 10
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(detector, [image, upright] * 50))
    for number, run in enumerate(runs):
        for field, other in zip(run, expected[number % 2]):
            assert field.tobytes() == other.tobytes()


def test_the_environment_may_allow_larger_pictures(tmp_path):
    cv2.imwrite(str(tmp_path / "picture.png"), np.zeros((20, 20, 3), np.uint8))
    result = run_on(tmp_path, tmp_path / "picture.png", env={**os.environ, "OPENCV_IO_MAX_IMAGE_PIXELS": "300"})
    assert result.returncode == 2
    assert "300 pixels" in result.stderr
