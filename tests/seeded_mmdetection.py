"""MMDetection's detectors with seeded weights, see seeded.py."""

from functools import partial

import torch
from mmcv.cnn.bricks import ContextBlock, ConvAWS2d, ConvWS2d
from mmdet.core import bbox2roi
from mmdet.models import build_detector
from mmdet.models.backbones import CSPDarknet, Darknet, MobileNetV2
from mmdet.models.backbones.darknet import ResBlock
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.necks.ssd_neck import L2Norm
from mmdet.models.utils import InvertedResidual
from mmdet.models.utils.csp_layer import DarknetBottleneck
from mmdet.models.utils.normed_predictor import NormedConv2d, NormedLinear
from seeded import normalise, scale_last_layer, scale_layer, scale_rpn, scale_to_unit

from detectors.preprocess import preprocess
from sources.mmdetection import (
    DATASETS,
    QueryHead,
    RoIHead,
    box_head,
    describe_preprocessing,
    find_part,
    forget_teacher,
    replace_sync_norms,
    stages,
)

STANDARDISING = (ConvWS2d, ConvAWS2d)  # convolutions to which the scale of their weights makes no difference
NORMALISING = (NormedLinear, NormedConv2d)  # layers of which the same is true, and whose inputs have a length of 1
# Backbones with long rows of layers and no way around them: rounding grows from bend to bend of the activations, so
# what comes from a normalisation is moved to where they bend little.
PLAIN = (CSPDarknet, Darknet, MobileNetV2)
LAST_NORMS = {  # the last normalisation of a residual branch
    BasicBlock: "norm2",
    Bottleneck: "norm3",
    ResBlock: "conv2.bn",
    DarknetBottleneck: "conv2.bn",
    InvertedResidual: "linear_conv.bn",
}
CLS, FACTOR, SHIFTS = (-5.0, 1.2), (0.0, 1.0), (0.2, 0.4)  # mean and deviation of what layers give
LAST_LAYERS = {  # of one-stage detectors' heads, which are named like this
    "RetinaHead": {"retina_cls": CLS, "retina_reg": SHIFTS},
    "RetinaSepBNHead": {"retina_cls": (-4.0, 0.7), "retina_reg": SHIFTS},  # levels of few cells are normalised alone
    "FSAFHead": {"retina_cls": CLS, "retina_reg": (1.0, 0.3)},
    "ATSSHead": {"atss_cls": CLS, "atss_reg": SHIFTS, "atss_centerness": FACTOR},
    "PAAHead": {"atss_cls": CLS, "atss_reg": SHIFTS, "atss_centerness": FACTOR},
    "DDODHead": {"atss_cls": CLS, "atss_reg": SHIFTS, "atss_iou": FACTOR},
    "FCOSHead": {"conv_cls": CLS, "conv_reg": (3.5, 0.4), "conv_centerness": FACTOR},  # logarithms of pixels
    "AutoAssignHead": {"conv_cls": CLS, "conv_reg": (2.0, 1.0), "conv_centerness": FACTOR},  # strides
    "FoveaHead": {"conv_cls": CLS, "conv_reg": (0.0, 0.4)},
    "GFLHead": {"gfl_cls": CLS, "gfl_reg": (0.0, 1.0)},
    "VFNetHead": {"vfnet_cls": (-4.2, 0.9), "vfnet_reg": (-1.5, 0.25), "vfnet_reg_refine": (0.0, 0.2)},
    "RepPointsHead": {
        "reppoints_cls_out": (-4.2, 0.9),
        "reppoints_pts_init_out": (0.0, 0.4),
        "reppoints_pts_refine_out": (0.0, 2.0),
    },
    "TOODHead": {
        "tood_cls": (-4.0, 1.2),
        "tood_reg": (0.5, 0.2),
        "cls_prob_module": (-1.0, 1.0),
        "reg_offset_module": (0.0, 0.5),
    },
    "CenterNetHead": {"heatmap_head": (-3.0, 1.2), "wh_head": (30.0, 0.5), "offset_head": (0.5, 0.2)},
    "YOLOFHead": {"cls_score": (-1.0, 0.8), "bbox_pred": SHIFTS, "object_pred": (-3.5, 0.7)},
    "SSDHead": {"cls_convs": (0.0, 1.0), "reg_convs": SHIFTS},
    "YOLOXHead": {
        "multi_level_conv_cls": (-2.0, 0.8),
        "multi_level_conv_reg": (0.3, 0.5),
        "multi_level_conv_obj": (-2.0, 1.0),
    },
    "YOLOV3Head": {"convs_pred": (0.0, 1.0)},  # see scale_one_stage
}


def write_checkpoint(cfg, path, image, normalised=True):
    """Write a checkpoint of a config's detector, seeded such that it discriminates in an image; return its path.

    Without `normalised` the layers keep the weights that MMDetection initialises them with, and what they compute
    grows from block to block.
    """
    forget_pretrained(cfg.model)
    forget_teacher(cfg.model)
    torch.manual_seed(0)
    replace_sync_norms(cfg.model)
    detector = build_detector(cfg.model)
    detector.init_weights()
    detector.eval()
    # How much a residual branch adds; where weights are standardised, more makes rounding visible after 33 blocks.
    branch = 0.1 if any(isinstance(module, STANDARDISING) for module in detector.modules()) else 0.2
    with torch.no_grad():
        for module in detector.modules():
            last = [find_part(module, name) for block, name in LAST_NORMS.items() if isinstance(module, block)]
            if last:
                norm = last[0] or module.conv2.pointwise_conv.bn  # where convolutions are separable
                norm.weight.fill_(branch if normalised else 1.5)
            elif type(detector.backbone) in PLAIN and isinstance(module, torch.nn.BatchNorm2d):
                module.bias.fill_(1.5)
            elif isinstance(module, ContextBlock):  # else 23 of them, one after the other, make rounding visible
                module.channel_add_conv[-1].weight *= 0.1
            elif isinstance(module, L2Norm):  # MMDetection leaves what was in memory
                module.weight.fill_(20)
            elif isinstance(module, TridentConv):
                torch.nn.init.kaiming_normal_(module.weight)
        picture = preprocess(image, describe_preprocessing(cfg))
        prepare(detector, torch.from_numpy(picture.blob), picture.image_size, normalised)
    num_classes = stages(box_head(detector))[-1].num_classes
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
    for offset in offsets:  # of deformable convolutions; they start at zero, and each enlarges rounding
        torch.nn.init.normal_(offset.weight)
        scaling.append(offset.register_forward_hook(partial(scale_to_unit, deviation=min(0.4, 5 / len(offsets)))))
    features = detector.extract_feat(blob)
    has_queries = hasattr(detector, "bbox_head") and hasattr(detector.bbox_head, "query_embedding")
    if not hasattr(detector, "roi_head") and not has_queries:
        detector.bbox_head(features)
    for hook in scaling:
        hook.remove()
    if hasattr(detector, "roi_head"):
        scale_two_stages(detector, features, image_size)
    elif has_queries:
        scale_queries(detector, blob)
    else:
        scale_one_stage(detector.bbox_head, features)
    for hook in normalising:
        hook.remove()


def scale_one_stage(head, features):
    """Scale the last layers of a one-stage detector's head by what it gives for the features of all levels."""
    kind = next(base.__name__ for base in type(head).__mro__ if base.__name__ in LAST_LAYERS)
    for name, (mean, deviation) in LAST_LAYERS[kind].items():
        if name == "conv_reg" and getattr(head, "norm_on_bbox", False):
            mean, deviation = 2.0, 1.0  # strides, too
        if name.startswith("reppoints_pts") and head.use_grid_points:
            deviation = 0.1  # two of four say how many times larger a box gets, as logarithms
        if kind == "YOLOV3Head":  # a map has everything: box, objectness, classes
            mean = torch.tensor([0.0] * 4 + [-2.0] + [-2.0] * head.num_classes).repeat(head.num_base_priors)
            deviation = torch.tensor([0.4] * 4 + [0.7] + [0.8] * head.num_classes).repeat(head.num_base_priors)
        part = getattr(head, name)
        for layer in part if isinstance(part, torch.nn.ModuleList) else [part]:
            layer = layer[-1] if isinstance(layer, torch.nn.Sequential) else layer
            scale_last_layer(layer, partial(head, features), mean, deviation)


def scale_queries(detector, blob):
    """Scale the last layers of DETR's head until its queries tell different things of a picture [1, 3, H, W]."""
    detector.bbox_head.query_embedding.weight *= 10  # else what they find differs little, and rounding much
    targets = {"fc_cls": (0.0, 1.5), "fc_reg": (torch.tensor([0.0, 0.0, -1.5, -1.5]), 1.0)}
    for name, (mean, deviation) in targets.items():
        layer, outputs = getattr(detector.bbox_head, name), []
        hook = layer.register_forward_hook(lambda layer, inputs, output, outputs=outputs: outputs.append(output))
        QueryHead(detector)(blob)
        hook.remove()
        scale_layer(layer, [outputs[0].transpose(1, 2)], deviation)
        layer.bias += mean


def scale_two_stages(detector, features, image_size):
    """Scale the heads of a two-stage detector by what they give for the features of all levels."""
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
