"""The whole pipeline against MMDetection's inference_detector, and its stages against MMDetection's own."""

import numpy as np
import pytest
import torch
from conftest import SHAPES

import demo
import export


def assert_equal_detections(ours, reference):
    """Check that every detection has its twin: same label, boxes within 1e-2 px, scores within 1e-4."""
    assert len(ours.boxes) == len(reference.boxes)
    unpaired = list(range(len(reference.boxes)))
    for box, score, label in zip(*ours):
        twins = [
            i
            for i in unpaired
            if reference.labels[i] == label
            and np.abs(reference.boxes[i] - box).max() <= 1e-2
            and abs(reference.scores[i] - score) <= 1e-4
        ]
        assert twins, f"no twin for {label} {score} {box}"
        unpaired.remove(twins[0])


def test_bundled_model_on_drawn_pictures(shapes_detector, drawn_pictures):
    pair = demo.FasterRCNN(SHAPES)
    assert tuple(pair.classes) == tuple(shapes_detector.CLASSES)
    count = 0
    for image, _, _ in drawn_pictures:
        ours = pair(image)
        assert_equal_detections(ours, export.reference_detections(shapes_detector, image))
        count += len(ours.boxes)
    assert count > 300


@pytest.mark.slow
@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat", "motorcycle"])
def test_coco_model_on_photographs(coco_detector, coco_pair, photographs, name):
    pair = demo.FasterRCNN(coco_pair)
    ours = pair(photographs[name])
    assert len(ours.boxes) == 100
    assert len(set(ours.labels)) >= 5
    assert_equal_detections(ours, export.reference_detections(coco_detector, photographs[name]))


@pytest.mark.slow
def test_every_stage_of_the_coco_model(coco_detector, coco_pair, photographs):
    """From the same maps on: proposals, levels and RoI features are MMDetection's."""
    stages = {}
    pair = demo.FasterRCNN(coco_pair)
    pair(photographs["coffee"], lambda stage, **arrays: stages.update(arrays if stage != "detect" else {}))
    stages["objectness"] = stages["scores"][stages["kept"]]
    meta = [{"img_shape": (*stages["image_size"], 3)}]
    with torch.no_grad():
        features = [torch.from_numpy(feature)[None] for feature in stages["features"]]
        cls, reg = ([torch.from_numpy(m)[None] for m in stages[kind]] for kind in ("rpn_cls", "rpn_reg"))
        proposals = coco_detector.rpn_head.get_bboxes(cls, reg, img_metas=meta)[0]
        np.testing.assert_allclose(stages["objectness"], proposals[:, 4], atol=1e-6)
        one_class = np.zeros(len(proposals), int)  # the order of scores that differ in their last bit is free
        assert_equal_detections(
            demo.Detections(stages["proposals"], stages["objectness"], one_class),
            demo.Detections(proposals[:, :4].numpy(), proposals[:, 4].numpy(), one_class),
        )
        rois = torch.from_numpy(np.insert(stages["proposals"], 0, 0, axis=1))
        extractor = coco_detector.roi_head.bbox_roi_extractor
        np.testing.assert_array_equal(stages["levels"], extractor.map_roi_levels(rois, 4))
        np.testing.assert_allclose(stages["roi_feats"], extractor(features[:4], rois), atol=1e-5)
