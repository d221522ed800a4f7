"""torchvision's detectors: their exports against torchvision's own models, and the command line that makes them.

The models have seeded weights. torchvision itself builds the ones to compare with, from a file of these weights in the
place of its own: with frozen batch normalisation, and its eps.
"""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
from boxes import ROIS, assert_equal_detections, with_second_chance
from conftest import ROOT, TORCHVISION, call_program

from detectors import Detections, load, rle
from detectors.mask_rcnn import paste_all
from detectors.preprocess import Picture, preprocess
from detectors.settings import Masks, changed
from postprocess import align_levels, assign_levels, detect, nms, propose

torch = pytest.importorskip("torch", reason=TORCHVISION)
pytest.importorskip("torchvision", reason=TORCHVISION)

import onnx  # noqa: E402
from seeded_torchvision import write_checkpoint  # noqa: E402
from torchvision import ops  # noqa: E402
from torchvision.models import get_model_builder, get_model_weights  # noqa: E402
from torchvision.models._api import WeightsEnum  # noqa: E402
from torchvision.models.detection.roi_heads import paste_masks_in_image  # noqa: E402
from torchvision.models.detection.transform import resize_boxes  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

import compare  # noqa: E402
import evaluate  # noqa: E402
import explain  # noqa: E402
import export  # noqa: E402
import sources  # noqa: E402
from sources import torchvision as source  # noqa: E402

R50, R50_V2, MOBILENET, SMALL, MASK, MASK_V2 = BUILDERS = tuple(name for name in source.BUILDERS if "rcnn" in name)
NAMES = ["astronaut", "coffee", "cat", "motorcycle"]
SHAPES = ["circle", "triangle", "square", "star", "cross", "crescent"]


def as_torch(image):
    """Return an image [h, w, 3] uint8 BGR as torchvision's models take it: [3, h, w], red first, 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1).float() / 255


def own_model(builder, checkpoint, **arguments):
    """Return what torchvision builds when its weights are those in a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: torch.load(checkpoint, weights_only=True))
        return get_model_builder(builder)(weights="DEFAULT", **arguments).eval()


def own_detections(model, image):
    """Return the Detections of torchvision's model; its label of the first class is 1. Masks are [d, h, w] bool."""
    with torch.no_grad():
        found = model([as_torch(image)])[0]
    masks = (found["masks"][:, 0] >= 0.5).numpy() if "masks" in found else None
    return Detections(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy() - 1, masks)


def assert_equal_masks(ours, reference):
    """Check that each mask has an IoU of 0.999 with that of its twin, or differs in three pixels at most."""
    ours, reference = compare.pair_detections(ours, reference)
    for found, expected in zip(map(rle.decode, ours.masks), reference.masks):
        assert found.shape == expected.shape
        different, union = np.count_nonzero(found ^ expected), np.count_nonzero(found | expected)
        assert different <= 3 or different <= 0.001 * union


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, photographs):
    """Return a function that returns the path of a builder's seeded checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return functools.lru_cache(lambda name: write_checkpoint(name, folder / f"{name}.pth", photographs["astronaut"]))


@pytest.fixture(scope="module")
def exports(tmp_path_factory, checkpoints, photographs):
    """Return a function that returns the folder of a builder's export, made and verified by export.py.

    On a picture of a quarter of the size, which takes a quarter of the time: the networks are the same.
    """

    @functools.lru_cache
    def folder_of(builder):
        folder = tmp_path_factory.mktemp(builder)
        cv2.imwrite(str(folder / "coffee.png"), photographs["coffee"])
        picture = ("--picture", folder / "coffee.png", "--set", "min_size=400", "--set", "max_size=667")
        result = call_program(export.main, f"torchvision:{builder}", checkpoints(builder), "--out", folder, *picture)
        assert result.returncode == 0, result.stdout + result.stderr
        (folder / "printed.txt").write_text(result.stdout)
        return folder

    return folder_of


def usual_detector(builder, checkpoints, exports):
    """Return the export of a builder with the settings that it has by itself."""
    detector = load(exports(builder))
    detector.settings = source.load(builder, checkpoints(builder)).settings
    return detector


# ------------------------------------------------------------------ equal


@pytest.mark.parametrize("builder", BUILDERS)
def test_detections_equal_torchvision(builder, checkpoints, exports, photographs):
    detector, model = usual_detector(builder, checkpoints, exports), own_model(builder, checkpoints(builder))

    def compare(image):
        ours = detector(image)
        assert len(ours.boxes) == 100
        assert len(set(ours.labels)) >= 5
        expected = own_detections(model, image)
        assert_equal_detections(ours, expected)
        assert (ours.masks is not None) == (expected.masks is not None) == (builder in (MASK, MASK_V2))
        if ours.masks is not None:
            assert_equal_masks(ours, expected)

    for name in NAMES:
        with_second_chance(compare, photographs[name])


def picture_of(image_size, original_size):
    """Return what postprocessing needs to know of a picture of so many (height, width), resized from others."""
    scale_factor = np.float32(np.divide(image_size, original_size)[[1, 0] * 2])
    return Picture(None, image_size, scale_factor, original_size)


@pytest.mark.parametrize("builder", BUILDERS)
def test_numpy_equals_torchvision_on_its_own_maps(builder, checkpoints, exports, photographs):
    """Stage by stage, each from what torchvision has computed until then."""
    settings = usual_detector(builder, checkpoints, exports).settings
    model, image = own_model(builder, checkpoints(builder)), photographs["cat"]
    heads = model.roi_heads
    with torch.no_grad():
        images, _ = model.transform([as_torch(image)])
        maps = model.backbone(images.tensors)
        cls, reg = ([level[0].numpy() for level in kind] for kind in model.rpn.head(list(maps.values())))
        proposals = model.rpn(images, maps)[0][0]
        roi_feats = heads.box_roi_pool(maps, [proposals], images.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(roi_feats))
        found = heads.postprocess_detections(logits, deltas, [proposals], images.image_sizes)
        boxes, scores, labels = (part[0] for part in found)
        rescaled = model.transform.postprocess([{"boxes": boxes}], images.image_sizes, [image.shape[:2]])[0]["boxes"]

    rois, features = proposals.numpy(), [feature[0].numpy() for feature in maps.values()]
    picture = picture_of(images.image_sizes[0], image.shape[:2])
    ours = propose(cls, reg, picture.image_size, settings.proposals)
    one = np.zeros(len(rois), int)  # the order of scores that differ in their last bit is free
    assert_equal_detections(Detections(ours, one, one), Detections(rois, one, one), pixels=1e-3)
    levels = assign_levels(rois, len(settings.rois.strides), settings.rois.finest_scale)
    np.testing.assert_allclose(align_levels(features, rois, levels, settings.rois), roi_feats, atol=2e-5)
    ours = detect(np.roll(logits.numpy(), -1, axis=1), deltas.numpy()[:, 4:], rois, picture, settings.head)
    assert len(ours.boxes) == 100
    assert_equal_detections(ours, Detections(rescaled.numpy(), scores.numpy(), labels.numpy() - 1), pixels=1e-3)


CHANGES = {  # an argument of the builder, and another value that changes what is detected
    "min_size": 200,
    "max_size": 330,
    "fixed_size": (400, 250),
    "size_divisible": 64,
    "image_mean": (0.6, 0.5, 0.3),
    "image_std": (0.3, 0.2, 0.2),
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_test": 30,
    "rpn_nms_thresh": 0.4,
    "rpn_score_thresh": 0.93,
    "box_score_thresh": 0.15,
    "box_nms_thresh": 0.2,
    "box_detections_per_img": 20,
    "bbox_reg_weights": (5.0, 5.0, 3.0, 3.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_argument_that_can_be_set_is_honoured(name, checkpoints, exports, photographs):
    """The networks stay the same; only settings change."""
    usual, changed = usual_detector(SMALL, checkpoints, exports), load(exports(SMALL))
    changed.settings = source.load(SMALL, checkpoints(SMALL), options=[(name, repr(CHANGES[name]))]).settings
    model = own_model(SMALL, checkpoints(SMALL), **{name: CHANGES[name]})

    def compare(image):
        found, before = changed(image), usual(image)
        assert_equal_detections(found, own_detections(model, image))
        assert len(found.boxes) > 10
        assert len(found.boxes) != len(before.boxes) or np.abs(found.boxes - before.boxes).max() > 1

    with_second_chance(compare, photographs["coffee"])


def test_every_argument_has_a_test():
    assert {*CHANGES, "frozen_eps"} == set(source.OF_ROIS)


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
def test_an_iou_of_exactly_the_threshold(threshold):
    """One is above the other's double, if the float32 was rounded up."""
    shift = 10 * (1 - threshold) / (1 + threshold)
    boxes = np.float32([[0, 0, 10, 1], [shift, 0, 10 + shift, 1]])
    for left in boxes[1, 0] + np.float32(1e-6) * np.arange(-30, 31):
        boxes[1, 0] = left
        expected = ops.nms(torch.from_numpy(boxes), torch.tensor([0.9, 0.8]), threshold).tolist()
        assert nms(boxes, np.float32([0.9, 0.8]), source.as_float32(threshold)).tolist() == expected


@pytest.mark.parametrize("builder", [SMALL, MASK])
def test_where_nothing_is_proposed_nothing_is_found(builder, checkpoints, exports, photographs):
    detector, model = load(exports(builder)), own_model(builder, checkpoints(builder), rpn_score_thresh=1.1)
    detector.settings = source.load(builder, checkpoints(builder), options=[("rpn_score_thresh", "1.1")]).settings
    for found in (detector(photographs["cat"]), own_detections(model, photographs["cat"])):
        assert [len(field) for field in found if field is not None] == [0] * (4 if builder == MASK else 3)


# ------------------------------------------------------------------ masks


@pytest.mark.parametrize("builder", [MASK, MASK_V2])
def test_masks_equal_torchvision_on_its_own_maps_and_logits(builder, checkpoints, exports, photographs):
    """From the same boxes: levels and features for the mask head; and from its logits, every pixel."""
    detector = usual_detector(builder, checkpoints, exports)
    model, image = own_model(builder, checkpoints(builder)), photographs["coffee"]
    heads, stages = model.roi_heads, {}
    with torch.no_grad():
        images, _ = model.transform([as_torch(image)])
        maps = model.backbone(images.tensors)
        found = heads(maps, model.rpn(images, maps)[0], images.image_sizes)[0]
        rois, labels = found[0]["boxes"], found[0]["labels"]
        roi_feats = heads.mask_roi_pool(maps, [rois], images.image_sizes)
        logits = heads.mask_predictor(heads.mask_head(roi_feats))
        levels = heads.mask_roi_pool.map_levels([rois])
        (expected,) = model.transform.postprocess(found, images.image_sizes, [image.shape[:2]])

    picture = picture_of(images.image_sizes[0], image.shape[:2])
    features = [level[0].numpy() for level in maps.values()]
    ours = Detections(expected["boxes"].numpy(), None, labels.numpy() - 1)
    detector.networks = {"mask.onnx": lambda *_: [logits.numpy()[:, 1:]]}
    scores = detector.mask_scores(ours, features, picture, lambda stage, **arrays: stages.update(arrays))
    np.testing.assert_allclose(ours.boxes * picture.scale_factor, rois, atol=1e-3)
    np.testing.assert_array_equal(stages["levels"], levels)
    np.testing.assert_allclose(stages["roi_feats"], roi_feats, atol=1e-4)
    masks = paste_all(scores, ours.boxes, picture, detector.settings.masks)
    assert len(masks) == 100
    scores = expected["masks"].numpy()[:, 0]
    different = np.array([rle.decode(mask) for mask in masks]) ^ (scores >= 0.5)
    assert np.count_nonzero(different) <= 3  # of 24 million, and only where rounding alone decides
    np.testing.assert_allclose(scores[different], 0.5, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 451), (560, 392), (7, 3), (1, 1)])
def test_pasting_equals_torchvision(size):
    """Boxes from a hundredth of a pixel to three pictures wide; half of them reach out, detections never do.

    Rounding alone may decide a pixel whose score is the threshold but for the last bits.
    """
    rng, (height, width) = np.random.default_rng(0), size
    centers = rng.uniform(0, [width, height], (300, 2))
    sizes = np.exp(rng.uniform(np.log(0.01), np.log(3 * max(size)), (300, 2)))
    boxes = np.float32(np.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1))
    boxes[::2] = boxes[::2].clip(0, [width, height] * 2)
    scores = torch.from_numpy(rng.normal(0, 2, (300, 28, 28)).astype(np.float32)).sigmoid()
    expected = paste_masks_in_image(scores[:, None], torch.from_numpy(boxes), size)[:, 0].numpy() >= 0.5

    settings = Masks(rois=ROIS, threshold=0.5, bordered=True)
    masks = paste_all(scores.numpy(), boxes, Picture(None, size, np.ones(4), size), settings)
    different = [np.count_nonzero(rle.decode(mask) ^ pixels) for mask, pixels in zip(masks, expected)]
    assert max(different) <= 3
    assert sum(different) <= 1e-5 * np.count_nonzero(expected)


def test_masks_of_boxes_as_large_as_the_picture(checkpoints):
    """Sides that 28 divides: with its border, such a box ends at a whole pixel, if no bit is rounded otherwise."""
    settings = source.load(MASK, checkpoints(MASK)).settings
    rng, cls, reg = np.random.default_rng(0), np.full((1, 91), -9, np.float32), np.zeros((1, 360), np.float32)
    cls[0, 5] = 9
    for height, width in 28 * rng.integers(5, 20, (40, 2)):
        size, resized = (
            (int(height), int(width)),
            preprocess(np.zeros((height, width, 3), np.uint8), settings.preprocess),
        )
        rois = np.float32([[0, 0, *resized.image_size[::-1]]])
        scores = torch.from_numpy(rng.random((1, 1, 28, 28), np.float32))
        boxes = resize_boxes(torch.from_numpy(rois), resized.image_size, size)
        expected = paste_masks_in_image(scores, boxes, size)[0, 0].numpy() >= 0.5
        found = detect(cls, reg, rois, resized, settings.head)
        (mask,) = paste_all(scores[0].numpy(), found.boxes, resized, settings.masks)
        assert np.count_nonzero(rle.decode(mask) ^ expected) <= 3


@pytest.mark.parametrize("option", [("fixed_size", (400, 250)), ("box_detections_per_img", 20)])
def test_masks_with_other_arguments(option, checkpoints, exports, photographs):
    """Among them a picture that is resized by different factors along x and y."""
    (name, value), detector = option, load(exports(MASK))
    detector.settings = source.load(MASK, checkpoints(MASK), options=[(name, repr(value))]).settings
    model = own_model(MASK, checkpoints(MASK), **{name: value})

    def compare(image):
        found, expected = detector(image), own_detections(model, image)
        assert_equal_detections(found, expected)
        assert len(found.masks) == (20 if name == "box_detections_per_img" else 100)
        assert_equal_masks(found, expected)

    with_second_chance(compare, photographs["cat"])


# ------------------------------------------------------------------ what is exported


@pytest.mark.parametrize("builder", BUILDERS)
def test_files_have_the_names_that_every_export_has(builder, exports):
    levels = range(3 if builder in (MOBILENET, SMALL) else 5)
    maps = [f"{kind}_{level}" for kind in ("cls", "reg", "feat") for level in levels]
    expected = {"model1.onnx": (["image"], maps), "model2.onnx": (["roi_feats"], ["cls", "reg"])}
    if builder in (MASK, MASK_V2):
        expected["mask.onnx"] = (["roi_feats"], ["mask"])
    networks = {path.name: onnx.load(str(path)).graph for path in exports(builder).glob("*.onnx")}
    names = {
        file: tuple([tensor.name for tensor in tensors] for tensors in (network.input, network.output))
        for file, network in networks.items()
    }
    assert names == expected
    lines = (exports(builder) / "printed.txt").read_text().splitlines()
    assert sum(line.endswith("  True") for line in lines) == sum(len(outputs) for _, outputs in names.values()) + 2
    settings = load(exports(builder)).settings
    assert settings.source["builder"] == builder
    # Two maps of the MobileNets have the stride 32; MultiScaleRoIAlign, which finds levels by stride, reads the first.
    assert settings.rois.strides == ((4, 8, 16, 32) if len(levels) == 5 else (32,))


@pytest.mark.parametrize("builder", BUILDERS)
def test_batch_normalisation_is_folded_into_convolutions(builder, exports):
    networks = {path.name: onnx.load(str(path)).graph for path in exports(builder).glob("*.onnx")}
    assert "BatchNormalization" not in [node.op_type for network in networks.values() for node in network.node]
    nodes = [node.op_type for node in networks["model1.onnx"].node]
    assert nodes.count("Mul") + nodes.count("Add") + nodes.count("Sub") < nodes.count("Conv")  # residuals, FPN; swish


def test_as_many_nodes_as_mmdetection_s_network(exports, request):
    pytest.importorskip("mmdet", reason="needs MMDetection: uv run --extra export pytest")
    ours, reference = (
        len(onnx.load(str(folder / "model1.onnx")).graph.node)
        for folder in (exports(R50), request.getfixturevalue("coco_pair"))
    )
    assert abs(ours - reference) <= 0.1 * reference


def test_exporting_needs_nothing_of_mmdetection(checkpoints, tmp_path):
    """Where its packages are installed, they cannot even be imported in this process."""
    pytest.importorskip("mmcv", reason="needs MMDetection: uv run --extra export pytest")
    blocked = "import sys; sys.modules.update(dict.fromkeys(['mmcv', 'mmdet', 'sources.mmdetection']))"
    arguments = [f"torchvision:{SMALL}", str(checkpoints(SMALL)), "--out", str(tmp_path)]
    code = f"{blocked}; sys.path.insert(0, {str(ROOT)!r}); import export; sys.exit(export.main({arguments!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# ------------------------------------------------------------------ checkpoints and classes


def frozen_eps(model):
    """Return the eps of each of the two kinds of batch normalisation in a model."""
    return [{layer.eps for layer in model.modules() if isinstance(layer, kind)}
            for kind in (FrozenBatchNorm2d, torch.nn.BatchNorm2d)]  # fmt: skip


@pytest.mark.parametrize("builder", BUILDERS)
def test_batch_normalisation_is_torchvision_s(builder, checkpoints):
    content = source.load_checkpoint(checkpoints(builder), trust=False)
    assert frozen_eps(source.build_model(builder, {}, content, "")) == frozen_eps(
        own_model(builder, checkpoints(builder))
    )


def test_another_eps_of_frozen_batch_normalisation(checkpoints, capfd):
    content = source.load_checkpoint(checkpoints(R50), trust=False)
    assert frozen_eps(source.build_model(R50, {"frozen_eps": 1e-5}, content, "")) == [{1e-5}, set()]
    source.build_model(R50, {}, content, "")
    line = capfd.readouterr().out
    assert line.count("\n") == 1  # what was said is not asked for
    assert "eps 0 assumed" in line
    assert "--set frozen_eps=1e-5" in line


def test_a_model_trained_without_frozen_layers(checkpoints, tmp_path):
    """Weights that count their batches are those of BatchNorm2d."""
    state = torch.load(checkpoints(SMALL), weights_only=True)
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(7) for name in state if "running_var" in name
    }
    assert frozen_eps(source.build_model(SMALL, {}, {**state, **counters}, "")) == [set(), {1e-5}]
    torch.save({**state, **counters}, tmp_path / "counted.pth")
    with pytest.raises(sources.SourceError, match="--set frozen_eps.*holds no frozen batch normalisation"):
        source.load(SMALL, tmp_path / "counted.pth", options=[("frozen_eps", "0.0")])


@pytest.fixture(scope="module")
def shapes_checkpoint(tmp_path_factory, photographs):
    """Return a checkpoint of the small MobileNet for six classes."""
    path = tmp_path_factory.mktemp("shapes") / "mine.pth"
    return write_checkpoint(SMALL, path, photographs["astronaut"], num_classes=7)


def test_a_state_dict_of_one_s_own_and_names_from_a_file(shapes_checkpoint, tmp_path, photographs):
    cv2.imwrite(str(tmp_path / "coffee.png"), photographs["coffee"])
    arguments = ["--classes", tmp_path / "names.txt", shapes_checkpoint, "--picture", tmp_path / "coffee.png"]
    for first in ("", "\ufeff__background__\n"):  # with the mark that some editors put before a text
        (tmp_path / "names.txt").write_text(first + "\n".join(SHAPES) + "\n\n", encoding="utf-8")
        result = call_program(export.main, f"torchvision:{SMALL}", "--out", tmp_path / "out", *arguments)
        assert result.returncode == 0, result.stderr
        assert list(load(tmp_path / "out").classes) == SHAPES


def test_names_from_the_checkpoint(shapes_checkpoint, tmp_path):
    """Beside the weights, as a training script may have left them."""
    state = torch.load(shapes_checkpoint, weights_only=True)
    beside = {"model": state, "classes": SHAPES}, {"model_state_dict": state, "classes": SHAPES}
    for content in (*beside, {**state, "classes": ["__background__", *SHAPES]}):
        torch.save(content, tmp_path / "training.pth")
        assert list(source.load(SMALL, tmp_path / "training.pth").settings.classes) == SHAPES
    for prefix in ("module.", "model."):
        torch.save({"state_dict": {prefix + name: value for name, value in state.items()}}, tmp_path / "wrapped.pth")
        assert list(source.load(SMALL, tmp_path / "wrapped.pth", names=SHAPES).settings.classes) == SHAPES


@pytest.mark.parametrize("builder", BUILDERS)
def test_names_of_weights_are_those_of_today(builder, checkpoints, tmp_path):
    """In torchvision's own files they are older; saved again by the model, they are not."""
    model, content = own_model(builder, checkpoints(builder)), torch.load(checkpoints(builder), weights_only=True)
    assert ("rpn.head.conv.weight" in content) == (builder not in (R50_V2, MASK_V2))
    assert ("roi_heads.mask_head.mask_fcn1.weight" in content) == (builder == MASK)
    assert source.renamed(content, source.OLD_NAMES).keys() == model.state_dict().keys()
    torch.save(model.state_dict(), tmp_path / "today.pth")
    today = source.load_checkpoint(tmp_path / "today.pth", trust=False)
    assert source.renamed(today, source.OLD_NAMES).keys() == model.state_dict().keys()
    found, expected = (source.build_model(builder, {}, state, "").state_dict() for state in (content, today))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_classes_of_coco(exports):
    """Each is at COCO's own id minus one; what COCO never annotated has no name."""
    classes = load(exports(SMALL)).classes
    categories = get_model_weights(SMALL).DEFAULT.meta["categories"]
    assert len(classes) == 90
    assert [classes[0], classes[15], classes[89]] == ["person", "bird", "toothbrush"]
    assert [label + 1 for label, name in enumerate(classes) if not name] == [
        number for number, name in enumerate(categories) if name == "N/A"
    ]
    assert sum(map(bool, classes)) == 80


# ------------------------------------------------------------------ what is refused


def assert_refused(arguments, *words):
    """Check for exit status 2 and one line on stderr with these words in it."""
    result = call_program(export.main, *arguments)
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("export.py: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "trainable_backbone_layers=3"], ["trainable_backbone_layers", "min_size"]),
        (["--set", "num_classes=7"], ["--set num_classes"]),
        (["--set", "rpn_fg_iou_thresh=0.6"], ["--set rpn_fg_iou_thresh"]),
        (["--set", "min_size=large"], ["--set min_size=large", "not a number"]),
        (["--set", "min_size=0"], ["--set min_size=0", ">= 1"]),
        (["--set", "min_size=(480, 800)"], ["--set min_size", "Expected `int`"]),
        (["--set", "min_size=" + "[" * 300], ["not a number"]),
        (["--set", "min_size={[]}"], ["not a number"]),
        (["--set", "box_nms_thresh=-1"], ["--set box_nms_thresh"]),
        (["--set", "size_divisible=999968"], ["shapes.png"]),
        (["--set", "image_std=[0, 1, 1]"], ["--set image_std"]),
        (["--set", "bbox_reg_weights=[0, 1, 1, 1]"], ["--set bbox_reg_weights"]),
        (["--set", "size_divisible=48"], ["--set size_divisible", "32"]),
        (["--set", "box_score_thresh=1e9"], ["--set box_score_thresh"]),
        (["--classes", "missing.txt"], ["missing.txt"]),
        (["--classes", os.devnull], ["holds no names"]),
        (["--classes", str(ROOT / ".gitignore")], ["90 classes", "--classes FILE"]),
    ],
)
def test_options_that_cannot_be_honoured(checkpoints, tmp_path, options, words):
    assert_refused([f"torchvision:{SMALL}", checkpoints(SMALL), "--out", tmp_path, *options], *words)
    assert list(tmp_path.iterdir()) == []


def test_set_needs_a_name_and_a_value():
    with pytest.raises(SystemExit, match="2"):
        export.main([f"torchvision:{SMALL}", "--set", "min_size"])


def test_other_builders_are_refused_by_name(tmp_path):
    for name in ("keypointrcnn_resnet50_fpn", "nonsense", ""):
        assert_refused([f"torchvision:{name}", "--out", tmp_path], f"torchvision:{name} cannot", R50, MASK)


def test_an_older_torchvision_is_refused(monkeypatch):
    """It rounds the factor of the size to float32: 400 pixels become 319 instead of 320."""
    monkeypatch.setattr(source.torchvision, "__version__", "0.15.2+cu117")
    assert_refused([f"torchvision:{SMALL}"], "torchvision 0.15.2", "use 0.16 or newer")


def test_checkpoints_that_do_not_fit(checkpoints, shapes_checkpoint, tmp_path):
    state = torch.load(checkpoints(SMALL), weights_only=True)
    broken = {
        "empty.pth": ({}, [f"holds no {SMALL} of torchvision: it lacks roi_heads.box_predictor.cls_score"]),
        "classifier.pth": (
            {"fc.weight": torch.zeros(5, 5)},
            [f"holds no {SMALL} of torchvision: it lacks roi_heads.box_predictor.cls_score"],
        ),
        "none.pth": ({"roi_heads.box_predictor.cls_score.weight": torch.zeros(1, 8)}, [f"holds no {SMALL}"]),
        "huge.pth": (
            {**state, "roi_heads.box_predictor.cls_score.weight": torch.zeros(1).expand(10**10, 8)},
            ["cannot be built"],
        ),
        "number.pth": ({"model": 5}, ["holds no state dict"]),
        "scalar.pth": ({**state, "roi_heads.box_predictor.cls_score.weight": torch.tensor(1.0)}, [f"holds no {SMALL}"]),
        "nan.pth": ({**state, "rpn.head.cls_logits.bias": torch.full((15,), np.nan)}, ["cls_logits.bias holds NaN"]),
        "more.pth": ({**state, "roi_heads.mask_head.weight": torch.zeros(1)}, ["mask_head.weight is left over"]),
    }
    for name, (content, words) in broken.items():
        torch.save(content, tmp_path / name)
        assert_refused([f"torchvision:{SMALL}", tmp_path / name, "--out", tmp_path / "out"], name, *words)
    assert_refused([f"torchvision:{R50}", checkpoints(SMALL), "--out", tmp_path / "out"], "does not fit the model")
    for builder, other, words in ((MASK, R50, "mask_head.0.0.weight is missing"), (R50, MASK, "is left over")):
        assert_refused([f"torchvision:{builder}", checkpoints(other), "--out", tmp_path / "out"], words)
    assert_refused([f"torchvision:{SMALL}", shapes_checkpoint, "--out", tmp_path / "out"], "6 classes", "0 names")
    assert_refused([f"torchvision:{SMALL}", tmp_path / "missing.pth"], "missing.pth: no such file")
    torch.save({"model": torch.load(shapes_checkpoint), "classes": [*SHAPES[:5], "circle"]}, tmp_path / "twice.pth")
    assert_refused([f"torchvision:{SMALL}", tmp_path / "twice.pth"], "more than one class, the first is circle")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    assert_refused([f"torchvision:{SMALL}", tmp_path / "whole.pth", "--trust-checkpoint"], "save its state_dict()")
    assert not (tmp_path / "out").exists()


def test_set_is_not_for_mmdetection(tmp_path):
    pytest.importorskip("mmdet", reason="needs MMDetection: uv run --extra export pytest")
    assert_refused(["--set", "min_size=600", "--out", tmp_path], "--set is not for mmdetection", "--cfg-options")


def test_without_torchvision_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "sources.torchvision")
    monkeypatch.delattr(sources, "torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert_refused([f"torchvision:{SMALL}"], "torchvision", "uv run --extra torchvision export.py")


# ------------------------------------------------------------------ the two commands, with torchvision's own weights


@pytest.fixture
def project(tmp_path):
    """Return a copy of the project without an export."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "ckpt" / "shapes", folder / "ckpt" / "shapes")
    for name in ("detectors", "sources", "asset"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "explained"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run(project, program, *arguments, url=""):
    """Run a program of a project as a process; torchvision's own weights are at `url`."""
    move = (
        f"from torchvision.models import *; get_model_weights({SMALL!r}).DEFAULT.value.url = {url!r}; " if url else ""
    )
    code = f"{move}import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(project / program), *map(str, arguments)]
    environment = {**os.environ, "no_proxy": "127.0.0.1", "PYTHONPATH": str(project)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project, check=False)


@pytest.fixture
def server(tmp_path):
    """Return a server on this machine for the files of a folder, and the folder."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "served"
    server.shutdown()
    server.server_close()


def test_photographs_in_two_commands(project, server, checkpoints, photographs):
    address, served = server
    content = checkpoints(SMALL).read_bytes()
    name = f"{SMALL}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (served / name).write_bytes(content)
    cv2.imwrite(str(project / "photo.png"), photographs["motorcycle"])

    result = run(project, "export.py", f"torchvision:{SMALL}", "--picture", "photo.png", url=f"{address}/{name}")
    assert result.returncode == 0, result.stderr
    assert f"downloading {address}/{name}" in result.stdout
    assert (project / "ckpt" / name).read_bytes() == content
    result = run(project, "demo.py", "photo.png", "--score-thr", "0.2")
    assert result.returncode == 0, result.stderr
    assert "(80 classes)" in result.stdout
    found = json.loads((project / "output" / "detections.json").read_text())
    expected = own_detections(own_model(SMALL, checkpoints(SMALL)), photographs["motorcycle"])
    expected = expected.where(expected.scores >= 0.2)
    assert len(found) > 20
    boxes = np.float32([entry["bbox"] for entry in found])
    ours = Detections(
        np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]],
        np.float32([entry["score"] for entry in found]),
        np.array([entry["category_id"] - 1 for entry in found]),  # COCO's id, which is torchvision's label
    )
    assert_equal_detections(ours, expected)


@pytest.fixture
def offer(monkeypatch, tmp_path):
    """Return a function that puts torchvision's own weights at a URL, and returns the folder they are fetched into."""
    (tmp_path / "ckpt").mkdir()
    monkeypatch.setattr(source, "CKPT", tmp_path / "ckpt")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def run(url):
        monkeypatch.setattr(get_model_weights(SMALL).DEFAULT.value, "url", url)
        return tmp_path / "ckpt"

    return run


def test_without_a_network_the_file_and_its_place_are_named(offer):
    name = f"{SMALL}-12345678.pth"
    url = f"http://127.0.0.1:9/{name}"
    ckpt = offer(url)
    assert_refused([f"torchvision:{SMALL}"], f"get {url} by other means and put it at {ckpt / name}")
    assert list(ckpt.iterdir()) == []


def test_weights_that_are_there_are_not_fetched(offer, checkpoints):
    ckpt = offer(f"http://127.0.0.1:9/{SMALL}-12345678.pth")
    shutil.copy(checkpoints(SMALL), ckpt / f"{SMALL}-12345678.pth")
    assert source.load(SMALL, None).settings.source["checkpoint"] == f"{SMALL}-12345678.pth"


def test_weights_that_were_damaged_on_their_way(offer, server, checkpoints, tmp_path):
    address, served = server
    ckpt = offer(f"{address}/{SMALL}-12345678.pth")
    (served / f"{SMALL}-12345678.pth").write_bytes(checkpoints(SMALL).read_bytes())
    result = call_program(export.main, f"torchvision:{SMALL}", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "hash" in result.stderr
    assert list(ckpt.iterdir()) == []


# ------------------------------------------------------------------ evaluate.py and explain.py


def annotated(folder, pictures, model):
    """Write pictures, and annotations that the detections of a model nearly fit; return its own results for them.

    Ground truth is every third detection, made narrower: so the averages are far from 0 and from 1, and the IoU of the
    two, which is the factor, is far from those at which COCO decides.
    """
    rng, images, annotations, results = np.random.default_rng(0), [], [], []
    ids = [3, 7, 11, 20, 21, 50]  # of the categories: with gaps, as COCO's
    for number, image in enumerate(pictures, 1):
        cv2.imwrite(str(folder / f"{number}.png"), image)
        images.append({"id": number, "file_name": f"{number}.png"})
        for i, (box, score, label) in enumerate(zip(*(field.tolist() for field in own_detections(model, image)[:3]))):
            x1, y1, x2, y2 = box
            entry = {"image_id": number, "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append({**entry, "score": score})
            if i % 3 == 0:
                width, height = (x2 - x1) * rng.choice([0.525, 0.675, 0.825, 0.975]), y2 - y1
                entry.update(id=len(annotations) + 1, bbox=[x1, y1, width, height], area=width * height, iscrowd=0)
                annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in zip(ids, SHAPES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return results


def coco_numbers(annotations, results):
    """Return pycocotools' twelve numbers, each as it is printed."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO(str(annotations))
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def test_evaluation_equals_that_of_torchvision_s_own_outputs(shapes_checkpoint, photographs, tmp_path):
    """On fifty parts of photographs: in flat drawings, random layers make much of the last bit, torchvision's too."""
    rng, parts = np.random.default_rng(0), []
    for number in range(50):
        image = photographs[NAMES[number % 4]]
        height, width = rng.integers(200, 300, 2)
        y, x = rng.integers(0, image.shape[0] - height + 1), rng.integers(0, image.shape[1] - width + 1)
        parts.append(np.ascontiguousarray(image[y : y + height, x : x + width]))
    (tmp_path / "names.txt").write_text("\n".join(SHAPES))
    (tmp_path / "pictures").mkdir()
    cv2.imwrite(str(tmp_path / "part.png"), parts[0])
    result = call_program(
        export.main, f"torchvision:{SMALL}", shapes_checkpoint, "--classes", tmp_path / "names.txt",
        "--picture", tmp_path / "part.png", "--out", tmp_path / "pair",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    model = get_model_builder(SMALL)(weights=None, weights_backbone=None, num_classes=7)
    model.load_state_dict(torch.load(shapes_checkpoint, weights_only=True), strict=False)
    results = annotated(tmp_path / "pictures", parts, model.eval())

    arguments = [tmp_path / "pictures" / "annotations.json", tmp_path / "pictures", "--out", tmp_path / "out"]
    result = call_program(evaluate.main, *arguments, "--model", tmp_path / "pair")
    assert result.returncode == 0, result.stderr
    ours = coco_numbers(arguments[0], json.loads((tmp_path / "out" / "detections.json").read_text()))
    expected = coco_numbers(arguments[0], results)
    assert 0.1 < expected[0] < 0.9
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_class_without_a_name_is_not_evaluated(exports, photographs, tmp_path):
    detector, image = load(exports(SMALL)), photographs["coffee"]
    cv2.imwrite(str(tmp_path / "coffee.png"), image)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(detector.classes) if name]
    content = {"images": [{"id": 1, "file_name": "coffee.png"}], "categories": categories, "annotations": []}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    arguments = [tmp_path / "annotations.json", tmp_path, "--out", tmp_path / "out", "--model", exports(SMALL)]
    result = call_program(evaluate.main, *arguments)
    assert result.returncode == 0, result.stderr
    assert "(80 classes)" in result.stdout
    found = [entry["category_id"] - 1 for entry in json.loads((tmp_path / "out" / "detections.json").read_text())]
    labels = detector(image).labels.tolist()
    assert found == [label for label in labels if detector.classes[label]]
    assert len(found) < len(labels)


@pytest.mark.parametrize("builder", [R50, SMALL])
def test_the_algorithm_in_pictures(builder, exports, photographs, tmp_path):
    cv2.imwrite(str(tmp_path / "coffee.png"), photographs["coffee"])
    result = call_program(explain.main, tmp_path / "coffee.png", "--model", exports(builder), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 9
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Before that it is normalised" in text
    assert ("a side is no longer than 0.001 pixels or the score not above 0.05" in text) == (builder == SMALL)


def test_what_removed_a_box_is_replayed_where_nms_saw_it(exports, photographs):
    """In pixels of the resized picture: each removed box has one that was kept, of its class, above the threshold."""
    detector = load(exports(SMALL))
    for limit in (1000, 100):  # with fewer than the candidates, the classes are not moved apart
        detector.settings = changed(detector.settings, "head.nms_moved_up_to", limit)
        pipeline = explain.Pipeline(detector, photographs["coffee"])
        removed, by, iou = explain.removers(pipeline)
        assert len(removed) == len(pipeline.detect["candidates"]) - len(pipeline.detect["kept"]) > 20
        assert (pipeline.detect["labels"][removed] == pipeline.detect["labels"][by]).all()
        assert (pipeline.detect["scores"][removed] <= pipeline.detect["scores"][by]).all()
        assert (iou > 0.5).all()
