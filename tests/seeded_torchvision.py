"""torchvision's detectors with seeded weights, see seeded.py."""

import re

import numpy as np
import torch
from seeded import normalise, scale_head, scale_last_layer, scale_layer, scale_rpn, scale_to_unit
from torchvision.models import get_model_builder
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import Bottleneck


def write_checkpoint(builder, path, image, num_classes=91):
    """Write the state dict of a builder's model, seeded such that it discriminates in an image; return its path.

    image: [h, w, 3] uint8 BGR. As in torchvision's own files, only the second version and SSDLite have counting batch
    norms, and the names that the others were written with are those of an older torchvision.
    """
    state = seeded_model(builder, image, num_classes).state_dict()
    if not builder.endswith("_v2") and not builder.startswith("ssdlite"):
        state = {old_name(name): state[name] for name in state if not name.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


def old_name(name):
    """Return what torchvision called a weight before it wrapped the convolutions outside the backbone into blocks."""
    name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    name = re.sub(r"(fpn\.(inner|layer)_blocks\.\d)\.0\.", r"\1.", name)
    name = re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda found: f"{found[1]}.{2 * int(found[2])}.", name)
    return re.sub(r"(mask_head)\.(\d)\.0\.", lambda found: f"{found[1]}.mask_fcn{int(found[2]) + 1}.", name)


def seeded_model(builder, image, num_classes=91):
    """Return a builder's model, seeded such that it discriminates in an image [h, w, 3] uint8 BGR."""
    torch.manual_seed(0)
    return seed(get_model_builder(builder)(weights=None, weights_backbone=None, num_classes=num_classes), image)


def seed(model, image):
    """Return a model whose random weights are scaled such that it discriminates in an image [h, w, 3] uint8 BGR."""
    model.eval()
    for block in model.modules():
        if isinstance(block, Bottleneck):
            torch.nn.init.constant_(block.bn3.weight, 0.2)
        if isinstance(block, InvertedResidual) and block.use_res_connect:
            torch.nn.init.constant_(block.block[-1][1].weight, 0.2)
    straight = model if isinstance(model, SSD) else getattr(model, "roi_heads", None)
    for block in straight.modules() if straight else ():
        if isinstance(block, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(block.bias, 1.5)  # where ReLU is straight: many bends would enlarge rounding
    with torch.no_grad():
        prepare(model, torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1).float() / 255)
    return model


def prepare(model, image):
    """Normalise the layers of a model by what an image [3, h, w] gives, and scale its heads."""
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    parts = model.backbone if hasattr(model, "roi_heads") else model
    convolutions = [layer for layer in parts.modules() if isinstance(layer, torch.nn.Conv2d)]
    normalising = [norm.register_forward_pre_hook(normalise) for norm in norms]
    scaling = [convolution.register_forward_hook(scale_to_unit) for convolution in convolutions]
    images = model.transform([image])[0]
    features = model.backbone(images.tensors)
    if hasattr(model, "roi_heads"):
        prepare_two_stages(model, images, features)
        for hook in normalising + scaling:
            hook.remove()
    else:
        model.head(list(features.values()))
        for hook in scaling:
            hook.remove()
        prepare_one_stage(model.head, list(features.values()))
        for hook in normalising:
            hook.remove()


def prepare_one_stage(head, features):
    """Scale the last layers of a one-stage detector's head by what features of all levels give."""
    classify, regress = head.classification_head, head.regression_head
    if hasattr(regress, "bbox_ctrness"):
        targets = {classify.cls_logits: (-2.5, 1.2), regress.bbox_reg: (2.0, 1.0), regress.bbox_ctrness: (0.0, 1.0)}
    elif hasattr(classify, "cls_logits"):
        targets = {classify.cls_logits: (-5.0, 1.2), regress.bbox_reg: (0.2, 0.4)}
    else:
        last = [[part[-1] if isinstance(part, torch.nn.Sequential) else part for part in head.module_list]
                for head in (classify, regress)]  # fmt: skip
        targets = {**dict.fromkeys(last[0], (0.0, 1.2)), **dict.fromkeys(last[1], (0.2, 0.4))}
    for layer, (mean, deviation) in targets.items():
        scale_last_layer(layer, lambda: head(features), mean, deviation)


def prepare_two_stages(model, images, features):
    """Scale the heads of a two-stage detector by what the features of a picture give."""
    rpn, heads = model.rpn.head, model.roi_heads

    # Random layers see little difference between boxes, those of the second version, the deepest, the least. Scaled up
    # as far as MMDetection's, their rounding would count.
    deviations = (1.4 if isinstance(heads.box_head, TwoMLPHead) else 1.0, 0.3)
    scale_rpn(list(features.values()), rpn, (rpn.cls_logits, rpn.bbox_pred))
    proposals = model.rpn(images, features)[0]
    outputs = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, images.image_sizes)))
    scale_head(outputs, (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred), deviations)
    heads.box_roi_pool.scales = None
    if heads.has_mask():
        roi_feats = heads.mask_roi_pool(features, [proposals[0][:100]], images.image_sizes)
        logits = heads.mask_predictor.mask_fcn_logits
        scale_layer(logits, [heads.mask_predictor(heads.mask_head(roi_feats))], 2.0)
        heads.mask_roi_pool.scales = None
