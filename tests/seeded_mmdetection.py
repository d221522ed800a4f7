"""MMDetection's detectors with seeded weights, see seeded.py."""

import torch
from mmcv.cnn.utils import revert_sync_batchnorm
from mmdet.core import bbox2roi
from mmdet.models import build_detector
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from seeded import make_heads_discriminate, normalise, scale_to_unit

from detectors.preprocess import preprocess
from sources.mmdetection import DATASETS, Model2, describe_preprocessing


def write_checkpoint(cfg, path, image, normalised=True):
    """Write a checkpoint of a config's detector, seeded such that it discriminates in an image; return its path.

    Without `normalised` the layers keep the weights that MMDetection initialises them with, and what they compute
    grows from block to block.
    """
    for part in (cfg.model.backbone, cfg.model.roi_head.get("shared_head") or {}):
        if "init_cfg" in part:
            part.init_cfg = None
    cfg.model.pretrained = None
    torch.manual_seed(0)
    detector = revert_sync_batchnorm(build_detector(cfg.model))
    detector.init_weights()
    detector.eval()
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                last = module.norm2 if isinstance(module, BasicBlock) else module.norm3
                last.weight.fill_(0.2 if normalised else 0.5)
        picture = preprocess(image, describe_preprocessing(cfg))
        prepare(detector, torch.from_numpy(picture.blob), picture.image_size, normalised)
    num_classes = detector.roi_head.bbox_head.num_classes
    classes = getattr(DATASETS.get(cfg.data.test.type), "CLASSES", None) or ()
    if len(classes) != num_classes:
        classes = [f"class {i}" for i in range(num_classes)]
    torch.save({"state_dict": detector.state_dict(), "meta": {"CLASSES": classes}}, path)
    return path


def prepare(detector, blob, image_size, normalised=True):
    """Scale the heads of a detector by what a picture [1, 3, H, W] gives; normalise each layer first, if wanted."""
    parts = list(detector.modules())
    norms = [part for part in parts if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    convolutions = [part for part in parts if isinstance(part, torch.nn.Conv2d)]
    normalising = [norm.register_forward_pre_hook(normalise) for norm in norms if normalised]
    scaling = [convolution.register_forward_hook(scale_to_unit) for convolution in convolutions if normalised]
    features = detector.extract_feat(blob)
    for hook in scaling:
        hook.remove()
    rpn, roi_head, head = detector.rpn_head, detector.roi_head, Model2(detector)

    def pool():
        metas = [{"img_shape": (*image_size, 3)}]
        proposals = rpn.get_bboxes(*rpn(features), img_metas=metas, cfg=detector.test_cfg.rpn)
        extractor = roi_head.bbox_roi_extractor
        roi_feats = extractor(features[: extractor.num_inputs], bbox2roi([proposals[0][:100]]))
        head(roi_feats)  # normalises its layers
        return roi_feats

    layers = (roi_head.bbox_head.fc_cls, roi_head.bbox_head.fc_reg)
    make_heads_discriminate(features, rpn, (rpn.rpn_cls, rpn.rpn_reg), pool, head, layers)
    for hook in normalising:
        hook.remove()
