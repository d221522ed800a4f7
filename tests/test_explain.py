"""explain.py: nine pictures whose numbers are the detector's, whatever there is to see."""

import importlib
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import MMDETECTION, ROOT, SHAPES
from PIL import Image

import explain
from detectors import load
from detectors.settings import changed

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


def detector_where(changes):
    """Return the bundled detector with other settings."""
    detector = load(SHAPES)
    for name, value in changes.items():
        detector.settings = changed(detector.settings, name, value)
    return detector


def pipeline_where(changes):
    """Return explain.py's Pipeline of that detector and the bundled picture."""
    return explain.Pipeline(detector_where(changes), cv2.imread(str(PICTURE)))


def detected(changes):
    """Return what that detector records in the bundled picture, {stage: arrays}, and its result."""
    recorded = {}

    def record(stage, **arrays):
        recorded[stage] = arrays

    return {**recorded, "result": detector_where(changes)(cv2.imread(str(PICTURE)), record), **recorded}


@pytest.fixture(scope="module")
def stages():
    """Return the detector's own arrays for the bundled picture, {stage: arrays}."""
    return detected({})


@pytest.fixture(scope="module")
def pages():
    """Return the pages of the bundled picture."""
    pipeline = pipeline_where({})
    return [draw_page(pipeline) for draw_page in explain.DRAWERS]


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


def test_the_numbers_are_the_detectors(explained, stages):
    _, lines = explained
    height, width = stages["preprocess"]["image_size"]
    blob = stages["preprocess"]["blob"]
    assert numbers(lines[0]) == [489, 303, width, height, blob.shape[3], blob.shape[2]]
    logits = [stages["model1"][f"cls_{level}"] for level in range(5)]
    assert numbers(lines[1]) == [sum(scores.size for scores in logits), 3]
    best = max(scores.max() for scores in logits)
    assert numbers(lines[2]) == [round(float(1 / (1 + np.exp(-best))), 2)]
    settings = load(SHAPES).settings
    before = sum(min(settings.proposals.nms_pre, scores.size) for scores in logits)
    kept = len(detected({"proposals.max_per_img": 10**6})["propose"]["proposals"])
    assert numbers(lines[3]) == [before, kept, len(stages["propose"]["proposals"])]
    assert numbers(lines[4]) == [np.count_nonzero(stages["align"]["levels"] == level) for level in range(4)]
    assert numbers(lines[5])[:4] == [7, 7, 2, 2]
    assert numbers(lines[6]) == [len(stages["model2"]["cls"])]
    logits = stages["model2"]["cls"].astype(float)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = len(stages["result"].boxes)
    assert found < settings.head.max_per_img
    assert numbers(lines[7]) == [np.count_nonzero(scores[:, :-1] > settings.head.score_threshold), found, found]
    confident = np.count_nonzero(stages["result"].scores >= 0.3)
    assert numbers(lines[8]) == [found, confident, 0.3]


def test_numbers_in_texts_are_short(pages):
    assert "over 28 pixels" in pages[4].text
    assert not [page.name for page in pages if re.search(r"\d\.0\b|np\.|\(\d[^)]*,\)", page.text)]


def test_what_is_said_to_compute_a_picture_exists(pages):
    for page in pages:
        for name in page.functions.split(", "):
            module, function = name.rsplit(".", 1)
            assert function == "onnx" or callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("cap", [50, 1500])
def test_proposals_that_nms_keeps_and_the_cap_drops(cap):
    page = explain.draw_proposals(pipeline_where({"proposals.max_per_img": cap}))
    stage = detected({"proposals.max_per_img": 10**6})["propose"]  # without a cap
    before, kept = len(stage["candidates"]), len(stage["proposals"])
    assert kept > cap
    assert numbers(page.caption) == [before, kept, cap]
    assert f"it removes {before - kept:,} and keeps {kept:,}. " in page.text
    drawn = np.concatenate([np.flatnonzero(stage["levels"] == level)[:60] for level in range(5)])
    stay, go_on = (np.isin(drawn, stage["kept"][:number]).sum() for number in (kept, cap))
    left, right = page.figure.axes[:2]
    assert [len(boxes.get_paths()) for boxes in left.collections] == [len(drawn)]
    assert [len(boxes.get_paths()) for boxes in right.collections] == [stay - go_on, go_on][int(go_on == stay) :]
    assert f"NMS keeps {stay} of them" in right.get_title()
    assert ("dotted" in right.get_title()) == (stay > go_on)


@pytest.mark.parametrize("cap", [3, 100])
@pytest.mark.parametrize("changes", [
    {}, {"head.nms_class_agnostic": True}, {"head.soft_min_score": 0.2},
    {"head.nms_class_agnostic": True, "head.soft_min_score": 0.2}, {"head.iou_threshold": 0.9},
])  # fmt: skip
def test_detections_that_nms_keeps_and_the_cap_drops(changes, cap):
    page = explain.draw_nms(pipeline_where({**changes, "head.max_per_img": cap}))
    free = detected({**changes, "head.max_per_img": 10**6})  # without a cap
    before, kept = len(free["detect"]["candidates"]), len(free["result"].boxes)
    assert cap < kept or cap == 100
    assert numbers(page.caption) == [before, kept, min(kept, cap)]
    assert f"of {before} boxes, {before - kept} are removed and {kept} stay. " in page.text
    assert page.text.count(f"here {min(kept, cap)}. ") == 1


def iou_of(box, other):
    """Return the intersection over union of two boxes."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box.astype(float), other.astype(float)
    intersection = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
    return intersection / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection)


@pytest.mark.parametrize("cap", [3, 100])
@pytest.mark.parametrize("agnostic", [False, True])
def test_who_removed_whom(cap, agnostic):
    pipeline = pipeline_where({"head.max_per_img": cap, "head.nms_class_agnostic": agnostic})
    removed, by, iou = explain.removers(pipeline)
    stage = pipeline.detect
    assert sorted([*removed, *stage["kept"]]) == list(range(len(stage["candidates"])))
    assert set(by) <= set(stage["kept"])
    assert agnostic == (stage["labels"][removed] != stage["labels"][by]).any()
    assert (stage["scores"][removed] <= stage["scores"][by]).all()
    assert (np.diff(iou) >= 0).all()
    for i, k, overlap in zip(removed, by, iou):
        assert overlap == pytest.approx(iou_of(*stage["candidates"][[i, k]]), abs=1e-5)
        assert overlap > 0.5


@pytest.mark.parametrize("agnostic", [False, True])
def test_who_removed_whom_in_soft_nms(agnostic):
    least = 0.06
    pipeline = pipeline_where({"head.soft_min_score": least, "head.nms_class_agnostic": agnostic})
    stage, expected, several = pipeline.detect, {}, 0
    groups = stage["labels"] * (not agnostic)
    for group in set(groups):
        scores = {i: stage["scores"][i] for i in np.flatnonzero(groups == group) if stage["scores"][i] >= least}
        lowered = dict.fromkeys(scores, 0)
        while scores:
            best = max(scores, key=scores.get)
            scores.pop(best)
            for i in list(scores):
                overlap = iou_of(*stage["candidates"][[best, i]])
                if overlap >= 0.5:
                    scores[i] *= 1 - overlap
                    lowered[i] += 1
                if scores[i] < least:
                    scores.pop(i)
                    expected[i] = best
                    several += lowered[i] > 1
    removed, by, iou = explain.removers(pipeline)
    assert dict(zip(removed, by)) == expected
    assert several > 0
    assert (iou >= 0.5).all()
    assert len(removed) < len(stage["candidates"]) - len(stage["kept"])  # some began below the least score


@pytest.mark.parametrize("center_offset", [0.0, 0.5])
def test_a_score_is_painted_where_its_anchors_are(center_offset):
    """The cell of each level's best score lies around the centre of the anchors that MMDetection has there."""
    generators = pytest.importorskip("mmdet.core.anchor", reason=MMDETECTION)
    pipeline = pipeline_where({"proposals.anchors.center_offset": center_offset})
    generator = generators.AnchorGenerator(pipeline.strides, [0.5, 1, 2], [4], center_offset=center_offset)
    grids = generator.grid_priors([cls.shape[1:] for cls in pipeline.cls], device="cpu")
    axes = [axis for axis in explain.draw_objectness(pipeline).figure.axes if axis.images]
    assert len(axes) == len(grids)
    for axis, grid, cls in zip(axes, grids, pipeline.cls):
        left, right, bottom, top = axis.images[-1].get_extent()
        anchors = grid.reshape(*cls.shape[1:], 3, 4)[:, :, 0].numpy()
        y, x = np.unravel_index(cls.max(axis=0).argmax(), cls.shape[1:])
        center = (anchors[y, x, :2] + anchors[y, x, 2:]) / 2
        assert left + (x + 0.5) * (right - left) / cls.shape[2] == pytest.approx(center[0])
        assert top + (y + 0.5) * (bottom - top) / cls.shape[1] == pytest.approx(center[1])


def test_each_box_that_removed_others_has_a_colour_of_its_own():
    left = explain.draw_nms(pipeline_where({})).figure.axes[0]
    colours = [collection.get_edgecolor() for collection in left.collections]
    kept = colours[-1]  # drawn last, on top
    assert 2 < len(kept) == len(np.unique(kept, axis=0))


@pytest.mark.parametrize(("changes", "found"), [
    ({}, "detection"),
    ({"head.score_threshold": 1.0, "rois.finest_scale": 56.0}, "proposal"),  # nothing is detected
    ({"rois.sampling_ratio": 2}, "best detection"),
    ({"rois.sampling_ratio": 3}, "best detection"),  # none has 2 x 2
    ({"rois.sampling_ratio": 3, "head.score_threshold": 1.0}, "best proposal"),
])  # fmt: skip
def test_the_proposal_that_is_explained(changes, found):
    pipeline = pipeline_where(changes)
    which = explain.explained_roi(pipeline)
    stages, strides = detected(changes), np.array([4, 8, 16, 32])
    proposals, ratio = stages["propose"]["proposals"], changes.get("rois.sampling_ratio", 0)
    sizes = (proposals[:, 2:] - proposals[:, :2]) / strides[stages["align"]["levels"], None]
    points = np.ceil(sizes / 7) if ratio == 0 else np.full_like(sizes, ratio)
    best_first = [] if "proposal" in found else list(stages["detect"]["rois"][stages["detect"]["kept"]])
    best_first += range(len(proposals))
    if "best" in found:
        assert which == best_first[0]
    else:
        assert which == next(i for i in best_first if (points[i] == 2).all())
        assert which != best_first[0]
    if "detection" in found:
        overlaps = [iou_of(proposals[which], box * np.float32(512 / 489)) for box in stages["result"].boxes]
        assert overlaps[0] > 0.7 or (max(overlaps) > 0.7 and "best" not in found)
    points = " x ".join(str(int(number)) for number in points[which])
    page = explain.draw_roi_align(pipeline)
    assert f"7 x 7 bins of {points} points" in page.caption
    assert f"here {points} (" in page.text
    assert len(page.figure.axes[1].lines[0].get_xdata()) == 49 * np.prod(points_of(page.caption))


def points_of(caption):
    """Return the numbers of a bin's points along each axis that picture 6 tells."""
    return [int(number) for number in numbers(caption)[2:4]]


@pytest.mark.parametrize("name", NAMES[1:8])
def test_the_readmes_pictures_are_what_explain_draws(explained, name):
    ours, new = Image.open(ROOT / "asset" / "explained" / f"{name}.png"), Image.open(explained[0] / f"{name}.png")
    assert ours.info["Description"] == new.info["Description"]
    assert ours.size == new.size
    difference = np.asarray(ours.convert("RGB")).astype(int) - np.asarray(new.convert("RGB"))
    assert np.abs(difference).mean() < 1  # scores differ in their last bits between processors
    for readme in ("README.md", "README.zh-CN.md"):
        assert f"(asset/explained/{name}.png)" in (ROOT / readme).read_text()


@pytest.mark.parametrize(("changes", "words"), [
    ({"proposals.min_bbox_size": 10_000.0},
     {3: "0 kept by NMS, 0 go on", 5: "no proposal", 6: "no class", 7: "0 kept, 0 returned", 8: "0 detections"}),
    ({"head.score_threshold": 1.0}, {6: "no class", 7: "0 kept, 0 returned", 8: "0 detections"}),
    ({"head.iou_threshold": 0.999}, {7: "NMS class by class"}),
    ({"head.nms_class_agnostic": True}, {7: "NMS of all classes together"}),
    ({"head.soft_min_score": 0.001}, {7: "Soft-NMS class by class"}),
    ({"rois.sampling_ratio": 2}, {5: "7 x 7"}),
    ({"proposals.nms_pre": -1}, {3: "40,"}),
    ({"preprocess.keep_ratio": False}, {0: "resized to 512 x 384"}),
])  # fmt: skip
def test_where_there_is_little_to_see(tmp_path, changes, words):
    pages = explain.explain(detector_where(changes), PICTURE, tmp_path)
    assert_pictures(tmp_path, [page.caption for page in pages])
    for page, word in words.items():
        assert word in pages[page].caption


def test_boxes_that_are_too_small_are_told():
    pipeline = pipeline_where({"proposals.min_bbox_size": 20.0})
    dropped = 3600 - len(pipeline.propose["candidates"])
    assert dropped > 0
    text = explain.draw_proposals(pipeline).text
    assert f"{dropped:,} of them are dropped, because a side is no longer than 20 pixels. " in text
    assert "dropped" not in explain.draw_proposals(pipeline_where({})).text


@pytest.mark.parametrize("shape", [(120, 90), (20, 700), (900, 10), (1, 1)])
def test_empty_pictures_of_any_shape(tmp_path, shape):
    cv2.imwrite(str(tmp_path / "picture.png"), np.full((*shape, 3), 128, np.uint8))
    pages = explain.explain(load(SHAPES), tmp_path / "picture.png", tmp_path / "out")
    assert_pictures(tmp_path / "out", [page.caption for page in pages])


def test_names_with_dollars_are_no_formulas(tmp_path):
    detector = load(SHAPES)
    detector.classes = [rf"${name}\foo$" for name in detector.classes]
    pages = explain.explain(detector, PICTURE, tmp_path)
    assert_pictures(tmp_path, [page.caption for page in pages])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_photographs(tmp_path, coco_pair, photographs, name):
    cv2.imwrite(str(tmp_path / "picture.png"), photographs[name])
    pages = explain.explain(load(coco_pair), tmp_path / "picture.png", tmp_path / "out")
    assert_pictures(tmp_path / "out", [page.caption for page in pages])
    assert numbers(pages[8].caption)[0] == 100


@pytest.mark.slow
def test_a_detector_with_one_level(tmp_path, mmdetection, photographs):
    import mmcv
    import seeded_mmdetection
    from test_zoo import THIN, write_config

    import export

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
    config, checkpoint = tmp_path / "config.py", tmp_path / "seeded.pth"
    write_config(mmdetection.DEFAULT_CONFIG, changes, config)
    seeded_mmdetection.write_checkpoint(mmcv.Config.fromfile(str(config)), checkpoint, photographs["coffee"])
    source = mmdetection.as_source(mmdetection.load_detector(config, checkpoint), config, checkpoint)
    export.write_networks(source, tmp_path, opset=13)
    cv2.imwrite(str(tmp_path / "picture.png"), photographs["coffee"])
    pages = explain.explain(load(tmp_path), tmp_path / "picture.png", tmp_path / "out")
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


def test_the_picture_itself_is_not_overwritten(tmp_path, capsys):
    picture = tmp_path / "1_input.png"
    picture.write_bytes(PICTURE.read_bytes())
    assert explain.main([str(picture), "--model", str(SHAPES), "--out", str(tmp_path)]) == 2
    assert "it would be overwritten" in capsys.readouterr().err
    assert picture.read_bytes() == PICTURE.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["1_input.png"]


def test_matplotlib_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(explain, "mpl", None)
    assert explain.main([str(PICTURE), "--model", str(SHAPES)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
