"""explain.py: nine pictures whose numbers are the pipeline's, whatever there is to see."""

import re
import subprocess
import sys

import cv2
import mmcv
import numpy as np
import pytest
import seeded
from conftest import ROOT, SHAPES
from PIL import Image
from test_zoo import THIN, write_config

import demo
import explain
import export
import postprocess

NAMES = [
    "1_input",
    "2_anchors",
    "3_objectness",
    "4_proposals",
    "5_pyramid",
    "6_roi_align",
    "7_head",
    "8_nms",
    "9_result",
]
PICTURE = ROOT / "asset" / "shapes.png"


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """Return the folder and the output of explain.py for the bundled picture and model."""
    folder = tmp_path_factory.mktemp("explained")
    command = [sys.executable, ROOT / "explain.py", PICTURE, "--model", SHAPES, "--out", folder]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout.splitlines()


@pytest.fixture(scope="module")
def stages():
    """Return the pipeline's own arrays for the bundled picture, {stage: arrays}."""
    recorded = {}
    detector = demo.FasterRCNN(SHAPES)
    detections = detector(cv2.imread(str(PICTURE)), lambda stage, **arrays: recorded.update({stage: arrays}))
    return {**recorded, "result": detections, "detector": detector}


def assert_pictures(folder, captions):
    """Check that the nine pictures are there, none is blank, each has its caption, and the page holds all."""
    page = (folder / "index.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{name}.png" for name in NAMES] + ["index.html"])
    for name, caption in zip(NAMES, captions):
        image = Image.open(folder / f"{name}.png")
        assert image.info["Description"] == caption
        assert image.width == 1000
        assert np.asarray(image.convert("RGB")).std() > 5
        assert f"<h2>{caption}</h2>" in page
    assert page.count('src="data:image/png;base64,') == 9
    assert not re.findall(r"https?://|<script|<link", page)


def numbers(caption):
    """Return the numbers in a caption after the picture's own."""
    return [float(text.replace(",", "")) for text in re.findall(r"\d+(?:,\d{3})+|\d+(?:\.\d+)?", caption)[1:]]


def test_the_bundled_picture(explained):
    folder, lines = explained
    assert_pictures(folder, lines[:9])


def test_the_numbers_are_the_pipelines(explained, stages):
    _, lines = explained
    height, width = stages["preprocess"]["image_size"]
    blob = stages["preprocess"]["blob"]
    assert numbers(lines[0]) == [489, 303, width, height, blob.shape[3], blob.shape[2]]
    assert numbers(lines[1]) == [sum(scores.size for scores in stages["model1"]["rpn_cls"]), 3]
    best = max(scores.max() for scores in stages["model1"]["rpn_cls"])
    assert numbers(lines[2]) == [round(float(1 / (1 + np.exp(-best))), 2)]
    settings = stages["detector"].config["rpn"]
    before = sum(min(settings["nms_pre"], scores.size) for scores in stages["model1"]["rpn_cls"])
    assert numbers(lines[3]) == [before, len(stages["propose"]["proposals"])]
    assert numbers(lines[4]) == [np.count_nonzero(stages["align"]["levels"] == level) for level in range(4)]
    assert numbers(lines[5])[:2] == [7, 7]
    assert numbers(lines[6]) == [len(stages["model2"]["cls"])]
    logits = stages["model2"]["cls"].astype(float)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    threshold = stages["detector"].config["rcnn"]["score_threshold"]
    assert numbers(lines[7]) == [np.count_nonzero(scores[:, :-1] > threshold), len(stages["result"].boxes)]
    confident = np.count_nonzero(stages["result"].scores >= 0.3)
    assert numbers(lines[8]) == [len(stages["result"].boxes), confident, 0.3]


def test_who_removed_whom():
    pipeline = explain.Pipeline(demo.FasterRCNN(SHAPES), cv2.imread(str(PICTURE)))
    removed, by, iou = explain.removers(pipeline)
    stage = pipeline.detect
    assert set(removed) | set(stage["kept"]) == set(range(len(stage["candidates"])))
    assert len(removed) + len(stage["kept"]) == len(stage["candidates"])
    assert set(by) <= set(stage["kept"])
    assert (stage["labels"][removed] == stage["labels"][by]).all()
    assert (stage["scores"][removed] <= stage["scores"][by]).all()
    for i, k, overlap in zip(removed, by, iou):
        (x1, y1, x2, y2), (u1, v1, u2, v2) = stage["candidates"][[i, k]].astype(float)
        intersection = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
        expected = intersection / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection)
        assert overlap == pytest.approx(expected, abs=1e-5)
        assert overlap > 0.5


@pytest.mark.parametrize("center_offset", [0, 0.5])
def test_a_score_is_painted_where_its_anchors_are(center_offset):
    """The cell of each level's best score lies around the centre of the anchors that MMDetection has there."""
    from mmdet.core.anchor import AnchorGenerator

    detector = config_where({"anchors.center_offset": center_offset})
    strides = detector.config["anchors"]["strides"]
    detector.base_anchors = [postprocess.base_anchors(size, [4], [0.5, 1, 2], center_offset) for size in strides]
    pipeline = explain.Pipeline(detector, cv2.imread(str(PICTURE)))
    generator = AnchorGenerator(strides, [0.5, 1, 2], [4], center_offset=center_offset)
    grids = generator.grid_priors([cls.shape[1:] for cls in pipeline.model1["rpn_cls"]], device="cpu")
    axes = [axis for axis in explain.draw_objectness(pipeline).figure.axes if axis.images]
    assert len(axes) == len(grids)
    for axis, grid, cls in zip(axes, grids, pipeline.model1["rpn_cls"]):
        left, right, bottom, top = axis.images[-1].get_extent()
        anchors = grid.reshape(*cls.shape[1:], 3, 4)[:, :, 0].numpy()
        y, x = np.unravel_index(cls.max(axis=0).argmax(), cls.shape[1:])
        center = (anchors[y, x, :2] + anchors[y, x, 2:]) / 2
        assert left + (x + 0.5) * (right - left) / cls.shape[2] == pytest.approx(center[0])
        assert top + (y + 0.5) * (bottom - top) / cls.shape[1] == pytest.approx(center[1])


def test_each_box_that_removed_others_has_a_colour_of_its_own():
    pipeline = explain.Pipeline(demo.FasterRCNN(SHAPES), cv2.imread(str(PICTURE)))
    left = explain.draw_nms(pipeline).figure.axes[0]
    colours = [collection.get_edgecolor() for collection in left.collections]
    kept = colours[-1]  # drawn last, on top
    assert 2 < len(kept) == len(np.unique(kept, axis=0))


def test_the_proposal_that_is_explained_is_the_best_detections():
    pipeline = explain.Pipeline(demo.FasterRCNN(SHAPES), cv2.imread(str(PICTURE)))
    proposal = pipeline.propose["proposals"][explain.explained_roi(pipeline)]
    best = pipeline.detections.boxes[0] * np.float32(512 / 489)
    assert explain.pairwise_iou(proposal[None], best[None]) > 0.7


@pytest.mark.parametrize("name", ["2_anchors", "4_proposals", "5_pyramid", "6_roi_align", "7_head"])
def test_the_readmes_pictures_are_what_explain_draws(explained, name):
    ours, new = Image.open(ROOT / "asset" / "explained" / f"{name}.png"), Image.open(explained[0] / f"{name}.png")
    assert ours.info["Description"] == new.info["Description"]
    assert ours.size == new.size
    difference = np.asarray(ours.convert("RGB")).astype(int) - np.asarray(new.convert("RGB"))
    assert np.abs(difference).mean() < 1  # scores differ in their last bits between processors
    for readme in ("README.md", "README.zh-CN.md"):
        assert f"(asset/explained/{name}.png)" in (ROOT / readme).read_text()


def config_where(changes):
    """Return the bundled detector with other values in its metadata."""
    detector = demo.FasterRCNN(SHAPES)
    for name, value in changes.items():
        section, key = name.split(".")
        detector.config[section][key] = value
    return detector


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rpn.min_bbox_size": 10_000},
            {3: "0 after", 5: "no proposal", 6: "no class", 7: "0 stay", 8: "0 detections"},
        ),
        ({"rcnn.score_threshold": 1.0}, {6: "no class", 7: "0 stay", 8: "0 detections"}),
        ({"rcnn.iou_threshold": 0.999}, {}),
        ({"rcnn.nms_class_agnostic": True}, {7: "NMS of all classes"}),
        ({"rcnn.soft_min_score": 0.001}, {7: "Soft-NMS class by class"}),
        ({"roi.sampling_ratio": 2}, {5: "7 x 7"}),
    ],
)
def test_where_there_is_little_to_see(tmp_path, changes, words):
    pages = explain.explain(config_where(changes), PICTURE, tmp_path)
    assert_pictures(tmp_path, [page.caption for page in pages])
    for page, word in words.items():
        assert word in pages[page].caption


@pytest.mark.parametrize("shape", [(120, 90), (20, 700), (900, 10), (1, 1)])
def test_empty_pictures_of_any_shape(tmp_path, shape):
    cv2.imwrite(str(tmp_path / "picture.png"), np.full((*shape, 3), 128, np.uint8))
    pages = explain.explain(demo.FasterRCNN(SHAPES), tmp_path / "picture.png", tmp_path / "out")
    assert_pictures(tmp_path / "out", [page.caption for page in pages])


def test_names_with_dollars_are_no_formulas(tmp_path):
    detector = demo.FasterRCNN(SHAPES)
    detector.classes = [rf"${name}\foo$" for name in detector.classes]
    pages = explain.explain(detector, PICTURE, tmp_path)
    assert_pictures(tmp_path, [page.caption for page in pages])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_photographs(tmp_path, coco_pair, photographs, name):
    cv2.imwrite(str(tmp_path / "picture.png"), photographs[name])
    pages = explain.explain(demo.FasterRCNN(coco_pair), tmp_path / "picture.png", tmp_path / "out")
    assert_pictures(tmp_path / "out", [page.caption for page in pages])
    assert numbers(pages[8].caption)[0] == 100


@pytest.mark.slow
def test_a_detector_with_one_level(tmp_path, photographs):
    changes = {
        "model.backbone": {
            **THIN["model.backbone"], "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2), "out_indices": (3,),
        },
        "model.neck": None,
        "model.rpn_head": {"in_channels": 128, "feat_channels": 64},
        "model.rpn_head.anchor_generator": {"strides": [16], "scales": [2, 4, 8, 16, 32]},
        "model.roi_head.bbox_roi_extractor": {"out_channels": 128, "featmap_strides": [16]},
        "model.roi_head.bbox_head.in_channels": 128,
    }  # fmt: skip
    write_config(export.DEFAULT_CONFIG, changes, tmp_path / "config.py")
    cfg = mmcv.Config.fromfile(str(tmp_path / "config.py"))
    seeded.write_checkpoint(cfg, tmp_path / "seeded.pth", photographs["coffee"])
    export.write_pair(export.load_detector(tmp_path / "config.py", tmp_path / "seeded.pth"), tmp_path, {}, opset=13)
    cv2.imwrite(str(tmp_path / "picture.png"), photographs["coffee"])
    pages = explain.explain(demo.FasterRCNN(tmp_path), tmp_path / "picture.png", tmp_path / "out")
    assert_pictures(tmp_path / "out", [page.caption for page in pages])
    assert len(numbers(pages[4].caption)) == 1
    assert numbers(pages[4].caption)[0] > 100


@pytest.mark.parametrize("content", [None, "no picture"])
def test_what_is_no_picture(tmp_path, capsys, content):
    if content:
        (tmp_path / "picture.png").write_text(content)
    assert explain.main([str(tmp_path / "picture.png"), "--model", str(SHAPES), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("explain.py: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_matplotlib_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(explain, "mpl", None)
    assert explain.main([str(PICTURE), "--model", str(SHAPES)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
