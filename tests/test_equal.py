"""The whole pipeline against MMDetection's inference_detector, and its stages against MMDetection's own."""

import cv2
import numpy as np
import pytest
from boxes import assert_equal_detections, with_second_chance
from conftest import MMDETECTION, SHAPES

from detectors import Detections, load

torch = pytest.importorskip("torch", reason=MMDETECTION)
reference = pytest.importorskip("sources.mmdetection", reason=MMDETECTION, exc_type=ImportError).reference


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an image to a file, which MMDetection reads itself, and returns its path."""

    def run(image):
        cv2.imwrite(str(tmp_path / "picture.png"), image)
        return tmp_path / "picture.png"

    return run


@pytest.mark.parametrize("name", ["shapes", "shapes_atss"])
def test_bundled_model_on_drawn_pictures(mmdetection, drawn_pictures, write, name):
    folder = SHAPES.parent / name
    detector, theirs = load(folder), mmdetection.load_detector(folder / "config.py", folder / f"{name}.pth")
    assert tuple(detector.classes) == tuple(theirs.CLASSES)
    count = 0
    for image, _, _ in drawn_pictures:
        ours = detector(image)
        assert_equal_detections(ours, reference(theirs, write(image)))
        count += len(ours.boxes)
    assert count > 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat", "motorcycle"])
def test_coco_model_on_photographs(coco_detector, coco_pair, photographs, write, name):
    detector = load(coco_pair)

    def compare(image):
        ours = detector(image)
        assert len(ours.boxes) == 100
        assert len(set(ours.labels)) >= 5
        assert_equal_detections(ours, reference(coco_detector, write(image)))

    with_second_chance(compare, photographs[name])


@pytest.mark.slow
def test_every_stage_of_the_coco_model(coco_detector, coco_pair, photographs):
    """From the same maps on: proposals, levels and RoI features are MMDetection's."""
    stages = {}
    detector = load(coco_pair)
    detector(photographs["coffee"], lambda stage, **arrays: stages.update({stage: arrays}))
    proposed, align = stages["propose"], stages["align"]
    objectness = proposed["scores"][proposed["kept"][: len(proposed["proposals"])]]
    meta = [{"img_shape": (*stages["preprocess"]["image_size"], 3)}]
    with torch.no_grad():
        cls, reg, features = ([torch.from_numpy(stages["model1"][f"{kind}_{level}"]) for level in range(5)]
                              for kind in ("cls", "reg", "feat"))  # fmt: skip
        proposals = coco_detector.rpn_head.get_bboxes(cls, reg, img_metas=meta)[0]
        np.testing.assert_allclose(objectness, proposals[:, 4], atol=1e-6)
        one_class = np.zeros(len(proposals), int)  # the order of scores that differ in their last bit is free
        assert_equal_detections(
            Detections(proposed["proposals"], objectness, one_class),
            Detections(proposals[:, :4].numpy(), proposals[:, 4].numpy(), one_class),
        )
        rois = torch.from_numpy(np.insert(proposed["proposals"], 0, 0, axis=1))
        extractor = coco_detector.roi_head.bbox_roi_extractor
        np.testing.assert_array_equal(align["levels"], extractor.map_roi_levels(rois, 4))
        np.testing.assert_allclose(align["roi_feats"], extractor(features[:4], rois), atol=1e-5)
