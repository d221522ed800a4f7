"""What several tests share: real photographs, and detectors of MMDetection beside their export."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "ckpt" / "shapes")]

logging.disable(logging.INFO)  # mmcv lists every initialised weight

SHAPES = ROOT / "ckpt" / "shapes"


@pytest.fixture(scope="session")
def photographs():
    """Return four photographs of different shapes, BGR: upright, lying, square and small."""
    import skimage.data

    pictures = {
        "astronaut": skimage.data.astronaut(),
        "coffee": skimage.data.coffee(),
        "cat": skimage.data.chelsea(),
        "motorcycle": np.rot90(skimage.data.stereo_motorcycle()[0]),
    }
    return {name: np.ascontiguousarray(picture[..., ::-1]) for name, picture in pictures.items()}


@pytest.fixture(scope="session")
def shapes_detector():
    """Return MMDetection's detector with the weights of the bundled model."""
    import export

    return export.load_detector(SHAPES / "config.py", SHAPES / "shapes.pth")


@pytest.fixture(scope="session")
def drawn_pictures():
    """Return 50 drawn pictures, boxes and labels that training did not see."""
    import dataset

    return [dataset.draw_picture(seed) for seed in range(2_000_000, 2_000_050)]


@pytest.fixture(scope="session")
def coco_checkpoint(tmp_path_factory, photographs):
    """Return the path of a checkpoint of Faster R-CNN R50-FPN with seeded weights."""
    return write_seeded_checkpoint(tmp_path_factory.mktemp("coco") / "seeded.pth", photographs["astronaut"])


def write_seeded_checkpoint(path, photograph):
    """Write a checkpoint of Faster R-CNN R50-FPN COCO with seeded random weights and return its path.

    Random heads give every box the same score. So each head's last layer is scaled until its outputs in a
    photograph vary as a trained detector's do: then top-k, NMS and thresholds have something to decide.
    """
    import mmcv
    import torch
    from mmdet.models import build_detector

    import demo
    import export

    cfg = mmcv.Config.fromfile(str(export.find_config(export.DEFAULT_CONFIG)))
    cfg.model.backbone.init_cfg = None
    torch.manual_seed(0)
    detector = build_detector(cfg.model)
    detector.init_weights()
    detector.eval()
    with torch.no_grad():
        image = torch.from_numpy(demo.preprocess(photograph, **export.describe_preprocessing(cfg))[0])
        features = detector.extract_feat(image)
        rpn, head = detector.rpn_head, detector.roi_head.bbox_head
        make_heads_discriminate(features, rpn, (rpn.rpn_cls, rpn.rpn_reg), head, (head.fc_cls, head.fc_reg))
    meta = {"CLASSES": export.DATASETS.get("CocoDataset").CLASSES}
    torch.save({"state_dict": detector.state_dict(), "meta": meta}, path)
    return path


def make_heads_discriminate(features, rpn, rpn_layers, head, head_layers, size=7):
    """Scale the last layers (scores, deltas) of an RPN and of a head so that their outputs vary.

    features: the pyramid's maps of a picture; rpn and head return (scores, deltas) of maps and of [r, C, size, size].
    """
    import torch

    for layer, outputs, deviation in zip(rpn_layers, rpn(features), (2.0, 0.3)):
        scale_layer(layer, outputs, deviation)
    crops = []
    for level in features[:4]:
        tops, lefts = (np.linspace(0, max(side - size, 0), 12).astype(int) for side in level.shape[2:])
        crops += [level[0, :, y : y + size, x : x + size] for y in tops for x in lefts]
    outputs = head(torch.stack([crop for crop in crops if crop.shape[1:] == (size, size)]))
    for layer, output, deviation in zip(head_layers, outputs, (2.0, 0.5)):
        scale_layer(layer, [output], deviation)


def scale_layer(layer, outputs, target):
    """Scale and shift a layer so that each channel of its outputs has mean 0 and, on average, a given deviation."""
    import torch

    channels = torch.cat([output.transpose(0, 1).flatten(1) for output in outputs], dim=1)
    factor = target / channels.std(dim=1).mean()
    layer.weight *= factor
    layer.bias.copy_((layer.bias - channels.mean(dim=1)) * factor)


@pytest.fixture(scope="session")
def coco_detector(coco_checkpoint):
    """Return MMDetection's R50-FPN detector with the seeded weights."""
    import export

    return export.load_detector(export.find_config(export.DEFAULT_CONFIG), coco_checkpoint)


@pytest.fixture(scope="session")
def coco_pair(tmp_path_factory, coco_detector):
    """Return the folder of the seeded R50-FPN detector's export."""
    import export

    folder = tmp_path_factory.mktemp("coco_pair")
    export.write_pair(coco_detector, folder, {}, opset=13)
    return folder
