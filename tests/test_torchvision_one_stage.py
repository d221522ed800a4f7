"""torchvision's one-stage detectors: their exports against torchvision's own models."""

import functools
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from boxes import assert_equal_detections, with_second_chance
from conftest import TORCHVISION, call_program

from detectors import load
from detectors.one_stage import Candidates, suppress
from detectors.preprocess import Picture
from detectors.settings import changed
from postprocess import sigmoid

torch = pytest.importorskip("torch", reason=TORCHVISION)
pytest.importorskip("torchvision", reason=TORCHVISION)

from seeded_torchvision import seed, write_checkpoint  # noqa: E402
from test_postprocess_torchvision import pairs_near_the_threshold  # noqa: E402
from test_torchvision import own_detections, own_model  # noqa: E402
from torchvision.models import get_model_builder, mobilenet_v3_large  # noqa: E402
from torchvision.models._api import WeightsEnum  # noqa: E402
from torchvision.models.detection import RetinaNet  # noqa: E402

import export  # noqa: E402
from sources import SourceError  # noqa: E402
from sources import torchvision as source  # noqa: E402

BUILDERS = {name: 10 if "retina" in name else 15 if "fcos" in name else 12 for name in source.BUILDERS
            if "rcnn" not in name}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, photographs):
    """Return a function that returns the path of a builder's seeded weights."""
    folder = tmp_path_factory.mktemp("one_stage")
    return functools.lru_cache(lambda name: write_checkpoint(name, folder / f"{name}.pth", photographs["coffee"]))


def found_as_expected(detector, model, image):
    """Return the Detections in an image, once they are compared with those of torchvision's model."""
    ours, expected = detector(image), own_detections(model, image)
    expected = expected._replace(labels=expected.labels % 91)  # class 0, of which nothing was trained, is the last
    assert_equal_detections(ours, expected)
    return ours


def export_in(image, builder, checkpoints, tmp_path):
    """Export a builder, whose detections are compared in an image; check that all is True."""
    cv2.imwrite(str(tmp_path / "coffee.png"), image)
    smaller = [] if "ssd" in builder else ["--set", "min_size=300", "--set", "max_size=400"]
    arguments = ("--out", tmp_path, "--picture", tmp_path / "coffee.png", *smaller)
    result = call_program(export.main, f"torchvision:{builder}", checkpoints(builder), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("True") == BUILDERS[builder] + 2


@pytest.mark.parametrize("builder", BUILDERS)
def test_detections_equal_torchvision(builder, checkpoints, photographs, tmp_path):
    with_second_chance(lambda image: export_in(image, builder, checkpoints, tmp_path), photographs["coffee"])
    detector, model = load(tmp_path), own_model(builder, checkpoints(builder))
    detector.settings = source.load(builder, checkpoints(builder)).settings  # the usual sizes
    for name in ("coffee", "motorcycle"):
        ours = with_second_chance(lambda image: found_as_expected(detector, model, image), photographs[name])
        assert len(ours.boxes) >= 100
        assert len(set(ours.labels)) >= 5
        height, width = photographs[name].shape[:2]
        assert ours.boxes.min() >= 0
        assert (ours.boxes <= np.float32([width, height] * 2) + 1e-3).all()
    assert len(detector.classes) == (90 if "ssd" in builder else 91)
    assert detector.classes[0] == "person"
    assert detector.classes[-1] == ("toothbrush" if "ssd" in builder else "")


@pytest.mark.parametrize(
    ("builder", "option", "words"),
    [
        ("ssd300_vgg16", "min_size=400", "--set min_size: cannot be set"),
        ("ssd300_vgg16", "frozen_eps=0", "--set frozen_eps: cannot be set"),
        ("retinanet_resnet50_fpn", "box_score_thresh=0.1", "--set box_score_thresh: cannot be set"),
        ("fcos_resnet50_fpn", "nms_thresh=2", "--set nms_thresh=2: Expected `float` <= 1"),
        ("fasterrcnn_resnet50_fpn", "score_thresh=0.1", "--set score_thresh: cannot be set"),
    ],
)
def test_options_that_a_builder_does_not_have(builder, option, words):
    with pytest.raises(SourceError, match=words):
        source.load(builder, None, options=[tuple(option.split("="))])


def test_weights_of_another_builder(checkpoints):
    with pytest.raises(SourceError, match="holds no ssd300_vgg16 of torchvision: it lacks head.classification_head"):
        source.load("ssd300_vgg16", checkpoints("retinanet_resnet50_fpn"))
    with pytest.raises(SourceError, match="does not fit the model"):
        source.load("fcos_resnet50_fpn", checkpoints("retinanet_resnet50_fpn"))


@pytest.mark.parametrize("builder", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_nms_equals_torchvision_where_rounding_decides(builder, checkpoints):
    """NMS moves the boxes of a class by its number, which starts with a class that is not trained."""
    rng, image_size = np.random.default_rng(0), (765, 1000)
    anchors, labels = pairs_near_the_threshold(rng, 450, image_size), np.repeat(rng.integers(1, 91, 450), 2)
    logits = np.full((1, 900, 91), -9, np.float32)
    logits[0, np.arange(900), labels] = scores = rng.permutation(np.linspace(0, 5, 900)).astype(np.float32)
    limits = {"score_thresh": 0.05, "topk_candidates": 1000, "nms_thresh": 0.5, "detections_per_img": 1000}
    own = SimpleNamespace(box_coder=SimpleNamespace(decode_single=lambda deltas, boxes: boxes), **limits)
    outputs = {"cls_logits": [torch.from_numpy(logits)], "bbox_regression": [torch.zeros(1, 900, 4)]}
    (expected,) = RetinaNet.postprocess_detections(own, outputs, [[torch.from_numpy(anchors)]], [image_size])
    head = source.load(builder, checkpoints(builder)).settings.head
    head = changed(changed(head, "iou_threshold", 0.5), "max_per_img", 1000)
    picture = Picture(None, image_size, np.ones(4, np.float32), image_size)
    candidates = Candidates(anchors, sigmoid(scores), labels - 1, np.arange(900), np.zeros(900, int))
    found = suppress(candidates, picture, head)
    np.testing.assert_array_equal(found.boxes, expected["boxes"])
    np.testing.assert_array_equal(found.labels, expected["labels"] - 1)
    otherwise = suppress(candidates, picture, changed(head, "nms_first_group", 0))
    assert len(otherwise.boxes) != len(found.boxes)


def test_ssdlite_on_a_backbone_that_was_trained_on_imagenet(photographs, tmp_path, monkeypatch):
    """Torchvision makes its end wider then, which is the default of who trains anew."""
    builder = "ssdlite320_mobilenet_v3_large"
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: mobilenet_v3_large().state_dict())
    torch.manual_seed(0)
    model = get_model_builder(builder)(num_classes=6)
    seed(model, photographs["coffee"])
    torch.save(model.state_dict(), tmp_path / "trained.pth")
    (tmp_path / "classes.txt").write_text("\n".join("abcde"))
    cv2.imwrite(str(tmp_path / "coffee.png"), photographs["coffee"])
    arguments = ("--classes", tmp_path / "classes.txt", "--picture", tmp_path / "coffee.png", "--out", tmp_path)
    result = call_program(export.main, f"torchvision:{builder}", tmp_path / "trained.pth", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = own_detections(model.eval(), photographs["cat"])
    assert len(expected.boxes) >= 50
    with_second_chance(
        lambda image: assert_equal_detections(load(tmp_path)(image), own_detections(model, image)), photographs["cat"]
    )


def test_options_change_what_is_found(checkpoints):
    options = [("score_thresh", "0.3"), ("nms_thresh", "0.4"), ("topk_candidates", "50"), ("detections_per_img", "7")]
    head = source.load("ssd300_vgg16", checkpoints("ssd300_vgg16"), options=options).settings.head
    assert (head.score_threshold, head.nms_pre_per_class, head.max_per_img) == (0.3, 50, 7)
    assert head.iou_threshold == pytest.approx(0.4)
