"""demo.py: its preprocessing against MMDetection's, its drawing, and its command line as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import ROOT, SHAPES

import demo


def run_demo(*arguments, cwd=None, **settings):
    """Run demo.py as a process."""
    command = [sys.executable, str(ROOT / "demo.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False, **settings)


def assert_one_line(stderr, *words):
    """Check that stderr is one line from demo.py with these words in it."""
    assert stderr.startswith("demo.py: "), stderr
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert str(word) in stderr


@pytest.fixture
def picture(tmp_path):
    """Return the path of a small picture with two shapes' worth of content."""
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), cv2.imread(str(ROOT / "asset" / "shapes.png"))[:200, :300])
    return path


# ------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("scale", [(1333, 800), (512, 384), (333, 200)])
def test_preprocessing_is_bit_equal_to_mmdetection(photographs, scale):
    from mmdet.datasets.pipelines import Compose

    norm = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 65.478, 57.375], "to_rgb": scale != (512, 384)}
    steps = [{"type": "Resize", "keep_ratio": True}, {"type": "RandomFlip"}, {"type": "Normalize", **norm}]
    steps += [{"type": "Pad", "size_divisor": 32}, {"type": "ImageToTensor", "keys": ["img"]}]
    steps += [{"type": "Collect", "keys": ["img"]}]
    augmentation = {"type": "MultiScaleFlipAug", "img_scale": scale, "flip": False, "transforms": steps}
    pipeline = Compose([{"type": "LoadImageFromWebcam"}, augmentation])
    odd = [np.ascontiguousarray(photographs["cat"][:37, :301]), np.ascontiguousarray(photographs["cat"][:300, :2])]
    for image in [*photographs.values(), *odd]:
        expected = pipeline({"img": image})
        meta = expected["img_metas"][0].data
        blob, image_size, scale_factor = demo.preprocess(image, scale, norm["mean"], norm["std"], norm["to_rgb"], 32)
        assert blob.dtype == np.float32
        np.testing.assert_array_equal(blob[0], expected["img"][0].numpy())
        assert tuple(image_size) == meta["img_shape"][:2]
        np.testing.assert_array_equal(scale_factor, meta["scale_factor"])


# ------------------------------------------------------------------ drawing


@pytest.mark.parametrize("size", [(400, 600), (40, 60), (1500, 2000)])
def test_labels_are_never_cut_off(size):
    """The patch below a label is drawn whole wherever the box is: it covers as many pixels as in the middle."""
    height, width = size
    blank = np.full((*size, 3), 7, np.uint8)
    places = [(width / 3, height / 2), (0, 0), (width, 0), (0, height), (width, height), (-50, -50), (width + 50, 10)]
    areas = []
    for x, y in places:
        image = blank.copy()
        demo.draw_label(image, np.float32([x, y, x + 5, y + 5]), "crescent 0.97", (0, 200, 255))
        areas.append((image != blank).any(axis=2).sum())
    assert areas[0] > 50
    assert len(set(areas)) == 1


def test_neighbouring_classes_have_different_colours():
    colours = np.int64([demo.colour_of(label) for label in range(80)])
    assert np.abs(colours[1:] - colours[:-1]).max(axis=1).min() > 60
    assert len({tuple(colour) for colour in colours}) > 60


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
    np.testing.assert_array_equal(cv2.imread(str(ROOT / "asset" / "shapes.png")), image)
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


def test_detections_are_what_coco_reads(tmp_path):
    from pycocotools.coco import COCO

    (tmp_path / "000000000139.png").write_bytes((ROOT / "asset" / "shapes.png").read_bytes())
    run_demo(tmp_path / "000000000139.png", "--out", tmp_path, "--model", SHAPES)
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert set(entries[0]) == {"image_id", "file_name", "category_id", "category", "bbox", "score"}
    coco = COCO()
    coco.dataset = {"images": [{"id": 139}], "annotations": [], "categories": [{"id": i} for i in range(1, 7)]}
    coco.createIndex()
    assert len(coco.loadRes(entries).anns) == len(entries) > 0


def test_folder_glob_and_equal_names(tmp_path, picture):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("picture.png", "b.jpg", "not a picture.txt"):
        (other / name).write_bytes(picture.read_bytes())
    result = run_demo(picture, other, str(tmp_path / "*" / "b*"), "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert "3/3" in result.stderr  # the progress bar; the file that two paths name is done once
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "b.png",
        "detections.json",
        "picture.png",
        "picture_2.png",
    ]


def test_one_bad_picture_among_good_ones(tmp_path, picture):
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    (tmp_path / "empty.png").touch()
    result = run_demo(picture, tmp_path / "*.png", tmp_path / "none.png", "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 1
    for name in ("broken.png: not a picture", "empty.png: not a picture", "none.png: no such file"):
        assert name in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"picture.png", "detections.json"}


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_nothing_but_a_bad_picture(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    result = run_demo(path, "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 2
    assert_one_line(result.stderr, path)
    assert not list((tmp_path / "out").glob("*"))


def test_a_picture_without_objects(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((50, 900, 3), 127, np.uint8))
    result = run_demo(tmp_path / "grey.png", "--out", tmp_path / "out", "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []


def test_the_input_is_never_overwritten(tmp_path, picture):
    before = picture.read_bytes()
    result = run_demo(picture, tmp_path / "." / picture.name, "--out", tmp_path, "--model", SHAPES)
    assert result.returncode == 0, result.stderr
    assert picture.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detections.json", "picture.png", "picture_2.png"]


def test_no_proposals(tmp_path, picture):
    """An RPN that proposes nothing: the head runs on nothing, and nothing is found."""

    def propose_nothing(text, name):
        config = json.loads(text)
        config["rpn"]["min_bbox_size"] = 10000
        return json.dumps(config)

    model = copy_model(tmp_path / "model", propose_nothing)
    result = run_demo(picture, "--out", tmp_path / "out", "--model", model)
    assert result.returncode == 0, result.stderr
    assert "0 detections" in result.stdout


def copy_model(folder, change=None):
    """Copy the bundled pair, its metadata changed by a function of the text (None: metadata left out)."""
    folder.mkdir()
    for name in ("model1.onnx", "model2.onnx"):
        model = onnx.load(str(SHAPES / name))
        text = model.metadata_props[0].value
        del model.metadata_props[:]
        if change:
            onnx.helper.set_model_props(model, {"detector": change(text, name)})
        onnx.save(model, str(folder / name))
    return folder


def change_json(**values):
    """Return a function that sets keys of the metadata."""
    return lambda text, name: json.dumps({**json.loads(text), **values})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, ["model1.onnx", "not written by export.py"]),
        (lambda text, name: text[:-1], ["model1.onnx", "not JSON"]),
        (change_json(format=2), ["model1.onnx", "format"]),
        (change_json(type="yolo"), ["model1.onnx", "yolo"]),
        (
            lambda text, name: '{"format": 1, "type": "faster_rcnn", "pair": "x"}',
            ["model1.onnx", "has no classes"],
        ),
        (lambda text, name: change_json(pair=name)(text, name), ["different exports"]),
    ],
)
def test_models_that_do_not_fit(tmp_path, picture, change, words):
    result = run_demo(picture, "--model", copy_model(tmp_path / "model", change), "--out", tmp_path / "out")
    assert result.returncode == 2
    assert_one_line(result.stderr, *words)


def test_missing_broken_and_swapped_models(tmp_path, picture):
    result = run_demo(picture, "--model", tmp_path / "nowhere")
    assert result.returncode == 2
    assert_one_line(result.stderr, "nowhere", "export.py")

    broken = copy_model(tmp_path / "broken", lambda text, name: text)
    (broken / "model1.onnx").write_bytes((broken / "model1.onnx").read_bytes()[:1000])
    result = run_demo(picture, "--model", broken)
    assert result.returncode == 2
    assert_one_line(result.stderr, "model1.onnx", "cannot be loaded")

    swapped = copy_model(tmp_path / "swapped", lambda text, name: text)
    (swapped / "model1.onnx").rename(swapped / "x")
    (swapped / "model2.onnx").rename(swapped / "model1.onnx")
    (swapped / "x").rename(swapped / "model2.onnx")
    result = run_demo(picture, "--model", swapped)
    assert result.returncode == 2
    assert_one_line(result.stderr, "swapped")


def test_a_wrong_argument(tmp_path):
    result = run_demo("--score-thr", "high")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------ what it stands on


def link_packages(folder, *names):
    """Link installed packages into a folder, which then is an environment that holds nothing else."""
    site = Path(np.__file__).parents[1]
    folder.mkdir()
    for name in names:
        for path in site.glob(name):
            (folder / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_demo_runs_where_torch_is_not_installed(tmp_path, picture):
    names = [
        "numpy",
        "numpy.libs",
        "cv2",
        "opencv_python*",
        "onnxruntime",
        "tqdm",
        "flatbuffers",
        "google",
        "packaging",
    ]
    environment = link_packages(tmp_path / "site", *names)
    command = [
        sys.executable,
        "-S",
        str(ROOT / "demo.py"),
        str(picture),
        "--model",
        str(SHAPES),
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    missing = subprocess.run(
        [sys.executable, "-S", "-c", "import torch"], env=environment, capture_output=True, check=False
    )
    assert b"No module named 'torch'" in missing.stderr


def test_postprocess_imports_numpy_alone(tmp_path):
    environment = link_packages(tmp_path / "site", "numpy", "numpy.libs")
    code = "import postprocess, sys; print(any(m in sys.modules for m in ('cv2', 'onnxruntime', 'torch')))"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "False\n", result.stderr
