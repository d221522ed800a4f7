"""explain.py's pages of one-stage detectors, drawn from the arrays that the detector recorded."""

import re

import msgspec
import numpy as np
import pytest
from boxes import NO_MEANS
from test_one_stage import PREPROCESS, anchored, pointed, write_model

pytest.importorskip("matplotlib", reason="needs matplotlib: uv run --extra test pytest")

import explain  # noqa: E402
import explain_one_stage  # noqa: E402
from detectors import load  # noqa: E402
from detectors.center_net import CenterNet  # noqa: E402
from detectors.detr import DETR  # noqa: E402
from detectors.paa import PAA  # noqa: E402
from detectors.retina_net import RetinaNet  # noqa: E402
from detectors.settings import (  # noqa: E402
    CenterNetSettings,
    Coder,
    DETRSettings,
    PAASettings,
    Preprocess,
    Queries,
    RetinaNetSettings,
    changed,
)
from postprocess import sigmoid, softmax  # noqa: E402

NAMES = ["1_input", "2_points", "3_scores", "4_candidates", "5_nms", "6_result"]


@pytest.fixture
def pipeline_of(tmp_path, photographs):
    """Return a function that makes a Pipeline of a detector with these settings and random maps."""

    def run(settings, outputs):
        write_model(tmp_path / "model.onnx", settings, outputs)
        return explain.Pipeline(load(tmp_path), photographs["cat"])

    return run


@pytest.fixture
def points(pipeline_of):
    """Return the Pipeline of a detector with points and centerness."""
    settings = changed(pointed().settings, "head.factor", "centerness")
    return pipeline_of(settings, {"cls_0": 2, "reg_0": 4, "centerness_0": 1})


@pytest.fixture
def anchors(pipeline_of):
    """Return the Pipeline of a detector with two levels of anchors, and a softmax."""
    settings = anchored(RetinaNet, RetinaNetSettings, deltas=Coder(means=NO_MEANS, stds=(1, 1, 1, 1))).settings
    settings = changed(settings, "head.softmax", True)
    return pipeline_of(settings, {"cls_0": 6, "cls_1": 3, "reg_0": 8, "reg_1": 4})


def numbers(text):
    """Return the numbers in a caption, without that of the page."""
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_the_pages_in_their_order(points, anchors):
    assert [page.name for page in explain.pages_of(points)] == NAMES
    assert [page.name for page in explain.pages_of(anchors)] == ["1_input", "2_anchors", *NAMES[2:]]


def test_a_point_stands_in_each_cell(points):
    page = explain_one_stage.draw_priors(points)
    height, width = points.model["cls_0"].shape[2:]
    assert numbers(page.caption) == [height * width]
    drawn = page.figure.axes[0].lines[0].get_xydata()
    y, x = np.divmod(np.arange(height * width), width)
    np.testing.assert_allclose(drawn, np.stack([8 * x + 4, 8 * y + 4], axis=1))


def test_anchors_are_drawn_to_scale(anchors):
    page = explain_one_stage.draw_priors(anchors)
    maps = [anchors.model[f"cls_{level}"].shape[2:] for level in range(2)]
    assert numbers(page.caption) == [2 * np.prod(maps[0]) + np.prod(maps[1])]
    first, second = page.figure.axes[:2]
    for axis, sizes in ((first, [(8, 8), (16, 8)]), (second, [(16, 16)])):
        assert len(axis.collections) == 3  # cells
        for collection in axis.collections:
            corners = [path.vertices for path in collection.get_paths()]
            assert [tuple(np.ptp(corner, axis=0)) for corner in corners] == sizes


def test_a_cell_has_the_score_of_its_best_class(points, anchors):
    images = [axis.images[-1] for axis in explain_one_stage.draw_scores(points).figure.axes if axis.images]
    cls, centerness = points.model["cls_0"][0], points.model["centerness_0"][0, 0]
    expected = sigmoid(np.maximum(cls[0], cls[1])) * sigmoid(centerness)
    np.testing.assert_allclose(images[0].get_array(), expected, rtol=1e-5)
    assert images[0].get_extent() == [0, 8 * cls.shape[2], 8 * cls.shape[1], 0]
    page = explain_one_stage.draw_scores(anchors)
    images = [axis.images[-1] for axis in page.figure.axes if axis.images]
    cls = anchors.model["cls_0"][0].transpose(1, 2, 0)
    expected = np.maximum(softmax(cls[..., :3])[..., :2].max(axis=2), softmax(cls[..., 3:])[..., :2].max(axis=2))
    np.testing.assert_allclose(images[0].get_array(), expected, rtol=1e-5)
    assert "softmax" in page.text
    assert "centerness" not in page.text


def test_the_root_of_the_product(pipeline_of):
    settings = changed(changed(pointed().settings, "head.factor", "centerness"), "head.combined", "root")
    p = pipeline_of(settings, {"cls_0": 2, "reg_0": 4, "centerness_0": 1})
    cls, centerness = p.model["cls_0"][0], p.model["centerness_0"][0, 0]
    np.testing.assert_allclose(p.scores[0], np.sqrt(sigmoid(cls.max(axis=0)) * sigmoid(centerness)), rtol=1e-5)
    assert "root" in explain_one_stage.draw_scores(p).text


def test_the_best_candidates_are_drawn(points):
    """With a factor, the candidates are not in the order of their scores."""
    left = explain_one_stage.draw_candidates(points, shown=5).figure.axes[0]
    scores = points.detect["scores"]
    assert not (np.diff(scores) <= 0).all()
    best = points.detect["resized"][np.sort(np.argsort(-scores)[:5])]
    drawn = [tuple(path.vertices[0]) for path in left.collections[0].get_paths()]
    assert set(drawn) == {tuple(box[:2]) for box in best.astype(float)}


def test_candidates_before_and_after_nms(anchors):
    page = explain_one_stage.draw_candidates(anchors, shown=5)
    before, kept, after = (len(part) for part in (*map(anchors.detect.get, ("candidates", "kept")),
                                                  anchors.detections.boxes))  # fmt: skip
    assert numbers(page.caption) == [before, kept, after]
    left, right = page.figure.axes[:2]
    (best,) = left.collections
    assert len(best.get_paths()) == 10  # five of each level
    best = [np.sort(-anchors.detect["scores"][anchors.detect["levels"] == level])[:5] for level in range(2)]
    drawn = {tuple(path.vertices[0]) for path in left.collections[0].get_paths()}
    expected = anchors.detect["resized"][np.isin(-anchors.detect["scores"], np.concatenate(best))]
    assert drawn == {tuple(box[:2]) for box in expected.astype(float)}
    assert sum(len(collection.get_paths()) for collection in right.collections) <= 10


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "A class of a point is a candidate if its score is above 0.05; on each level, the best 1,000 get a box."),
        (
            {"one_class": True, "nms_pre": -1},
            "The best class of a point is a candidate if its score is above 0.05; all",
        ),
        ({"nms_pre_per_class": 9, "nms_pre": -1}, "the best 9 of each class get a box."),
    ],
)
def test_how_candidates_were_chosen(pipeline_of, values, words):
    settings = pointed().settings
    settings = changed(settings, "head", msgspec.structs.replace(settings.head, **values))
    p = pipeline_of(settings, {"cls_0": 2, "reg_0": 4})
    assert words in explain_one_stage.draw_candidates(p).text


def test_paa_chooses_anchors(pipeline_of):
    coder = Coder(means=NO_MEANS, stds=(1, 1, 1, 1))
    settings = anchored(PAA, PAASettings, deltas=coder).settings
    p = pipeline_of(settings, {"cls_0": 4, "cls_1": 2, "reg_0": 8, "reg_1": 4})
    assert "the best 1,000 anchors, with all their classes, get a box" in explain_one_stage.draw_candidates(p).text


def test_a_picture_that_keeps_its_size(pipeline_of):
    p = pipeline_of(changed(pointed().settings, "preprocess.scale", None), {"cls_0": 2, "reg_0": 4})
    page = explain.draw_input(p)
    assert "The picture keeps its size. Then it is normalised" in page.text
    assert "Zeros on the right and at the bottom make both sides multiples of 32" in page.text


def test_nothing_is_found(pipeline_of):
    settings = changed(pointed().settings, "head.score_threshold", 1.0)
    pages = explain.pages_of(pipeline_of(settings, {"cls_0": 2, "reg_0": 4}))
    assert [page.name for page in pages] == NAMES
    assert numbers(pages[3].caption)[1:] == [0, 0, 0]


def test_without_a_limit_all_that_nms_keeps_is_returned(points, pipeline_of):
    assert "No more than 100 are returned" in explain.tell_nms(points)
    settings = changed(points.settings, "head.max_per_img", None)
    p = pipeline_of(settings, {"cls_0": 2, "reg_0": 4, "centerness_0": 1})
    pages = explain.pages_of(p)
    kept = len(p.detect["kept"])
    assert kept == len(p.detections.boxes) > 100
    assert f"All of them are returned: here {kept}." in pages[4].text
    assert pages[4].functions.startswith("detectors.one_stage.suppress")


def test_points_of_maps_stand_where_the_maps_tell(pipeline_of):
    points = pointed(strides=[8, 16], units=[8, 16], strides_of_maps=True).settings
    p = pipeline_of(points, {"cls_0": 2, "cls_1": 2, "reg_0": 4, "reg_1": 4})
    p.model["cls_1"] = p.model["cls_1"][..., :-1, :]  # as of a map that was rounded
    _, anchors, _ = explain_one_stage.maps_of_one_stage(p)
    height = p.model["cls_0"].shape[2] * 8
    step = height // p.model["cls_1"].shape[2]
    assert step > 16
    assert anchors[1][1, 0, 0, 1] - anchors[1][0, 0, 0, 1] == step


def test_a_picture_padded_with_grey_to_a_square(pipeline_of):
    settings = pointed().settings
    for name, value in (("pad_to_square", True), ("pad_value", 114.0), ("pad_divisor", 1)):
        settings = changed(settings, f"preprocess.{name}", value)
    page = explain.draw_input(pipeline_of(settings, {"cls_0": 2, "reg_0": 4}))
    assert "hatched: pixels of 114, up to a square" in page.figure.axes[0].get_xlabel()
    assert "make it a square" in page.text
    assert "first network" not in page.text


def network_of(**outputs):
    """Return the networks of a detector that says this of every picture, {name: array}."""

    def run(blob, record):
        record("model", image=blob, **{name: array[None] for name, array in outputs.items()})
        return [array[None] for array in outputs.values()]

    return {"model.onnx": run}


@pytest.fixture
def peaks():
    """Return the Pipeline of a CenterNet that finds two objects in a picture of 100 x 50 pixels."""
    canvas = Preprocess(scale=None, canvas=31, mean=(0, 0, 0), std=(255, 255, 255), to_rgb=False, pad_divisor=1)
    settings = CenterNetSettings(classes=("a", "b"), preprocess=canvas, head=Queries(max_per_img=2))
    heatmap = np.full((2, 16, 32), 0.01, np.float32)  # of a canvas of 128 x 64
    heatmap[1, 8, 16], heatmap[0, 8, 10], heatmap[0, 8, 11] = 0.9, 0.7, 0.6
    size, offset = np.full((2, 16, 32), 3, np.float32), np.full((2, 16, 32), 0.25, np.float32)
    networks = network_of(heatmap=heatmap, size=size, offset=offset)
    image = np.random.default_rng(0).integers(100, 255, (50, 100, 3), np.uint8)
    return explain.Pipeline(CenterNet(settings, networks), image)


def test_the_pages_of_centernet(peaks):
    pages = explain.pages_of(peaks)
    assert [page.name for page in pages] == ["1_input", "2_heat", "3_boxes", "4_result"]
    assert numbers(pages[1].caption) == [2, 32, 16, 2, 0, 90]
    assert numbers(pages[2].caption) == [3, 2]


def test_a_picture_in_the_middle_of_black(peaks):
    np.testing.assert_array_equal(peaks.resized, peaks.image[..., ::-1])
    page = explain.draw_input(peaks)
    assert page.caption == "Input: 100 x 50 pixels, padded to 128 x 64"
    assert page.figure.axes[0].get_xlabel().endswith("hatched: black, up to multiples of 32")
    hatched = sum(patch.get_width() * patch.get_height() for patch in page.figure.axes[0].patches)
    assert hatched == 128 * 64 - 100 * 50
    assert "keeps its size" in page.text


def test_crosses_stand_where_the_centres_are(peaks):
    axis = explain_one_stage.draw_heat(peaks).figure.axes[0]
    np.testing.assert_allclose(axis.images[-1].get_array(), peaks.model["heatmap"][0].max(axis=0))
    assert axis.images[-1].get_extent() == [0, 128, 64, 0]
    drawn = axis.lines[0].get_xydata()
    np.testing.assert_allclose(drawn, [[16.25 * 4, 8.25 * 4], [10.25 * 4, 8.25 * 4]])


def test_the_boxes_of_peaks_are_drawn_in_the_picture(peaks):
    axis = explain_one_stage.draw_peaks(peaks).figure.axes[0]
    drawn = [path.vertices[[0, 2]].ravel() for path in axis.collections[0].get_paths()]
    left, top = 64 - 50, 32 - 25  # of the picture in the canvas
    expected = [[(x - 1.5) * 4 - left, (8.25 - 1.5) * 4 - top, (x + 1.5) * 4 - left, (8.25 + 1.5) * 4 - top]
                for x in (10.25, 16.25)]  # the best last, on top  # fmt: skip
    np.testing.assert_allclose(drawn, expected)


def test_the_page_of_queries():
    rng = np.random.default_rng(0)
    settings = DETRSettings(classes=("a", "b"), preprocess=PREPROCESS, head=Queries(max_per_img=3))
    cls, reg = rng.normal(0, 2, (5, 3)).astype(np.float32), rng.uniform(0.2, 0.4, (5, 4)).astype(np.float32)
    image = np.zeros((96, 128, 3), np.uint8)
    p = explain.Pipeline(DETR(settings, network_of(cls=cls, reg=reg)), image)
    pages = explain.pages_of(p)
    assert [page.name for page in pages] == ["1_input", "2_queries", "3_result"]
    best = softmax(cls)[:, :2].max(axis=1)
    assert pages[1].caption == f"2  Queries: 5 answers, the best score {best.max():.2f}"
    drawn = [path.vertices[0] for path in pages[1].figure.axes[0].collections[0].get_paths()]
    corners = (reg[:, :2] - reg[:, 2:] / 2) * np.float32([128, 96])
    np.testing.assert_allclose(drawn, corners[np.argsort(best)], rtol=1e-5)


def test_the_files(points, tmp_path, photographs):
    import cv2

    cv2.imwrite(str(tmp_path / "cat.png"), photographs["cat"])
    assert explain.main([str(tmp_path / "cat.png"), "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("*")) == sorted(
        [*(f"{name}.png" for name in NAMES), "index.html"]
    )
    assert "<h1>FCOS on cat.png</h1>" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
