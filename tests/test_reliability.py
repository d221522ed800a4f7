"""Bad input, broken and hostile files: one clear line, the documented exit status, nothing lost, the rest done."""

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
from conftest import ROOT, SHAPES, default_sigint
from PIL import Image
from test_demo import assert_one_line, call_demo, environment, names_in, read_results, run_demo
from test_detectors import change_metadata, copy_model
from test_pictures import colour_modes
from test_videos import write_clip

import detectors
import pictures

PICTURE = ROOT / "asset" / "shapes.png"


def run_on(tmp_path, *arguments, run=call_demo, **settings):
    """Run demo.py with the bundled model into tmp_path/out."""
    return run("--model", SHAPES, "--out", tmp_path / "out", *arguments, **settings)


def good_and(tmp_path, name, content, **settings):
    """Write a good picture and another file; run demo.py on both; check that the good one is done and return stderr."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(PICTURE.read_bytes())
    (folder / name).write_bytes(content)
    result = run_on(tmp_path, folder, **settings)
    assert result.returncode == 1, result.stderr
    assert names_in(tmp_path / "out") == {"good.png"}
    results, images = read_results(tmp_path / "out")
    assert {entry["file_name"] for entry in results} == {image["file_name"] for image in images} == {"good.png"}
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.png", PICTURE.read_bytes()[:2000]),
        ("cut.webp", encoded(np.zeros((50, 50, 3), np.uint8), ".webp")[:30]),
    ],
)
def test_opencv_adds_no_lines_of_its_own(tmp_path, name, content):
    """It would, about these files; seen only as a process."""
    (tmp_path / name).write_bytes(content)
    result = run_on(tmp_path, tmp_path / name, run=run_demo)
    assert result.returncode == 2
    assert_one_line(result.stderr, name, "not a picture that OpenCV can read")


def test_a_picture_that_is_too_large(tmp_path):
    """Its header says so; the limit is what a process sets before it imports OpenCV."""
    line = good_and(tmp_path, "huge.png", png_header(30_000, 30_000), run=run_demo)
    assert "huge.png: more than 134217728 pixels" in line


def test_the_environment_may_set_another_limit(tmp_path):
    cv2.imwrite(str(tmp_path / "picture.png"), np.zeros((20, 20, 3), np.uint8))
    limit = environment(OPENCV_IO_MAX_IMAGE_PIXELS="300")
    result = run_on(tmp_path, tmp_path / "picture.png", run=run_demo, env=limit)
    assert result.returncode == 2
    assert_one_line(result.stderr, "more than 300 pixels")


def test_every_kind_of_picture(tmp_path):
    (tmp_path / "pictures").mkdir()
    paths = colour_modes(tmp_path / "pictures")
    result = run_on(tmp_path, *paths)
    assert result.returncode == 0, result.stderr
    assert names_in(tmp_path / "out") == {f"{path.stem}.png" for path in paths} | {"animated_2.png"}
    turned = cv2.imread(str(tmp_path / "out" / "turned.png"))
    assert turned.shape == (120, 80, 3)


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    first = Image.open(PICTURE).convert("P")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    Image.open(tmp_path / "moving.gif").convert("RGB").save(tmp_path / "still.png")
    result = run_on(tmp_path, tmp_path / "moving.gif", tmp_path / "still.png")
    assert result.returncode == 0, result.stderr
    results, _ = read_results(tmp_path / "out")
    names = ("moving.gif", "still.png")
    moving, still = ([entry for entry in results if entry["file_name"] == name] for name in names)
    assert len(moving) > 5
    assert [entry["bbox"] for entry in moving] == [entry["bbox"] for entry in still]


NAMES = ["with space.png", "图片 é.png", "-dash.png", "1.png", "[x]*.png", "new\nline.png", "n" * 251 + ".png"]
NAMES += [os.fsdecode(b"not utf-8 \xff.png")]


def check_name(tmp_path, name, shown_as, run, **settings):
    """Run demo.py on a picture of this name and check how it is written and, on such a stdout, shown."""
    (tmp_path / name).write_bytes(PICTURE.read_bytes())
    result = run_on(tmp_path, tmp_path / name, run=run, **settings)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / name).exists()
    assert json.loads((tmp_path / "out" / "detections.json").read_text())[0]["file_name"] == name
    shown = str(tmp_path / "out" / name)
    if not shown.isprintable() or (shown_as == "ascii" and not shown.isascii()):
        shown = ascii(shown)[1:-1]
    assert f"1 annotated, 11 detections: {shown}, " in result.stdout.splitlines()[-1].replace("'", "")
    assert result.stdout.splitlines()[-1].endswith("detections.json")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of stdout
def test_names_of_every_kind(tmp_path, name, encoding):
    check_name(tmp_path, name, encoding, call_demo, encoding=encoding)


@pytest.mark.parametrize(("name", "encoding"), [(NAMES[1], "ascii"), (NAMES[1], "utf-8"), (NAMES[-1], "utf-8")])
def test_names_as_a_process(tmp_path, name, encoding):
    check_name(tmp_path, name, encoding, run_demo, env=environment(PYTHONIOENCODING=encoding))


def test_a_name_that_begins_with_a_dash(tmp_path, monkeypatch):
    (tmp_path / "-dash.png").write_bytes(PICTURE.read_bytes())
    monkeypatch.chdir(tmp_path)
    result = run_on(tmp_path, "--", "-dash.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "-dash.png").exists()


def test_one_pixel(tmp_path):
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((1, 1, 3), np.uint8))
    result = run_on(tmp_path, tmp_path / "one.png")
    assert result.returncode == 0, result.stderr
    assert cv2.imread(str(tmp_path / "out" / "one.png")).shape == (1, 1, 3)


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
    assert len(names_in(tmp_path / "out")) == 1


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "text.txt").touch()
    result = run_on(tmp_path, tmp_path)
    assert result.returncode == 2
    assert_one_line(result.stderr, tmp_path, "no pictures in this folder")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ files that are none


def test_a_pipe_is_not_waited_for(tmp_path):
    """Left out where it is found in a folder, told where it is named; as processes, which can be ended if they wait."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(PICTURE.read_bytes())
    os.mkfifo(folder / "pipe.png")
    result = run_on(tmp_path, folder, run=run_demo, timeout=30)
    assert (result.returncode, result.stderr) == (0, "")
    assert names_in(tmp_path / "out") == {"good.png"}
    for path in (folder / "pipe.png", folder / "p*.png", "/dev/zero"):
        result = run_on(tmp_path, path, run=run_demo, timeout=30)
        assert result.returncode == 2
        assert_one_line(result.stderr, "/dev/zero" if path == "/dev/zero" else "pipe.png", "not a regular file")


def test_a_pipe_where_a_result_should_go(tmp_path):
    """It is not read to see whether it is an annotated picture, and not replaced."""
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "shapes.png")
    result = run_on(tmp_path, PICTURE, run=run_demo, timeout=20)
    assert result.returncode == 0, result.stderr
    assert names_in(tmp_path / "out") == {"shapes.png", "shapes_2.png"}


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["camera:93"], ["camera:93", "no such camera"]),
        (["broken.mp4"], ["broken.mp4", "not a video that OpenCV can read"]),
        (["nothing.mp4"], ["nothing.mp4", "no such file"]),
        (["empty", "--recursive"], ["empty", "no pictures"]),
        ([PICTURE, "--provider", "moon"], ["--provider moon", "this onnxruntime has only", "cpu"]),
        ([PICTURE, "--provider", "cpu,moon"], ["--provider moon", "this onnxruntime has only", "cpu"]),
        ([PICTURE, "--provider-option", "device_id=1"], ["name the --provider"]),
        ([PICTURE, "--classes", "circle,unicorn"], ["no class 'unicorn'", "circle, triangle"]),
        ([PICTURE, "--classes", ""], ["no class ''"]),
        ([PICTURE, "--save-stages", "stages.txt"], ["stages.txt", ".npz"]),
        ([PICTURE, "--save-stages", "nothing/stages.npz"], ["stages.npz", "a folder that is there"]),
        ([PICTURE, "--save-stages", "read only/stages.npz"], ["Permission denied"]),
        ([PICTURE, "--out", "read only"], ["Permission denied"]),
        ([PICTURE, "--out", "read only/out"], ["Permission denied"]),
        (["clip.mp4", "--out", "read only"], ["clip.mp4", "read only may not be written"]),
    ],
    ids=str,
)
@pytest.mark.skipif(sys.platform != "linux", reason="root may write everything")
def test_what_can_go_wrong_with_an_option(tmp_path, arguments, words):
    """One line, exit status 2, and nothing is left in the folders."""
    (tmp_path / "broken.mp4").write_text("words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "read only").mkdir(mode=0o500)
    if arguments[0] == "clip.mp4":
        write_clip(tmp_path / "clip.mp4", 2)
    result = run_demo("--model", SHAPES, *arguments, cwd=tmp_path, preexec_fn=obey_permissions)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("demo.py: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0]
    assert not list((tmp_path / "read only").iterdir())
    assert not list(tmp_path.glob("output/*"))


# ------------------------------------------------------------------ disks and permissions


def small_files_only():
    """Let a process write no file larger than 4 kB, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_full_disk(tmp_path):
    """The annotated picture of an earlier run stays, because the new one has no room."""
    (tmp_path / "out").mkdir()
    old = pictures.annotated_png(np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "out" / "shapes.png").write_bytes(old)
    result = run_on(tmp_path, PICTURE, run=run_demo, preexec_fn=small_files_only)
    assert result.returncode == 2
    assert_one_line(result.stderr, PICTURE, "File too large")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("shapes.png", old)]


def obey_permissions():
    """Let root, too, read and write only what the permissions of a file allow it."""
    drop_capability = 24  # PR_CAPBSET_DROP of Linux's prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop_capability, capability, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="root may read and write everything")
def test_a_folder_in_a_folder_that_may_not_be_read(tmp_path):
    (tmp_path / "in" / "open").mkdir(parents=True)
    (tmp_path / "in" / "open" / "shapes.png").write_bytes(PICTURE.read_bytes())
    (tmp_path / "in" / "closed").mkdir(mode=0)
    result = run_on(tmp_path, tmp_path / "in", "--recursive", run=run_demo, preexec_fn=obey_permissions)
    assert result.returncode == 1
    assert f"demo.py: {tmp_path / 'in' / 'closed'}: Permission denied" in result.stderr
    assert names_in(tmp_path / "out") == {"shapes.png"}


@pytest.mark.skipif(sys.platform != "linux", reason="root may read and write everything")
def test_permissions(tmp_path):
    closed, unlisted, read_only = tmp_path / "closed.png", tmp_path / "unlisted", tmp_path / "read only"
    closed.write_bytes(PICTURE.read_bytes())
    closed.chmod(0)
    unlisted.mkdir(mode=0)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link.png").symlink_to(unlisted / "x.png")  # where one may not even look
    named = closed, unlisted, tmp_path / "links", PICTURE
    result = run_on(tmp_path, *named, run=run_demo, preexec_fn=obey_permissions)
    assert result.returncode == 1
    assert f"demo.py: {closed}: Permission denied" in result.stderr
    assert f"demo.py: {unlisted}: this folder may not be read" in result.stderr
    assert f"demo.py: {tmp_path / 'links' / 'link.png'}: Permission denied" in result.stderr
    assert names_in(tmp_path / "out") == {"shapes.png"}
    read_only.mkdir(mode=0o500)
    result = run_on(tmp_path, PICTURE, "--out", read_only, run=run_demo, preexec_fn=obey_permissions)
    assert result.returncode == 2
    assert_one_line(result.stderr, PICTURE, "Permission denied")
    assert not list(read_only.iterdir())


def test_an_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "out").write_text("a file")
    result = run_on(tmp_path, PICTURE)
    assert result.returncode == 2
    assert_one_line(result.stderr, tmp_path / "out", "File exists")


# ------------------------------------------------------------------ Ctrl-C


def test_ctrl_c_keeps_what_is_done(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(PICTURE.read_bytes())
    command = [sys.executable, ROOT / "demo.py", tmp_path, "--model", SHAPES, "--out", tmp_path / "out"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    process = subprocess.Popen([str(part) for part in command], preexec_fn=default_sigint, **pipes)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.png"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    done = {path.stem for path in (tmp_path / "out").glob("*.png")}
    results, images = read_results(tmp_path / "out")
    listed = {image["file_name"][: -len(".png")] for image in images}
    assert {f"{entry['image_id']}.png" for entry in results} == {image["file_name"] for image in images}
    assert 3 <= len(done) < 60
    assert done - {max(done, key=files_in_order(tmp_path).index)} <= listed <= done
    assert not list((tmp_path / "out").glob("*.partial"))


def files_in_order(folder):
    """Return the stems of the pictures in a folder in the order in which demo.py takes them."""
    return [os.path.basename(path)[: -len(".png")] for path in pictures.find_pictures([str(folder)])[0]]


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of stdout
def test_class_names_that_opencv_cannot_draw(tmp_path, encoding):
    names = ["圆", "三角形", "square", "étoile", "十字", "月\u3000牙"]
    model = copy_model(tmp_path / "model", change_metadata("classes", names))
    result = call_demo(PICTURE, "--model", model, "--out", tmp_path / "out", encoding=encoding)
    assert result.returncode == 0, result.stderr
    assert ("圆" if encoding == "utf-8" else r"\u5706") in result.stdout
    results, _ = read_results(tmp_path / "out")
    assert {entry["category"] for entry in results} == {"圆", "三角形", "square", "étoile", "月\u3000牙"}
    found = detectors.load(SHAPES)(cv2.imread(str(PICTURE)))
    drawable = ["class 1", "class 2", "square", "class 4", "class 5", "class 6"]
    expected = pictures.draw(cv2.imread(str(PICTURE)), found.where(found.scores >= 0.3), drawable)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / "shapes.png")), expected)


def limit_memory():
    """Let a process have eight gigabytes."""
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))


def test_a_network_that_wants_all_the_memory(tmp_path):
    """A hostile one: the largest of a million times a million zeros."""
    model = copy_model(tmp_path / "model")
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
    result = run_demo(PICTURE, "--model", model, "--out", tmp_path / "out", preexec_fn=limit_memory)
    assert result.returncode == 2
    assert_one_line(result.stderr, "onnxruntime")
