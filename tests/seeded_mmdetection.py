"""MMDetection's detectors with seeded weights, see seeded.py."""

from functools import partial

import torch
from mmcv.cnn.bricks import ConvAWS2d, ConvWS2d
from mmdet.core import bbox2roi
from mmdet.models import build_detector
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.utils.normed_predictor import NormedConv2d, NormedLinear
from seeded import normalise, scale_layer, scale_rpn, scale_to_unit

from detectors.preprocess import preprocess
from sources.mmdetection import DATASETS, RoIHead, describe_preprocessing, replace_sync_norms, stages

STANDARDISING = (ConvWS2d, ConvAWS2d)  # convolutions to which the scale of their weights makes no difference
NORMALISING = (NormedLinear, NormedConv2d)  # layers of which the same is true, and whose inputs have a length of 1


def write_checkpoint(cfg, path, image, normalised=True):
    """Write a checkpoint of a config's detector, seeded such that it discriminates in an image; return its path.

    Without `normalised` the layers keep the weights that MMDetection initialises them with, and what they compute
    grows from block to block.
    """
    forget_pretrained(cfg.model)
    torch.manual_seed(0)
    replace_sync_norms(cfg.model)
    detector = build_detector(cfg.model)
    detector.init_weights()
    detector.eval()
    with torch.no_grad():
        for module in detector.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                last = module.norm2 if isinstance(module, BasicBlock) else module.norm3
                last.weight.fill_(0.2 if normalised else 0.5)
            elif isinstance(module, TridentConv):  # MMDetection leaves what was in memory
                torch.nn.init.kaiming_normal_(module.weight)
        picture = preprocess(image, describe_preprocessing(cfg))
        prepare(detector, torch.from_numpy(picture.blob), picture.image_size, normalised)
    num_classes = stages(detector.roi_head.bbox_head)[-1].num_classes
    classes = getattr(DATASETS.get(cfg.data.test.type), "CLASSES", None) or ()
    if len(classes) != num_classes:
        classes = [f"class {i}" for i in range(num_classes)]
    torch.save({"state_dict": detector.state_dict(), "meta": {"CLASSES": classes}}, path)
    return path


def scale_point_rend(roi_head, roi_feats):
    """Scale the last layers of PointRend's two mask heads by what RoIs' features [n, C, s, s] give."""
    torch.nn.init.normal_(roi_head.mask_head.fc_logits.weight)  # a constant, as MMDetection initialises it
    scale_layer(roi_head.mask_head.fc_logits, [roi_head.mask_head(roi_feats).flatten(1)], 2.0)
    coarse = torch.nn.functional.interpolate(roi_head.mask_head(roi_feats), roi_feats.shape[2:])
    points = roi_head.point_head(roi_feats.flatten(2), coarse.flatten(2))
    scale_layer(roi_head.point_head.fc_logits, [points], 2.0)


def tell_apart(layer, inputs):
    """Choose the weights of a NORMALISING layer along the deviations of its inputs [N, C, ...]; their mean gives 0.

    Other random weights give nearly the same to all inputs, of which so many channels have a common sign.
    """
    x = torch.nn.functional.normalize(inputs[0].transpose(0, 1).flatten(1).T)  # [n, C]
    x = x[torch.randperm(len(x))[:1000]]
    weight = torch.nn.functional.normalize(torch.randn(len(layer.weight), len(x)) @ (x - x.mean(dim=0)))
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(-layer.tempearture * weight @ x.mean(dim=0))


def scale_last(layer, outputs, deviation):
    """Scale the last layer of a head, unless tell_apart has chosen its weights."""
    if not isinstance(layer, NORMALISING):
        scale_layer(layer, [outputs], deviation)


def forget_pretrained(model):
    """Delete from a config's model, wherever they stand, the names of pretrained weights, which would be downloaded."""
    for part in model if isinstance(model, list) else list(model.values()):
        if isinstance(part, (dict, list)):
            forget_pretrained(part)
    if isinstance(model, dict):
        model.pop("pretrained", None)
        if "checkpoint" in (model.get("init_cfg") or {}):
            del model["init_cfg"]


def prepare(detector, blob, image_size, normalised=True):
    """Scale the heads of a detector by what a picture [1, 3, H, W] gives; normalise each layer first, if wanted."""
    parts = list(detector.modules())
    norms = [part for part in parts if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    offsets = [part.conv_offset for part in parts if hasattr(part, "conv_offset")]
    fixed = (*offsets, *(part for part in parts if isinstance(part, STANDARDISING)))
    convolutions = [part for part in parts if isinstance(part, torch.nn.Conv2d) and part not in fixed]
    normalising = [norm.register_forward_pre_hook(normalise) for norm in norms if normalised]
    normalising += [part.register_forward_pre_hook(tell_apart) for part in parts if isinstance(part, NORMALISING)]
    scaling = [convolution.register_forward_hook(scale_to_unit) for convolution in convolutions if normalised]
    for offset in offsets:  # of deformable convolutions; they start at zero, and far from it rounding counts
        torch.nn.init.normal_(offset.weight)
        scaling.append(offset.register_forward_hook(partial(scale_to_unit, deviation=0.4)))
    features = detector.extract_feat(blob)
    for hook in scaling:
        hook.remove()
    rpn, roi_head = detector.rpn_head, detector.roi_head

    def pool(extractor, head):
        metas = [{"img_shape": (*image_size, 3)}]
        proposals = rpn.get_bboxes(*rpn(features), img_metas=metas, cfg=detector.test_cfg.rpn)
        roi_feats = extractor(features[: extractor.num_inputs], bbox2roi([proposals[0][:100]]))
        head(roi_feats)  # normalises its layers
        return roi_feats

    scale_rpn(features, rpn, (rpn.rpn_cls, rpn.rpn_reg))
    for extractor, bbox_head in zip(stages(roi_head.bbox_roi_extractor), stages(roi_head.bbox_head)):
        head = RoIHead(roi_head, bbox_head)
        roi_feats = head.shared_head(pool(extractor, head))
        cls, reg = bbox_head(roi_feats)
        scale_last(bbox_head.fc_cls, cls, 2.0)
        scale_last(bbox_head.fc_reg, reg, 0.5)
    if roi_head.with_mask:
        for extractor, mask_head in zip(stages(roi_head.mask_roi_extractor), stages(roi_head.mask_head)):
            head = RoIHead(roi_head, mask_head)
            if hasattr(roi_head, "point_head"):
                scale_point_rend(roi_head, pool(extractor, head))
            else:
                scale_last(mask_head.conv_logits, head(pool(extractor, head))[0], 2.0)
                mask_head.conv_logits.bias += 3  # most pixels are in; around 0, rounding decides about some of many
    for hook in normalising:
        hook.remove()
