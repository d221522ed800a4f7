"""demo.py: its command line, what it writes, and what it stands on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import MMDETECTION, ROOT, SHAPES, call_program
from pycocotools.coco import COCO

import demo
from pictures import annotated_png, is_annotated

PICTURE = ROOT / "asset" / "shapes.png"
RESULTS = {"detections.json", "pictures.json"}


def environment(**more):
    """Return the environment for a process, without what demo.py, imported here, has set for itself."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("OPENCV_")}, **more}


def run_demo(*arguments, timeout=300, **settings):
    """Run demo.py as a process."""
    command = [sys.executable, str(ROOT / "demo.py"), *map(str, arguments)]
    settings = {"env": environment(), **settings}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **settings)


def call_demo(*arguments, encoding="utf-8"):
    """Run demo.py in this process, which is quicker; return what run_demo returns."""
    return call_program(demo.main, *arguments, encoding=encoding)


def assert_one_line(stderr, *words):
    """Check that stderr is one line from demo.py with these words in it."""
    assert stderr.startswith("demo.py: "), stderr
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert str(word) in stderr


def read_results(folder):
    """Return the entries of detections.json and the images of pictures.json."""
    results, pictures = (json.loads((folder / name).read_text()) for name in ("detections.json", "pictures.json"))
    return results, pictures["images"]


def names_in(folder):
    """Return the names of the files in a folder; those of the results are left out."""
    return {path.name for path in folder.iterdir()} - RESULTS


def write_picture(path, height=200, width=300):
    """Write a part of the bundled picture, in whose upper left corner several shapes are."""
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), cv2.imread(str(PICTURE))[:height, :width])
    return path


@pytest.fixture
def picture(tmp_path):
    """Return the path of a small picture with two shapes' worth of content."""
    return write_picture(tmp_path / "picture.png")


# ------------------------------------------------------------------ the command line


def test_bundled_picture_and_model(tmp_path):
    """The README's first command finds the shapes that dataset.py says it drew, and nothing else."""
    import dataset

    result = run_demo("--out", tmp_path, "--model", SHAPES, "--score-thr", "0.5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert str(SHAPES) in result.stdout
    entries = json.loads((tmp_path / "detections.json").read_text())
    image, boxes, labels = dataset.draw_picture(3000322)
    np.testing.assert_array_equal(cv2.imread(str(PICTURE)), image)
    found = np.array([entry["bbox"] for entry in entries])
    found[:, 2:] += found[:, :2]
    assert len(found) == len(boxes)
    for box, label in zip(boxes, labels):
        nearest = np.abs(found - box).max(axis=1).argmin()
        assert np.abs(found[nearest] - box).max() < 8
        assert entries[nearest]["category"] == dataset.CLASSES[label]
        assert entries[nearest]["category_id"] == label + 1
        assert f"{entries[nearest]['category']}" in result.stdout
    for stage in ("preprocess", "model1", "propose", "align", "model2", "detect"):
        assert f"{stage} " in result.stdout
    annotated = cv2.imread(str(tmp_path / "shapes.png"))
    assert annotated.shape == image.shape
    assert 0.01 < (annotated != image).any(axis=2).mean() < 0.5
    assert str(tmp_path / "shapes.png") in result.stdout


def test_the_bundled_model_says_what_it_knows(tmp_path, picture):
    """Only where somebody might expect more of it: on a picture of the user's."""
    result = call_demo(picture, "--out", tmp_path / "out", "--model", SHAPES)
    assert "drawn shapes only (circle, triangle, square, star, cross, crescent)" in result.stdout
    assert "drawn shapes only" not in call_demo("--out", tmp_path / "out", "--model", SHAPES).stdout
    copied = tmp_path / "model"
    copied.mkdir()
    for name in ("model1.onnx", "model2.onnx"):
        (copied / name).write_bytes((SHAPES / name).read_bytes())
    assert "drawn shapes only" not in call_demo(picture, "--out", tmp_path / "out", "--model", copied).stdout


def test_folder_glob_and_equal_names(tmp_path, picture):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("picture.png", "b.jpg", "not a picture.txt"):
        (other / name).write_bytes(picture.read_bytes())
    result = run_demo(picture, other, str(tmp_path / "*" / "b*"), "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert "3/3" in result.stderr  # the progress bar; the file that two paths name is done once
    assert names_in(tmp_path / "out") == {"b.png", "picture.png", "picture_2.png"}


def test_one_bad_picture_among_good_ones(tmp_path, picture):
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    (tmp_path / "empty.png").touch()
    result = call_demo(picture, tmp_path / "*.png", tmp_path / "none.png", "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 1
    for name in ("broken.png: not a picture", "empty.png: not a picture", "none.png: no such file"):
        assert name in result.stderr
    assert names_in(tmp_path / "out") == {"picture.png"}


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_nothing_but_a_bad_picture(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    result = call_demo(path, "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 2
    assert_one_line(result.stderr, path, "no such file" if content is None else "not a picture that OpenCV can read")
    assert not list((tmp_path / "out").glob("*"))


def test_a_wrong_argument():
    result = run_demo("--score-thr", "high")
    assert result.returncode == 2
    assert "high is not between 0 and 1" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("score", ["nan", "-0.1", "1.1", "high", "inf", ""])
def test_scores_that_do_not_exist(tmp_path, score):
    result = call_demo("--out", tmp_path / "out", f"--score-thr={score}")
    assert result.returncode == 2
    assert "--score-thr" in result.stderr.splitlines()[-1]
    assert f"{score} is not between 0 and 1" in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------ what is written


@pytest.fixture
def cameras(tmp_path):
    """Return pictures of different sizes whose names do not tell them apart; in one of them, nothing is to be found."""
    names = ["cam1/0001.png", "cam2/0001.png", "cam2/1.png", "cam1/x.png", "cam1/x.jpg"]
    files = [write_picture(tmp_path / name, 200 + number, 300) for number, name in enumerate(names)]
    cv2.imwrite(str(tmp_path / "cam2" / "grey.png"), np.full((50, 90, 3), 127, np.uint8))
    return [*files, tmp_path / "cam2" / "grey.png"]


def test_pictures_stay_apart_in_the_results(tmp_path, cameras):
    broken = tmp_path / "cam1" / "broken.png"
    broken.touch()
    result = call_demo(*cameras[:2], broken, *cameras[2:], "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 1
    results, images = read_results(tmp_path / "out")
    assert [image["file_name"] for image in images] == [str(file.relative_to(tmp_path)) for file in cameras]
    assert len({image["id"] for image in images}) == len(cameras)
    assert len({image["annotated"] for image in images}) == len(cameras)
    assert names_in(tmp_path / "out") == {image["annotated"] for image in images}
    for image, file in zip(images, cameras):
        assert (image["height"], image["width"]) == cv2.imread(str(file)).shape[:2]
        assert cv2.imread(str(tmp_path / "out" / image["annotated"])).shape[:2] == (image["height"], image["width"])
    by_id = {image["id"]: image["file_name"] for image in images}
    assert all(by_id[entry["image_id"]] == entry["file_name"] for entry in results)
    assert {entry["file_name"] for entry in results} == set(by_id.values()) - {"cam2/grey.png"}


def test_results_are_what_coco_reads(tmp_path, cameras):
    call_demo(*cameras, "--out", tmp_path / "out", "--model", SHAPES)
    coco = COCO(str(tmp_path / "out" / "pictures.json"))
    names = ["circle", "triangle", "square", "star", "cross", "crescent"]
    assert coco.cats == {number: {"id": number, "name": name} for number, name in enumerate(names, 1)}
    loaded = coco.loadRes(str(tmp_path / "out" / "detections.json"))
    entries, images = read_results(tmp_path / "out")
    assert len(loaded.anns) == len(entries) > 0
    assert set(entries[0]) == {"image_id", "file_name", "category_id", "category", "bbox", "score"}
    assert set(images[0]) == {"id", "file_name", "annotated", "height", "width"}
    assert set(loaded.getImgIds()) == {image["id"] for image in images}
    found = [len(loaded.getAnnIds(imgIds=[image["id"]])) for image in images]
    assert min(found[:-1]) > 0
    assert found[-1] == 0


def test_pictures_of_coco_keep_their_numbers(tmp_path):
    for number in (285, 139):
        write_picture(tmp_path / f"{number:012}.png")
    call_demo(tmp_path, "--out", tmp_path / "out", "--model", SHAPES)
    results, images = read_results(tmp_path / "out")
    assert [(image["id"], image["file_name"]) for image in images] == [
        (139, "000000000139.png"),
        (285, "000000000285.png"),
    ]
    assert {entry["image_id"] for entry in results} == {139, 285}


def test_a_picture_without_objects(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((50, 900, 3), 127, np.uint8))
    result = call_demo(tmp_path / "grey.png", "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    results, images = read_results(tmp_path / "out")
    assert results == []
    assert images == [{"id": 1, "file_name": "grey.png", "annotated": "grey.png", "height": 50, "width": 900}]


def test_the_input_is_never_overwritten(tmp_path, picture):
    before = picture.read_bytes()
    result = call_demo(picture, tmp_path / "." / picture.name, "--out", tmp_path, "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes() == before
    assert names_in(tmp_path) == {"picture.png", "picture_2.png"}


def test_an_annotated_picture_is_no_input_even_by_its_name(tmp_path, picture):
    """As in `demo.py pictures/*.png --out pictures`, the second time."""
    annotated = tmp_path / "annotated.png"
    annotated.write_bytes(annotated_png(cv2.imread(str(picture))))
    before = annotated.read_bytes()
    result = call_demo(annotated, picture, "--out", tmp_path / "out", "--model", SHAPES)
    assert (result.returncode, result.stderr) == (0, f"demo.py: left out, annotated by an earlier run: {annotated}\n")
    assert names_in(tmp_path / "out") == {"picture.png"}
    (tmp_path / "zebra.png").write_bytes(before)
    result = call_demo(annotated, tmp_path / "zebra.png", "--out", tmp_path, "--model", SHAPES)
    assert result.returncode == 2
    assert result.stderr == f"demo.py: left out, annotated by an earlier run: {annotated} and 1 more\n"
    assert annotated.read_bytes() == before


def test_an_input_behind_a_link_is_not_overwritten(tmp_path):
    real = write_picture(tmp_path / "out" / "a.png")
    other = write_picture(tmp_path / "other" / "a.png", 150)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.png").symlink_to(real)
    before = real.read_bytes(), other.read_bytes()
    result = call_demo(tmp_path / "links" / "b.png", other, "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert (real.read_bytes(), other.read_bytes()) == before
    assert names_in(tmp_path / "out") == {"a.png", "a_2.png", "b.png"}


def test_an_input_that_is_a_link_in_the_output_folder_is_not_replaced(tmp_path, picture):
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / "picture.png"
    link.symlink_to(picture)
    result = call_demo(link, "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert link.is_symlink()
    assert names_in(tmp_path / "out") == {"picture.png", "picture_2.png"}


@pytest.mark.parametrize("content", ["a picture", "a text", "nothing", "a link to nowhere"])
def test_files_of_somebody_else_are_not_overwritten(tmp_path, picture, content):
    theirs = tmp_path / "out" / "picture.png"
    theirs.parent.mkdir()
    if content == "a link to nowhere":
        theirs.symlink_to("nowhere")
    else:
        data = {"a picture": cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes(), "a text": b"text"}
        theirs.write_bytes(data.get(content, b""))
    before = os.readlink(theirs) if theirs.is_symlink() else theirs.read_bytes()
    for _ in range(2):  # the second run overwrites what the first one wrote, and nothing else
        result = call_demo(picture, "--out", tmp_path / "out", "--model", SHAPES)
        assert result.returncode == 0, result.stderr
        assert (os.readlink(theirs) if theirs.is_symlink() else theirs.read_bytes()) == before
        assert names_in(tmp_path / "out") == {"picture.png", "picture_2.png"}


def test_the_second_run_into_the_folder_of_the_pictures(tmp_path):
    """Annotated pictures are no inputs: the run takes the same files and writes the same results."""
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.jpg")
    runs = []
    for _ in range(2):
        result = call_demo(tmp_path, "--out", tmp_path, "--model", SHAPES)
        assert result.returncode == 0, result.stderr
        assert "2/2" in result.stderr
        runs.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert runs[0] == runs[1]
    assert set(runs[0]) - RESULTS == {"a.png", "a_2.png", "b.jpg", "b.png"}


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o002, 0o664)])
def test_results_obey_the_umask(tmp_path, picture, umask, mode):
    before = os.umask(umask)
    try:
        result = call_demo(picture, "--out", tmp_path / "out", "--model", SHAPES)
    finally:
        os.umask(before)
    assert result.returncode == 0, result.stderr
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys([*RESULTS, "picture.png"], oct(mode))


@pytest.mark.parametrize("when", ["before", "after"])  # the renaming
def test_ctrl_c_while_a_file_is_named(tmp_path, monkeypatch, when):
    """It ends the run, and is never taken for a picture that failed."""
    for number in range(3):
        write_picture(tmp_path / "pictures" / f"{number}.png")
    rename, calls = os.replace, []

    def interrupted_rename(source, target):
        calls.append(target)
        if len(calls) == 2 and when == "before":
            raise KeyboardInterrupt
        rename(source, target)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted_rename)
    result = call_demo(tmp_path / "pictures", "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "demo.py: interrupted: what was done is written"
    assert result.stderr.count("demo.py: ") == 1
    assert names_in(tmp_path / "out") == ({"0.png"} if when == "before" else {"0.png", "1.png"})
    results, images = read_results(tmp_path / "out")
    assert [image["annotated"] for image in images] == ["0.png"]
    assert {entry["image_id"] for entry in results} == {0}


# ------------------------------------------------------------------ --show


class Window:
    """Stands for OpenCV's windows: counts those that are open, and how often each was drawn."""

    def __init__(self, monkeypatch, wait_key, is_visible):
        self.shown, self.open, self.most_open, self.closed = [], set(), 0, 0
        monkeypatch.setattr(demo, "can_show", lambda: True)
        monkeypatch.setattr(cv2, "imshow", self.imshow)
        monkeypatch.setattr(cv2, "destroyAllWindows", self.destroy_all)
        monkeypatch.setattr(cv2, "waitKey", wait_key)
        monkeypatch.setattr(cv2, "getWindowProperty", lambda title, property_id: float(is_visible()))

    def imshow(self, title, image):
        """Show an image."""
        self.shown.append(image.shape)
        self.open.add(title)
        self.most_open = max(self.most_open, len(self.open))

    def destroy_all(self):
        """Close every window."""
        self.open.clear()
        self.closed += 1


@pytest.mark.parametrize("answer", ["key", "closed", "slow key"])
def test_one_window_shows_all_pictures_and_is_closed(tmp_path, monkeypatch, answer):
    for number in range(3):
        write_picture(tmp_path / "pictures" / f"{number}.png", 200 + number)
    keys = [-1, -1, 32] * 3
    wait_key = {"key": lambda ms: 32, "closed": lambda ms: -1, "slow key": lambda ms: keys.pop(0)}[answer]
    window = Window(monkeypatch, wait_key, lambda: answer != "closed")
    result = call_demo(tmp_path / "pictures", "--out", tmp_path / "out", "--model", SHAPES, "--show")
    assert result.returncode == 0, result.stderr
    assert window.shown == [(200, 300, 3), (201, 300, 3), (202, 300, 3)]
    assert (window.most_open, window.open, window.closed) == (1, set(), 1)
    assert keys == ([] if answer == "slow key" else [-1, -1, 32] * 3)


def test_ctrl_c_at_a_window_closes_it(tmp_path, monkeypatch, picture):
    def interrupt(ms):
        raise KeyboardInterrupt

    window = Window(monkeypatch, interrupt, lambda: True)
    result = call_demo(picture, "--out", tmp_path / "out", "--model", SHAPES, "--show")
    assert result.returncode == 130
    assert (window.most_open, window.open, window.closed) == (1, set(), 1)


@pytest.mark.parametrize("display", [{}, {"DISPLAY": ""}, {"DISPLAY": ":77"}, {"WAYLAND_DISPLAY": "wayland-7"}])
def test_a_window_needs_a_display(tmp_path, monkeypatch, display):
    """Without, Qt would abort the whole program."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in display.items():
        monkeypatch.setenv(name, value)
    result = call_demo("--show", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "--show needs a display" in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------ what it stands on

RUNTIME = ("numpy", "numpy.libs", "cv2", "opencv_python*", "onnxruntime", "tqdm", "msgspec", "typing_extensions.py")
OF_ONNXRUNTIME = ("flatbuffers", "google", "packaging")


def link_packages(folder, *names):
    """Link installed packages into a folder, which then is an environment that holds nothing else."""
    site = Path(np.__file__).parents[1]
    folder.mkdir()
    for name in names:
        for path in site.glob(name):
            (folder / path.name).symlink_to(path)
    return environment(PYTHONPATH=str(folder))


def run_alone(packages, *arguments, cwd):
    """Run Python in an environment of link_packages, without what is installed beside it."""
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, env=packages, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def deploy(folder):
    """Copy what runs an export, and an export, into a folder."""
    folder.mkdir()
    (folder / "detectors").mkdir()
    files = ["demo.py", "postprocess.py", "pictures.py", "videos.py"]
    files += [path.relative_to(ROOT) for path in (ROOT / "detectors").glob("*.py")]
    for file in files:
        (folder / file).write_bytes((ROOT / file).read_bytes())
    for name in ("model1.onnx", "model2.onnx"):
        (folder / name).write_bytes((SHAPES / name).read_bytes())
    return folder


def test_a_copy_runs_with_few_packages(tmp_path, picture):
    """The programs' files, an export and five packages are all that deployment takes; the answer is the same."""
    few = link_packages(tmp_path / "site", *RUNTIME, *OF_ONNXRUNTIME)
    folder = deploy(tmp_path / "elsewhere")
    result = run_alone(few, "demo.py", picture, "--model", ".", "--out", tmp_path / "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    call_demo(picture, "--model", SHAPES, "--out", tmp_path / "here")
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    code = "import detectors, pictures, postprocess; print(detectors.__file__)"
    assert run_alone(few, "-c", code, cwd=folder).stdout.startswith(str(folder))
    missing = run_alone(few, "-c", "import torch", cwd=folder)
    assert "No module named 'torch'" in missing.stderr


def test_help_with_few_packages_and_with_none(tmp_path):
    few, none = (
        link_packages(tmp_path / name, *packages)
        for name, packages in (("few", [*RUNTIME, *OF_ONNXRUNTIME]), ("none", []))
    )
    for packages in (few, none):
        result = run_alone(packages, ROOT / "demo.py", "--help", cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert "--score-thr" in result.stdout
    result = run_alone(none, ROOT / "demo.py", cwd=tmp_path)
    assert result.returncode == 2
    assert_one_line(result.stderr, "No module named", "uv run demo.py")


def test_postprocess_imports_numpy_alone(tmp_path):
    few = link_packages(tmp_path / "site", "numpy", "numpy.libs")
    code = "import postprocess, sys; print(any(m in sys.modules for m in ('cv2', 'onnxruntime', 'torch')))"
    result = run_alone(few, "-c", code, cwd=ROOT)
    assert result.stdout == "False\n", result.stderr


STATE = """
import logging, os, signal, socket, sys, warnings
{libraries}

def state():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    levels = logging.root.manager.disable, logging.root.level, list(logging.root.handlers)
    return dict(os.environ), list(warnings.filters), levels, socket.getdefaulttimeout(), handlers, list(sys.path)

before = state()
{modules}
print(state() == before, *sorted({{'torch', 'torchvision', 'mmcv', 'mmdet'}} & set(sys.modules)))
"""


def imported(libraries, modules):
    """Return whether importing modules left the process as the libraries had made it, and which frameworks are in."""
    code = STATE.format(
        libraries="\n".join(f"import {name}" for name in libraries),
        modules="\n".join(f"import {name}" for name in modules),
    )
    command, settings = [sys.executable, "-c", code], {"env": environment(), "cwd": ROOT, "timeout": 300}
    result = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def modules_in(package):
    """Return the names of a package and of all its modules."""
    return [package, *(f"{package}.{path.stem}" for path in (ROOT / package).glob("*.py") if path.stem != "__init__")]


def test_imports_change_nothing_and_need_no_framework():
    modules = ["postprocess", "pictures", *modules_in("detectors"), "sources"]
    assert imported(["cv2", "msgspec", "numpy", "onnxruntime"], modules) == ["True"]


def test_importing_the_graphs_changes_nothing_and_brings_no_framework():
    pytest.importorskip("onnxscript", reason="needs onnxscript: uv run --extra test pytest")
    assert imported(["cv2", "msgspec", "onnxruntime", "onnxscript"], ["compare", *modules_in("graphs")]) == ["True"]


def test_importing_the_sources_changes_nothing():
    pytest.importorskip("mmdet", reason=MMDETECTION)
    libraries = ["cv2", "msgspec", "onnxruntime", "torchvision", "mmcv.ops", "mmdet.apis", "mmdet.models"]
    result = imported(libraries, modules_in("sources"))
    assert result == ["True", "mmcv", "mmdet", "torch", "torchvision"]


# ------------------------------------------------------------------ everyday use


def test_folders_of_folders(tmp_path):
    for name in ("a.png", "b/c.png", "b/d/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_picture(tmp_path / "in" / name)
    (tmp_path / "in" / "b" / "words.txt").write_text("no picture")
    arguments = [tmp_path / "in", "--out", tmp_path / "out", "--model", SHAPES]
    assert call_demo(*arguments).returncode == 0
    assert names_in(tmp_path / "out") == {"a.png"}
    result = call_demo(*arguments, "--recursive")
    assert result.returncode == 0, result.stderr
    assert names_in(tmp_path / "out") == {"a.png", "a_2.png", "c.png"}
    lines = [line for line in result.stdout.splitlines() if line.endswith(" ms)")]
    assert [line.split(": ")[0] for line in lines] == [
        str(tmp_path / "in" / n) for n in ("a.png", "b/c.png", "b/d/a.png")
    ]


def test_a_line_for_each_picture(tmp_path):
    pictures = [write_picture(tmp_path / "in" / "shapes.png", 303, 489), tmp_path / "in" / "black.png"]
    cv2.imwrite(str(pictures[1]), np.zeros((100, 200, 3), np.uint8))
    result = call_demo(*pictures, "--out", tmp_path / "out", "--model", SHAPES, "--score-thr", "0.9")
    lines = [line.rpartition(" (")[0] for line in result.stdout.splitlines() if line.endswith(" ms)")]
    assert lines == [
        f"{pictures[0]}: 3 circle, 2 triangle, 4 square, 1 star, 1 crescent",
        f"{pictures[1]}: nothing",
    ]


def test_some_classes_only(tmp_path):
    arguments = [PICTURE, "--out", tmp_path, "--model", SHAPES, "--score-thr", "0.9", "--classes"]
    assert call_demo(*arguments, "star, circle").returncode == 0
    entries, _ = read_results(tmp_path)
    assert [entry["category"] for entry in entries].count("circle") == 3
    assert {entry["category"] for entry in entries} == {"star", "circle"}
    wrong = call_demo(*arguments, "circle,dog")
    assert wrong.returncode == 2
    assert_one_line(wrong.stderr, "no class 'dog'", "it has circle, triangle")
    assert_one_line(call_demo(*arguments, "circle,").stderr, "no class ''")


@pytest.mark.parametrize("name", ["shapes", "shapes_mask", "shapes_atss"])
def test_the_arrays_of_every_stage_are_saved(tmp_path, name):
    from detectors import load, rle

    result = call_demo(PICTURE, "--out", tmp_path, "--model", SHAPES.parent / name, "--save-stages", tmp_path / "s.npz")
    assert result.returncode == 0, result.stderr
    assert f"arrays: {tmp_path / 's.npz'}" in result.stdout
    stages = {}
    load(SHAPES.parent / name)(cv2.imread(str(PICTURE)), lambda stage, **arrays: stages.update({stage: arrays}))
    saved = np.load(tmp_path / "s.npz")  # refuses what would have to be unpickled
    assert set(saved) == {f"{stage}.{key}" for stage, arrays in stages.items() for key in arrays}
    nothing = ["--set", "head.score_threshold=0.9999999"]
    assert call_demo(PICTURE, "--out", tmp_path, "--model", SHAPES.parent / name, "--save-stages",
                     tmp_path / "none.npz", *nothing).returncode == 0  # fmt: skip
    masks = dict(np.load(tmp_path / "none.npz")).get("paste.masks")
    assert masks is None or (masks.shape, masks.dtype) == ((0, 303, 489), bool)
    for key in saved:
        stage, _, array = key.partition(".")
        expected = stages[stage][array]
        if key == "paste.masks":
            expected = [rle.decode(mask) for mask in expected]
        np.testing.assert_array_equal(saved[key], expected)


def test_stages_are_those_of_one_picture(tmp_path):
    pictures = [write_picture(tmp_path / name) for name in ("a.png", "b.png")]
    result = call_demo(*pictures, "--out", tmp_path / "out", "--save-stages", tmp_path / "stages.npz")
    assert result.returncode == 2
    assert_one_line(result.stderr, "--save-stages: name one picture, not 2")
    before = pictures[0].read_bytes()
    for path in (tmp_path / "no" / "stages.npz", pictures[0]):
        result = call_demo(pictures[0], "--out", tmp_path / "out", "--save-stages", path)
        assert result.returncode == 2
        assert_one_line(result.stderr, f"--save-stages {path}: name an .npz file in a folder that is there")
    assert pictures[0].read_bytes() == before
    (tmp_path / "clip.mp4").write_text("whatever")
    result = call_demo(tmp_path / "clip.mp4", "--out", tmp_path / "out", "--save-stages", tmp_path / "stages.npz")
    assert_one_line(result.stderr, "--save-stages: name one picture, not a video")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_execution_provider_that_is_asked_for(tmp_path, picture, monkeypatch):
    import onnxruntime

    from detectors import Execution, ModelError, load

    available = [name for name in onnxruntime.get_available_providers() if name != "CPUExecutionProvider"]
    for name in available:
        session = load(SHAPES, execution=Execution((name,))).networks["model2.onnx"].session
        assert session.get_providers() == [name, "CPUExecutionProvider"]
    session = load(SHAPES, execution=Execution(("cpu",), {}, 1)).networks["model1.onnx"].session
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1
    assert load(SHAPES).networks["model1.onnx"].session.get_session_options().intra_op_num_threads == 0
    assert call_demo(picture, "--out", tmp_path / "out", "--provider", ",").returncode == 2
    missing = call_demo(picture, "--out", tmp_path / "out", "--provider", "Moon,CPU")
    assert missing.returncode == 2
    assert_one_line(missing.stderr, "--provider Moon: this onnxruntime has only", "cpu")
    with monkeypatch.context() as patch:  # installed, but onnxruntime cannot start it: it would only warn
        patch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        with pytest.raises(ModelError, match="--provider cuda: it cannot run .*model1.onnx here"):
            load(SHAPES, execution=Execution(("cuda",)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], ["0 is not a number of threads"]),
        (["--threads", "many"], ["many is not a number of threads"]),
        (["--provider-option", "device_id"], ["is not NAME=VALUE"]),
        (["--provider-option", "device_id=1"], ["name the --provider that it is for"]),
        (["--provider", "cpu", "--provider-option", "device_id=1"], ["name the --provider that it is for"]),
        (["--provider", "cuda"], ["this onnxruntime has only", "onnxruntime-gpu"]),
    ],
)
def test_how_it_runs_is_checked(tmp_path, picture, arguments, words):
    result = call_demo(picture, "--out", tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert all(word in result.stderr.splitlines()[-1] for word in words)


# ------------------------------------------------------------------ pipes and closed files

STDOUT = [("demo.py", kind, unbuffered) for kind in ("closed pipe", "full disk", "none") for unbuffered in ("", "1")]
STDOUT += [("explain.py", "closed pipe", ""), ("explain.py", "closed pipe", "1"), ("explain.py", "none", "")]


@pytest.mark.parametrize(("program", "stdout", "unbuffered"), STDOUT)
def test_stdout_that_takes_nothing(tmp_path, program, stdout, unbuffered):
    """The first as in `demo.py picture.png | head -1`: the work is done; what was not printed is said in one line."""
    read, write = os.pipe()
    os.close(read)
    out = {"closed pipe": f">&{write}", "full disk": ">/dev/full", "none": ">&-"}[stdout]
    command = f'"$0" {ROOT / program} {PICTURE} --model {SHAPES} --out {tmp_path} {out}'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(PYTHONUNBUFFERED=unbuffered),
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
        assert len(list(tmp_path.iterdir())) == (3 if program == "demo.py" else 10)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_stderr_that_is_closed(tmp_path, picture, closed):
    """The progress bar and the line about the bad picture go nowhere, above all not into a file."""
    (tmp_path / "empty.png").touch()
    paths = f"{picture} {tmp_path / 'empty.png'}"
    command = f'"$0" {ROOT / "demo.py"} {paths} --model {SHAPES} --out {tmp_path / "out"} {closed}'
    bash, settings = ["bash", "-c", command, sys.executable], {"env": environment(), "timeout": 60}
    result = subprocess.run(bash, stdout=subprocess.PIPE, check=False, **settings)
    assert result.returncode == 1
    assert (b"1 annotated" in result.stdout) == (closed == "2>&-")
    results, images = read_results(tmp_path / "out")
    assert len(results) > 0
    assert [image["annotated"] for image in images] == ["picture.png"]
    expected = annotated_png(cv2.imread(str(tmp_path / "out" / "picture.png")))
    assert (tmp_path / "out" / "picture.png").read_bytes() == expected
    assert is_annotated(tmp_path / "out" / "picture.png")
