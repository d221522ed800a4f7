"""explain.py: pictures whose numbers are the detector's, whatever the detector and whatever there is to see."""

import importlib
import itertools
import re
import subprocess
import sys

import cv2
import msgspec
import numpy as np
import pycocotools.mask
import pytest
from conftest import MMDETECTION, ROOT, SHAPES
from PIL import Image

import explain
import explain_relatives
from detectors import load
from detectors.cascade_rcnn import CascadeRCNN
from detectors.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from detectors.point_rend import PointRend
from detectors.settings import Masks, Points, Refinement, changed
from pictures import is_annotated
from postprocess import ignore

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
    return explain.pages_of(pipeline_where({}))


def assert_pictures(folder, captions, names=NAMES):
    """Check that all pictures are there, none is blank, each has its caption, and the page holds all."""
    page = (folder / "index.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{name}.png" for name in names] + ["index.html"])
    assert len(captions) == len(names)
    for name, caption in zip(names, captions):
        image = Image.open(folder / f"{name}.png")
        assert image.info["Description"] == caption
        assert image.width == 1000
        assert np.asarray(image.convert("RGB")).std() > 5
        assert f"<h2>{caption}</h2>" in page
    assert page.count('src="data:image/png;base64,') == len(names)
    assert not re.findall(r"https?://|<script|<link", page)


def numbers(caption):
    """Return the numbers in a caption after the picture's own, if it has one."""
    caption = re.sub(r"^\d+  ", "", caption)
    return [float(text.replace(",", "")) for text in re.findall(r"\d+(?:,\d{3})+|\d+(?:\.\d+)?", caption)]


def test_the_bundled_picture(explained):
    folder, lines = explained
    assert_pictures(folder, lines[:9])
    assert "<h1>Faster R-CNN on shapes.png</h1>" in (folder / "index.html").read_text()


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


def assert_functions_exist(pages, networks):
    """Check that what is said to compute the pages are functions and networks of the detector."""
    for page in pages:
        for name in page.functions.split(", "):
            module, function = name.rsplit(".", 1)
            assert name in networks or callable(getattr(importlib.import_module(module), function))


def test_what_is_said_to_compute_a_picture_exists(pages):
    assert_functions_exist(pages, ["model1.onnx", "model2.onnx"])


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


@pytest.mark.parametrize("name", ["2_anchors.png", "index.html"])
def test_files_of_somebody_else_are_not_overwritten(tmp_path, capsys, name):
    arguments = [str(PICTURE), "--model", str(SHAPES), "--out", str(tmp_path)]
    (tmp_path / name).write_text("somebody's")
    assert explain.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"explain.py: {tmp_path / name} is there, and not from an earlier run: name another folder with --out\n"
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "somebody's")]
    (tmp_path / name).unlink()
    for _ in range(2):  # its own are
        assert explain.main(arguments) == 0
    assert all(is_annotated(path) for path in tmp_path.glob("*.png"))


def test_matplotlib_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(explain, "mpl", None)
    assert explain.main([str(PICTURE), "--model", str(SHAPES)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# ---------------------------------------------------------------------- a cascade, masks, and points


class Head:
    """The bundled head as one of a cascade, whose logits are its own times a factor."""

    def __init__(self, network, stage, factor):
        self.network, self.stage, self.factor = network, stage, np.float32(factor)

    def __call__(self, roi_feats, record=ignore):
        """Return what the network of a head returns."""
        cls, reg = self.network(roi_feats)
        cls = cls * self.factor
        record(self.stage, roi_feats=roi_feats, cls=cls, reg=reg)
        return cls, reg


class MaskHead:
    """A mask head whose cells, so many on a side, are weighted sums of the features."""

    def __init__(self, stage, classes, cells):
        weights = np.random.default_rng(sum(stage.encode())).normal(0, 0.3, (classes, 64))
        self.stage, self.weights, self.bins = stage, weights.astype(np.float32), np.arange(cells) * 14 // cells

    def __call__(self, roi_feats, record=ignore):
        """Return what the network of a mask head returns."""
        mask = np.einsum("kc,bcij->bkij", self.weights, roi_feats)[:, :, self.bins][..., self.bins]
        record(self.stage, roi_feats=roi_feats, mask=mask)
        return [mask]


class PointHead:
    """A point head whose logits are weighted sums of what a point has read."""

    def __init__(self, classes):
        self.weights = np.random.default_rng(0).normal(0, 0.3, (64 + classes, classes)).astype(np.float32)

    def __call__(self, point_feats, record=ignore):
        """Return what the network of a point head returns."""
        logits = point_feats @ self.weights
        record("point", point_feats=point_feats, logits=logits)
        return [logits]


def relative(family, changes):
    """Return a detector of another family made of the bundled one; a cascade has three heads."""
    shapes = load(SHAPES)
    settings = msgspec.structs.asdict(shapes.settings)
    settings.pop("type")
    networks, head, stages = dict(shapes.networks), settings["head"], [""]
    if issubclass(family, CascadeRCNN):
        settings["refinements"] = (Refinement(means=head.means, stds=head.stds, class_agnostic=False),) * 2
        network, stages = networks.pop("model2.onnx"), ["_0", "_1", "_2"]
        heads = [Head(network, f"model2{stage}", factor) for stage, factor in zip(stages, (0.3, 0.6, 0.2))]
        networks.update({f"{head.stage}.onnx": head for head in heads})
    if issubclass(family, MaskRCNN):
        rois = msgspec.structs.replace(settings["rois"], output_size=14)
        settings["masks"] = Masks(rois=rois, threshold=0.5)
        classes = 1 if changes.get("masks.class_agnostic") else len(shapes.classes)
        cells = 7 if family is PointRend else 28
        networks.update({f"mask{stage}.onnx": MaskHead(f"mask{stage}", classes, cells) for stage in stages})
    if family is PointRend:
        settings["points"] = Points(steps=5, num_points=784)
        networks["point.onnx"] = PointHead(classes)
    settings = family.Settings(**settings)
    for name, value in changes.items():
        settings = changed(settings, name, value)
    return family(settings, networks)


def explained_relative(family, changes):
    """Return that detector's Pipeline with the bundled picture, what it records, {stage: arrays}, and its result."""
    detector, image, recorded = relative(family, changes), cv2.imread(str(PICTURE)), {}
    result = detector(image, lambda stage, **arrays: recorded.update({stage: arrays}))
    return explain.Pipeline(detector, image), recorded, result


@pytest.fixture(scope="module")
def cascade():
    """Return what explained_relative returns for a Cascade R-CNN."""
    return explained_relative(CascadeRCNN, {})


PAGES = {
    CascadeRCNN: [*NAMES[:6], "7_cascade", "8_head", "9_nms", "10_result"],
    MaskRCNN: [*NAMES[:8], "9_masks", "10_result"],
    CascadeMaskRCNN: [*NAMES[:6], "7_cascade", "8_head", "9_nms", "10_masks", "11_result"],
    PointRend: [*NAMES[:8], "9_points", "10_masks", "11_result"],
}


@pytest.mark.parametrize("family", PAGES)
def test_which_pages_a_relative_has(family):
    pipeline, _, _ = explained_relative(family, {})
    pages = explain.pages_of(pipeline)
    assert [page.name for page in pages] == PAGES[family]
    assert [int(page.caption.split("  ")[0]) for page in pages] == list(range(1, len(pages) + 1))
    assert_functions_exist(pages, pipeline.detector.networks)


@pytest.mark.parametrize(("family", "name"), [(CascadeMaskRCNN, "Cascade Mask R-CNN"), (PointRend, "PointRend")])
def test_the_files_of_a_relative(tmp_path, family, name):
    pages = explain.explain(relative(family, {}), PICTURE, tmp_path)
    assert_pictures(tmp_path, [page.caption for page in pages], PAGES[family])
    assert f"<h1>{name} on shapes.png</h1>" in (tmp_path / "index.html").read_text()


def confident(recorded, result):
    """Return the candidates that became detections with a score of at least 0.3."""
    return recorded["detect"]["kept"][: len(result.boxes)][result.scores >= 0.3]


def scores_of(logits):
    """Return the softmax of logits, in float64."""
    exponentials = np.exp(logits.astype(float))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def boxes_in(collection):
    """Return the boxes [n, 4] that explain.py drew."""
    return np.array([path.vertices[[0, 2]].ravel() for path in collection.get_paths()])


def bars_in(axis):
    """Return the names of the bars from top to bottom, their lengths, and their colours."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    bars = axis.patches[::-1]
    return names[::-1], [bar.get_width() for bar in bars], [bar.get_facecolor() for bar in bars]


def test_boxes_on_their_way_through_a_cascade(cascade):
    pipeline, recorded, result = cascade
    stage = recorded["detect"]
    ways = {
        i: [recorded["propose"]["proposals"][stage["rois"][i]]]
        + [recorded[f"refine_{k}"]["rois"][stage["rois"][i]] for k in (0, 1)]
        + [stage["resized"][i]]
        for i in confident(recorded, result)
    }
    moved_most = sorted(ways, key=lambda i: iou_of(ways[i][0], ways[i][-1]))[:4]
    logits = [recorded[f"model2_{k}"]["cls"] for k in range(3)]
    page = explain_relatives.draw_cascade(pipeline)
    assert numbers(page.caption) == [3, 1000]
    for i, *axes in zip(moved_most, *np.reshape(page.figure.axes, (3, 4))):
        which, label, way = stage["rois"][i], stage["labels"][i], ways[i]
        assert axes[0].get_title() == f"proposal {which + 1}"
        proposal, moved = axes[0].collections
        np.testing.assert_array_equal(np.concatenate([boxes_in(proposal), boxes_in(moved)]), way)
        names, lengths, colours = bars_in(axes[1])
        assert names == (["proposal", "head 0", "head 1", "head 2"] if i == moved_most[0] else [])
        np.testing.assert_allclose(lengths, [iou_of(box, way[-1]) for box in way], atol=1e-5)
        np.testing.assert_array_equal(colours, np.concatenate([proposal.get_edgecolor(), moved.get_edgecolor()]))
        assert len(np.unique(colours, axis=0)) == 4
        assert axes[2].get_title() == f"score of {pipeline.classes[label]}"
        names, lengths, score_colours = bars_in(axes[2])
        assert names == (["head 0", "head 1", "head 2", "mean"] if i == moved_most[0] else [])
        assert score_colours[:3] == colours[1:]
        expected = [scores_of(cls[which])[label] for cls in [*logits, np.mean(logits, axis=0)]]
        np.testing.assert_allclose(lengths, expected, atol=1e-5)
        assert expected[-1] == pytest.approx(stage["scores"][i], abs=1e-5)
        assert np.ptp(expected) > 0.01


def test_how_far_a_cascade_moves_boxes_is_told(cascade):
    pipeline, recorded, result = cascade
    stage, kept = recorded["detect"], recorded["detect"]["kept"][: len(result.boxes)]
    starts = [recorded["propose"]["proposals"], recorded["refine_0"]["rois"], recorded["refine_1"]["rois"]]
    means = [np.mean([iou_of(rois[stage["rois"][i]], stage["resized"][i]) for i in kept]) for rois in starts]
    text = explain_relatives.draw_cascade(pipeline).text
    assert f"Over all {len(kept)} detections" in text
    assert f"{means[0]:.2f} for the proposals, {means[1]:.2f} after head 0 and {means[2]:.2f} after head 1." in text


def test_the_last_head_of_a_cascade_moves_the_boxes_that_the_others_left(cascade):
    pipeline, recorded, result = cascade
    stage, rois = recorded["detect"], recorded["refine_1"]["rois"]
    scores = scores_of(np.mean([recorded[f"model2_{k}"]["cls"] for k in range(3)], axis=0))
    ways = {i: (rois[stage["rois"][i]], stage["resized"][i]) for i in confident(recorded, result)}
    moved_most = sorted(ways, key=lambda i: iou_of(*ways[i]))[:4]
    page = explain.draw_head(pipeline)
    assert page.functions.startswith("model2_2.onnx, ")
    for i, above, below in zip(moved_most, *np.reshape(page.figure.axes, (2, 4))):
        np.testing.assert_array_equal(np.concatenate([boxes_in(boxes) for boxes in above.collections]), ways[i])
        _, lengths, _ = bars_in(below)
        np.testing.assert_allclose(lengths, np.sort(scores[stage["rois"][i]])[:-5:-1], atol=1e-5)


def test_the_first_head_of_a_cascade_gets_the_proposals(cascade):
    pipeline, recorded, _ = cascade
    first, last = (np.bincount(recorded[stage]["levels"], minlength=4).tolist() for stage in ("align_0", "align_2"))
    assert numbers(explain.draw_pyramid(pipeline).caption) == first != last
    which = explain.explained_roi(pipeline)
    level, proposal = recorded["align_0"]["levels"][which], recorded["propose"]["proposals"][which]
    stride = [4, 8, 16, 32][level]
    sampling = explain.sampling_of(pipeline, which)
    np.testing.assert_allclose(sampling.start, proposal[:2] / stride - 0.5, atol=1e-4)
    (left, right), (top, bottom) = sampling.cells
    crop = recorded["model1"][f"feat_{level}"][0, :, top:bottom, left:right]
    project = explain.principal_component(crop.transpose(1, 2, 0))
    expected = project(recorded["align_0"]["roi_feats"][which].transpose(1, 2, 0))
    result = explain.draw_roi_align(pipeline).figure.axes[2].images[0].get_array()
    np.testing.assert_allclose(result, expected, atol=1e-4)


def stretched(cells, box, rows, columns):
    """Return the values of pixels of a picture, given by their numbers, under cells [s, s] stretched over a box.

    Point by point: a pixel's centre lies between four cells' centres; outside all cells there are zeros.
    """
    x1, y1, x2, y2 = box.astype(float)
    s, padded, values = len(cells), np.pad(cells.astype(float), 1), np.zeros((len(rows), len(columns)))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        y = np.clip((row + 0.5 - y1) / (y2 - y1) * s + 0.5, 0, s + 1)
        x = np.clip((column + 0.5 - x1) / (x2 - x1) * s + 0.5, 0, s + 1)
        top, left = min(int(y), s), min(int(x), s)
        upper, lower = (padded[k, left] * (left + 1 - x) + padded[k, left + 1] * (x - left) for k in (top, top + 1))
        values[i, j] = upper * (top + 1 - y) + lower * (y - top)
    return values


def largest_of_each_class(result, count):
    """Return the largest confident detection of each of so many classes, the largest first."""
    sizes = (result.boxes[:, 2:] - result.boxes[:, :2]).prod(axis=1) * (result.scores >= 0.3)
    best = [np.argmax(sizes * (result.labels == label)) for label in set(result.labels[result.scores >= 0.3])]
    return sorted(best, key=lambda i: -sizes[i])[:count]


def cells_and_box(recorded, result, i, changes):
    """Return the cells and the box of a detection's mask as they are pasted, from the mask heads' logits."""
    logits = [arrays["mask"][i] for stage, arrays in recorded.items() if re.fullmatch(r"mask(_\d)?", stage)]
    label, box = 0 if changes.get("masks.class_agnostic") else result.labels[i], result.boxes[i]
    cells = np.mean([1 / (1 + np.exp(-mask[label].astype(float))) for mask in logits], axis=0)
    if changes.get("masks.bordered"):  # as torchvision pastes
        center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * 30 / 28
        cells, box = np.pad(cells, 1), np.trunc(np.r_[center - half, center + half]) + [0, 0, 1, 1]
    return cells, box


MASKED = [
    (CascadeMaskRCNN, {}),
    (MaskRCNN, {}),
    (MaskRCNN, {"masks.class_agnostic": True}),
    (MaskRCNN, {"masks.bordered": True, "masks.threshold": 0.6}),
]


@pytest.mark.parametrize(("family", "changes"), MASKED)
def test_masks_from_cells_to_pixels(family, changes):
    pipeline, recorded, result = explained_relative(family, changes)
    page = explain_relatives.draw_masks(pipeline)
    assert numbers(page.caption) == [28, 28, len(result.boxes)]
    assert explain_relatives.largest(pipeline, 5).tolist() == largest_of_each_class(result, 5)
    threshold = changes.get("masks.threshold", 0.5)
    for i, axes in zip(largest_of_each_class(result, 3), np.reshape(page.figure.axes[:-1], (3, 4))):
        assert axes[3].get_title().endswith(f"{pipeline.classes[result.labels[i]]} {result.scores[i]:.2f}")
        weights_y, cells, weights_x, crop, pasted = (np.asarray(image.get_array()) for a in axes for image in a.images)
        expected, box = cells_and_box(recorded, result, i, changes)
        np.testing.assert_allclose(cells, expected, atol=1e-5)
        np.testing.assert_allclose(weights_y @ cells @ weights_x, pasted, atol=1e-5)

        mask = pycocotools.mask.decode(result.masks[i]).astype(bool)
        inside = pasted >= np.float32(threshold)
        top, left = np.argwhere(mask).min(axis=0) - np.argwhere(inside).min(axis=0)  # of the part that is drawn
        rows, columns = top + np.arange(len(pasted)), left + np.arange(pasted.shape[1])
        np.testing.assert_allclose(pasted, stretched(expected, box, rows, columns), atol=1e-4)
        np.testing.assert_array_equal(crop, pipeline.image[np.ix_(rows, columns)][..., ::-1])
        np.testing.assert_array_equal(inside, mask[np.ix_(rows, columns)])
        assert inside.sum() == mask.sum() > 0
        outline = np.concatenate([path.vertices for path in axes[3].collections[0].get_paths()])
        np.testing.assert_allclose(outline.min(axis=0), np.argwhere(inside).min(axis=0)[::-1] - 0.5)
        np.testing.assert_allclose(outline.max(axis=0), np.argwhere(inside).max(axis=0)[::-1] + 0.5)


@pytest.mark.parametrize(("family", "changes"), MASKED)
def test_what_the_text_says_of_masks(family, changes):
    text = explain_relatives.draw_masks(explained_relative(family, changes)[0]).text
    assert "pooled into 14 x 14 bins, and answers with a logit for each of 28 x 28 cells" in text
    assert f"score is {changes.get('masks.threshold', 0.5):g} or more" in text
    assert ("There are 3 mask heads" in text) == (family is CascadeMaskRCNN)
    assert ("border of zeros" in text) == ("masks.bordered" in changes)
    assert ("for each class" in text) == ("masks.class_agnostic" not in changes)


def test_cells_that_were_refined_are_told():
    assert "anew" not in explain_relatives.draw_masks(explained_relative(MaskRCNN, {})[0]).text
    pipeline, _, result = explained_relative(PointRend, {"points.steps": 3})
    page = explain_relatives.draw_masks(pipeline)
    assert numbers(page.caption) == [56, 56, len(result.boxes)]
    assert "read at the centres of 14 x 14 bins, and answers with a logit for each of 7 x 7 cells" in page.text
    assert "predict the uncertain ones anew make 56 x 56 of them" in page.text


REFINED = [  # changes, and for each step that predicts, the cells on a side and the points
    ({}, {28: 784, 56: 784, 112: 784, 224: 784}),
    ({"points.steps": 3, "points.num_points": 100}, {14: 100, 28: 100, 56: 100}),
    ({"points.steps": 4, "points.num_points": 3200}, {56: 3136, 112: 3200}),
]


@pytest.mark.parametrize(("changes", "points"), REFINED)
def test_points_that_are_predicted_anew(changes, points):
    pipeline, recorded, result = explained_relative(PointRend, changes)
    steps = [arrays for stage, arrays in recorded.items() if stage.startswith("subdivide")]
    page = explain_relatives.draw_points(pipeline)
    assert numbers(page.caption) == [7, 7, max(points), max(points), sum(points.values())]
    axes = np.reshape(page.figure.axes[:-1], (3, len(points) + 2))
    assert [axis.get_title() for axis in axes[0, 1:-1]] == [f"{s} x {s}\n{points[s]:,} points" for s in points]
    for i, (coarse, *refined, pasted) in zip(largest_of_each_class(result, 3), axes):
        assert pasted.get_title().endswith(f"{pipeline.classes[result.labels[i]]} {result.scores[i]:.2f}")
        before = recorded["mask"]["mask"][i, result.labels[i]]
        np.testing.assert_allclose(coarse.images[0].get_array(), 1 / (1 + np.exp(-before)), atol=1e-6)
        for axis, (s, count), step in zip(refined, points.items(), steps):
            scores, dots = axis.images[0].get_array(), axis.lines[0].get_xydata()
            np.testing.assert_allclose(scores, 1 / (1 + np.exp(-step["logits"][i])), atol=1e-6)
            np.testing.assert_array_equal(dots, step["points"][i])
            assert axis.images[0].get_extent() == [0, 1, 1, 0]
            # Where there are no dots, a cell is interpolated; those with dots were the nearest to a score of one half.
            while len(before) < s:
                before = cv2.resize(before, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
            x, y = (dots * s - 0.5).T.round().astype(int)
            dotted = np.zeros((s, s), bool)
            dotted[y, x] = True
            assert dotted.sum() == count
            np.testing.assert_allclose(scores[~dotted], 1 / (1 + np.exp(-before[~dotted])), atol=1e-5)
            assert np.abs(before[dotted]).max() <= np.abs(before[~dotted]).min(initial=np.inf) + 1e-4
            before = step["logits"][i]
        x1, y1, x2, y2 = result.boxes[i]
        assert [axis.get_aspect() for axis in (coarse, *refined)] == [(y2 - y1) / (x2 - x1)] * (len(points) + 1)
        crop, tint = (np.asarray(image.get_array()) for image in pasted.images)
        top, left = (int(max(np.floor(start) - 1, 0)) for start in (y1, x1))
        rows, columns = top + np.arange(len(tint)), left + np.arange(tint.shape[1])
        np.testing.assert_array_equal(crop, pipeline.image[np.ix_(rows, columns)][..., ::-1])
        expected = stretched(1 / (1 + np.exp(-before)), result.boxes[i], rows, columns)
        np.testing.assert_allclose(tint, expected, atol=1e-3)


@pytest.mark.parametrize(("changes", "points"), REFINED)
def test_what_the_text_says_of_points(changes, points):
    text = explain_relatives.draw_points(explained_relative(PointRend, changes)[0]).text
    steps = changes.get("points.steps", 5)
    assert f"the {changes.get('points.num_points', 784):,} cells whose logits are nearest to zero" in text
    said = re.findall(r"first (?:\d )?steps? only doubles?", text)
    assert said == {5: ["first step only doubles"], 4: ["first 2 steps only double"], 3: []}[steps]
    s = max(points)
    assert f"After {steps} steps there are {s} x {s} = {s * s:,} cells" in text
    assert f"has answered for {sum(points.values()):,} points" in text


def test_masks_are_drawn_as_large_as_the_result():
    pipeline, _, result = explained_relative(MaskRCNN, {})
    drawn = explain.draw_result(pipeline).figure.axes[0].images[0].get_array()
    pipeline.detections = result._replace(masks=None)
    without = explain.draw_result(pipeline).figure.axes[0].images[0].get_array()
    masks = [pycocotools.mask.decode(mask) for mask in result.masks[result.scores >= 0.3]]
    y, x = ((np.arange(side) + 0.5) * 489 / 1000 for side in drawn.shape[:2])
    masked = np.any(masks, axis=0)[np.ix_(y.astype(int), x.astype(int))]
    different = (drawn != without).any(axis=2)
    assert different[masked].mean() > 0.8  # labels cover some
    assert not different[cv2.dilate(masked.astype(np.uint8), np.ones((7, 7))) == 0].any()  # but for the outlines


NO_DETECTION = {6: "no class", 7: "no class", 9: "no detection", 10: "0 detections"}  # of a cascade with masks


@pytest.mark.parametrize(("family", "changes", "words"), [
    (CascadeMaskRCNN, {"proposals.min_bbox_size": 10_000.0}, NO_DETECTION),
    (CascadeMaskRCNN, {"head.score_threshold": 1.0}, NO_DETECTION),
    (CascadeMaskRCNN, {"head.max_per_img": 1},
     {8: "1 returned", 9: "28 scores for each of 1 boxes", 10: "1 detections"}),
    (PointRend, {"head.score_threshold": 1.0}, {8: "no detection", 9: "no detection", 10: "0 detections"}),
    (PointRend, {"head.max_per_img": 1}, {8: "3,136 points", 9: "224 scores for each of 1 boxes", 10: "1 detections"}),
])  # fmt: skip
def test_where_a_relative_has_little_to_show(family, changes, words):
    pages = explain.pages_of(explained_relative(family, changes)[0])
    assert [page.name for page in pages] == PAGES[family]
    for page, word in words.items():
        assert word in pages[page].caption
        assert len(explain.as_png(pages[page])) > 1000


@pytest.mark.slow
def test_a_cascade_with_masks_from_mmdetection(tmp_path, mmdetection, photographs):
    import mmcv
    import seeded_mmdetection
    from test_zoo import THIN, write_config

    import export

    head = THIN["model.roi_head.bbox_head"]
    changes = {key: value for key, value in THIN.items() if key != "model.roi_head.bbox_head"}
    changes.update({f"model.roi_head.bbox_head.{i}.{key}": head[key] for i in range(3) for key in head})
    changes["model.roi_head.mask_roi_extractor.out_channels"] = 64
    changes["model.roi_head.mask_head"] = {"num_convs": 1, "in_channels": 64, "conv_out_channels": 32}
    config, checkpoint = tmp_path / "config.py", tmp_path / "seeded.pth"
    write_config("cascade_mask_rcnn_r50_fpn_1x_coco", changes, config)
    seeded_mmdetection.write_checkpoint(mmcv.Config.fromfile(str(config)), checkpoint, photographs["coffee"])
    export.write_networks(mmdetection.load(config, checkpoint), tmp_path, opset=13)
    cv2.imwrite(str(tmp_path / "picture.png"), photographs["coffee"])
    detector = load(tmp_path)
    pages = explain.explain(detector, tmp_path / "picture.png", tmp_path / "out")
    assert_pictures(tmp_path / "out", [page.caption for page in pages], PAGES[CascadeMaskRCNN])
    assert_functions_exist(pages, detector.networks)
    assert numbers(pages[9].caption)[2] == numbers(pages[10].caption)[0] > 50
