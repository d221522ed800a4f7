"""torchvision: its Faster R-CNNs, Mask R-CNNs and one-stage detectors as the networks and the settings of an export.

They differ from MMDetection's in settings, and in the place of the background, which is class 0 of torchvision. The
exported heads have it last, the exported mask head lacks it; so a label is a position in the list of classes and a
mask's channel, and torchvision's own label is one more. RetinaNet and FCOS have no background; their class 0, of which
nothing was trained, is the last class here, without a name.
"""

import ast
import copy
import functools
import hashlib
import itertools
from collections import Counter
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

import cv2
import msgspec
import numpy as np
import torch
import torchvision
from torchvision.models import get_model_builder, get_model_weights, mobilenet_v3_large
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor
from torchvision.ops import FrozenBatchNorm2d
from typing_extensions import Annotated

from detectors import CKPT, Detections, one_line, rle
from detectors.settings import (
    Anchors,
    CellAnchors,
    CellPoints,
    Coder,
    Count,
    Dense,
    FasterRCNNSettings,
    FCOSSettings,
    Head,
    MaskRCNNSettings,
    Masks,
    Number,
    Positive,
    Preprocess,
    Proposals,
    RetinaNetSettings,
    RoIs,
    SettingsError,
    read,
    write,
)
from sources import Network, Source, SourceError
from sources.checkpoints import fetch, load_checkpoint, load_weights, renamed, weights_in

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
NORMALISED = {"image_mean": Tuple[Number, Number, Number], "image_std": Tuple[Positive, Positive, Positive]}
RESIZED = {
    "min_size": Count,
    "max_size": Count,
    "fixed_size": Tuple[Count, Count],
    "size_divisible": Count,
    **NORMALISED,
    "frozen_eps": Share,  # no argument of theirs, see frozen_eps
}
OF_ROIS = {  # the arguments of two-stage builders that change what is detected
    **RESIZED,
    "rpn_pre_nms_top_n_test": Count,
    "rpn_post_nms_top_n_test": Count,
    "rpn_nms_thresh": Share,
    "rpn_score_thresh": Number,
    "box_score_thresh": Number,
    "box_nms_thresh": Share,
    "box_detections_per_img": Count,
    "bbox_reg_weights": Tuple[Positive, Positive, Positive, Positive],
}
OF_MAPS = {"score_thresh": Number, "nms_thresh": Share, "topk_candidates": Count, "detections_per_img": Count}


class Builder(NamedTuple):
    """What is known of the models of one of torchvision's builders."""

    scores: str  # the weight of the layer that gives class scores ...
    priors: int  # ... of so many priors
    options: dict  # its arguments that can be set, and their types
    frozen_eps: Optional[float] = None  # of the frozen batch normalisation in its own weights, or others from them


ROI, MAPS = "roi_heads.box_predictor.cls_score.weight", "head.classification_head.cls_logits.weight"
BUILDERS = {
    "fasterrcnn_resnet50_fpn": Builder(ROI, 1, OF_ROIS, 0.0),
    "fasterrcnn_resnet50_fpn_v2": Builder(ROI, 1, OF_ROIS, 1e-5),
    "fasterrcnn_mobilenet_v3_large_fpn": Builder(ROI, 1, OF_ROIS, 1e-5),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Builder(ROI, 1, OF_ROIS, 1e-5),
    "maskrcnn_resnet50_fpn": Builder(ROI, 1, OF_ROIS, 0.0),
    "maskrcnn_resnet50_fpn_v2": Builder(ROI, 1, OF_ROIS, 1e-5),
    "retinanet_resnet50_fpn": Builder(MAPS, 9, {**RESIZED, **OF_MAPS}, 0.0),
    "retinanet_resnet50_fpn_v2": Builder(MAPS, 9, {**RESIZED, **OF_MAPS}, 1e-5),
    "fcos_resnet50_fpn": Builder(MAPS, 1, {**RESIZED, **OF_MAPS}, 1e-5),
    "ssd300_vgg16": Builder("head.classification_head.module_list.0.weight", 4, {**NORMALISED, **OF_MAPS}),
    "ssdlite320_mobilenet_v3_large": Builder(
        "head.classification_head.module_list.0.1.weight", 6, {**NORMALISED, **OF_MAPS}
    ),
}
OLD_NAMES = {  # of layers before torchvision 0.13, which most of its own files have, and what they are called today
    r"^(rpn\.head\.conv)\.(weight|bias)$": r"\1.0.0.\2",
    r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$": r"\1.0.\2",
    **{rf"^(roi_heads\.mask_head)\.mask_fcn{i + 1}\.(weight|bias)$": rf"\1.{i}.0.\2" for i in range(4)},
}
OLD_NAMES_OF_RETINA_NET = {rf"^(head\.\w+_head\.conv)\.{2 * i}\.(weight|bias)$": rf"\1.{i}.0.\2" for i in range(4)}
TAIL = "backbone.features.1.0.3.0.weight"  # of an SSDLite, in the part that has two widths, see give_whole_tail
MOVED_BY_NMS = 1000  # torchvision.ops.batched_nms moves the classes apart for no more boxes than this, on a CPU
SMALLEST_BOX = 1e-2  # side of a detection in the resized picture, a constant inside RoIHeads
MASK_THRESHOLD = 0.5  # torchvision returns scores of pixels, and recommends to take those that are not below


def load(builder, checkpoint, trust=False, names=None, options=()):
    """Return the Source of a builder's model with a checkpoint's weights; without one, with torchvision's own.

    options: (name, value as text) of the builder's arguments, see OPTIONS; names: of the classes, without background.
    """
    if builder not in BUILDERS:
        raise SourceError(f"torchvision:{builder} cannot be exported; supported: {', '.join(BUILDERS)}")
    if tuple(map(int, torchvision.__version__.split(".")[:2])) < (0, 16):
        raise SourceError(f"torchvision {torchvision.__version__} resizes pictures to other sizes: use 0.16 or newer")
    arguments = dict(read_option(builder, *option) for option in options)
    weights = get_model_weights(builder).DEFAULT
    if checkpoint is None:
        checkpoint = CKPT / Path(weights.url).name
        fetch(weights.url, checkpoint)
    content = load_checkpoint(checkpoint, trust)
    model = build_model(builder, arguments, content, checkpoint)
    origin = {
        "builder": builder,
        "set": dict(options),
        "checkpoint": Path(checkpoint).name,
        "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "versions": {module.__name__: str(module.__version__) for module in (torchvision, torch)},
    }
    return as_source(model, class_names(names, content, weights, model), origin)


def as_source(model, classes, origin):
    """Return the Source of a model that build_model returned."""

    def detect(picture, score_threshold=None):
        return reference(model, picture, score_threshold)

    size = model.transform.fixed_size[::-1] if isinstance(model, SSD) else (256, 320)  # all of an SSD's have its own
    image = torch.randn(1, 3, *size)
    try:
        settings = describe(model, strides_of(model, image), classes, origin)
    except SettingsError as error:
        raise SourceError(f"this model cannot be exported: {error}") from error
    return Source(networks(model, image), settings, detect)


# ---------------------------------------------------------------------- checkpoint, classes, model


def read_option(builder, name, text):
    """Return an argument of a builder and its value; SourceError if it has no such value or cannot be set."""
    options = BUILDERS[builder].options
    if name not in options:
        raise SourceError(f"--set {name}: cannot be set; these can: {', '.join(options)}")
    try:
        return name, msgspec.convert(ast.literal_eval(text), options[name], strict=True)
    except msgspec.ValidationError as error:
        raise SourceError(f"--set {name}={text}: {one_line(error)}") from error
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise SourceError(f"--set {name}={text}: not a number, or numbers as in [1, 2]") from error


def build_model(builder, arguments, content, path):
    """Return torchvision's model with the weights of a checkpoint, in evaluation mode."""
    old_names = {**OLD_NAMES, **OLD_NAMES_OF_RETINA_NET} if builder.startswith("retinanet") else OLD_NAMES
    state = renamed(weights_in(content), old_names)
    name, priors = BUILDERS[builder][:2]
    scores = state.get(name)
    if not isinstance(scores, torch.Tensor) or scores.dim() not in (2, 4) or len(scores) < 2 * priors:
        raise SourceError(f"{path} holds no {builder} of torchvision: it lacks {name}")
    number = len(scores) // priors
    known = {name: value for name, value in arguments.items() if name != "frozen_eps"}
    # Without weights torchvision builds BatchNorm2d where a trained model has FrozenBatchNorm2d, which counts nothing.
    try:
        model = get_model_builder(builder)(weights=None, weights_backbone=None, num_classes=number, **known).eval()
    except (RuntimeError, MemoryError) as error:  # a small file may claim billions of classes
        raise SourceError(f"{path}: {builder} with {number} classes cannot be built: {one_line(error)}") from error
    tail = state.get(TAIL) if builder.startswith("ssdlite") else None
    if isinstance(tail, torch.Tensor) and tail.shape != model.state_dict()[TAIL].shape:
        give_whole_tail(model, number)
    load_weights(model, state, path)
    if BUILDERS[builder].frozen_eps is None:
        return model
    if not any(name.endswith("num_batches_tracked") for name in state):
        replace_norms(model, FrozenBatchNorm2d, frozen_eps(builder, arguments))
    elif "frozen_eps" in arguments:
        raise SourceError(f"--set frozen_eps: {path} holds no frozen batch normalisation")
    return model


def give_whole_tail(model, number):
    """Turn the end of an SSDLite's backbone into that of one which was trained on ImageNet first.

    torchvision halves its channels where it was not, as in its own weights for COCO.
    """
    norm = functools.partial(torch.nn.BatchNorm2d, eps=0.001, momentum=0.03)
    model.backbone = _mobilenet_extractor(mobilenet_v3_large(norm_layer=norm), 6, norm).eval()
    channels = retrieve_out_channels(model.backbone, (320, 320))
    model.head = SSDLiteHead(channels, model.anchor_generator.num_anchors_per_location(), number, norm).eval()


def frozen_eps(builder, arguments):
    """Return the eps of frozen batch normalisation, which is in no checkpoint; say so where it has to be assumed."""
    if "frozen_eps" in arguments:
        return arguments["frozen_eps"]
    print(
        f"frozen batch normalisation: eps {BUILDERS[builder].frozen_eps:g} assumed, as in torchvision's own weights "
        "and what is fine-tuned from them; if trained from an ImageNet backbone: --set frozen_eps=1e-5"
    )
    return BUILDERS[builder].frozen_eps


def replace_norms(model, kind, eps=None):
    """Turn every batch normalisation of a model into one of another kind: BatchNorm2d or FrozenBatchNorm2d."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, (torch.nn.BatchNorm2d, FrozenBatchNorm2d)):
                new = kind(len(norm.weight), eps=norm.eps if eps is None else eps).eval()
                new.load_state_dict(norm.state_dict(), strict=False)
                setattr(parent, name, new)


def class_names(names, content, weights, model):
    """Return the names of a model's classes: those given, or the checkpoint's, or those of torchvision's weights."""
    number = number_of_classes(model)
    names = names or content.get("classes")
    if not isinstance(names, (list, tuple)):
        names = weights.meta["categories"] if len(weights.meta["categories"]) == number else []
    names = ["" if name == "N/A" else name for name in names]  # a number that COCO never gave to a class
    if names[:1] == ["__background__"]:
        names = names[1:]
    if len(names) != number - 1:
        beside = "the background" if has_background(model) else "class 0, which torchvision does not train"
        raise SourceError(
            f"the model has {number - 1} classes beside {beside}, but {len(names)} names: give them with "
            "--classes FILE, a name a line"
        )
    twice = [name for name, times in Counter(filter(None, map(str, names))).items() if times > 1]
    if twice:
        raise SourceError(f"{len(twice)} names stand for more than one class, the first is {twice[0]}")
    return names if has_background(model) else [*names, ""]


def number_of_classes(model):
    """Return how many classes a model has, with class 0."""
    if hasattr(model, "roi_heads"):
        return model.roi_heads.box_predictor.cls_score.out_features
    head = model.head.classification_head
    return head.num_columns if has_background(model) else head.num_classes


def has_background(model):
    """Return whether class 0 of a model is the background; else it is a class that was never trained."""
    return not isinstance(model, (RetinaNet, FCOS))


# ---------------------------------------------------------------------- the networks


class Model1(torch.nn.Module):
    """image [N, 3, H, W] -> objectness logits, deltas and features of every level, the finest first."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.rpn_head = model.backbone, model.rpn.head
        self.eval()

    def forward(self, image):
        """Return cls_0.., reg_0.., feat_0.. as one tuple."""
        features = list(self.backbone(image).values())
        cls, reg = self.rpn_head(features)
        return (*cls, *reg, *features)


class Model2(torch.nn.Module):
    """roi_feats [B, C, s, s] -> class logits [B, classes + 1], the background last, and deltas [B, 4 classes]."""

    def __init__(self, model):
        super().__init__()
        self.box_head, predictor = model.roi_heads.box_head, model.roi_heads.box_predictor
        classes = torch.arange(1, predictor.cls_score.out_features)
        self.cls = rows(predictor.cls_score, torch.cat([classes, torch.zeros(1, dtype=torch.int64)]))
        self.reg = rows(predictor.bbox_pred, torch.arange(4, predictor.bbox_pred.out_features))
        self.eval()

    def forward(self, roi_feats):
        """Return cls and reg."""
        features = self.box_head(roi_feats)
        return self.cls(features), self.reg(features)


class MaskHead(torch.nn.Module):
    """roi_feats [B, C, s, s] -> mask logits [B, classes, 2 s, 2 s], without those of the background."""

    def __init__(self, model):
        super().__init__()
        *layers, logits = model.roi_heads.mask_predictor
        logits = rows(logits, torch.arange(1, logits.out_channels))
        self.layers = torch.nn.Sequential(model.roi_heads.mask_head, *layers, logits)
        self.eval()

    def forward(self, roi_feats):
        """Return mask, as a tuple."""
        return (self.layers(roi_feats),)


class DenseHead(torch.nn.Module):
    """image [N, 3, H, W] -> a one-stage detector's maps of every level, the finest first: cls, reg, any centerness."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.maps = next(maps for kind, maps in MAPS_OF.items() if isinstance(model, kind))
        self.eval()

    def forward(self, image):
        """Return cls_0.., reg_0.. and, where there is one, centerness_0.. as one tuple."""
        features = list(self.backbone(image).values())
        return tuple(itertools.chain(*self.maps(self.head.classification_head, self.head.regression_head, features)))


def maps_of_retina_net(classify, regress, features):
    """Return cls and reg of every level."""
    yield [first_last(classify.cls_logits(classify.conv(level)), classify.num_classes) for level in features]
    yield [regress.bbox_reg(regress.conv(level)) for level in features]


def maps_of_fcos(classify, regress, features):
    """Return cls, reg and centerness of every level."""
    cls, reg = maps_of_retina_net(classify, regress, features)
    yield from (cls, [distances.relu() for distances in reg])
    yield [regress.bbox_ctrness(regress.conv(level)) for level in features]


def maps_of_ssd(classify, regress, features):
    """Return cls and reg of every level."""
    yield [first_last(layer(level), classify.num_columns) for layer, level in zip(classify.module_list, features)]
    yield [layer(level) for layer, level in zip(regress.module_list, features)]


def first_last(cls, classes):
    """Return logits [N, a * classes, h, w], each prior's first class moved to its end."""
    channels = torch.arange(cls.shape[1]).view(-1, classes).roll(-1, dims=1)
    return cls[:, channels.flatten()]


MAPS_OF = {RetinaNet: maps_of_retina_net, FCOS: maps_of_fcos, SSD: maps_of_ssd}


def rows(layer, chosen):
    """Return a linear layer or a convolution that gives only the chosen outputs of another, in this order."""
    new = copy.deepcopy(layer)
    for name, value in layer.named_parameters():
        setattr(new, name, torch.nn.Parameter(value[chosen]))
    return new


def networks(model, image):
    """Return the networks by the names of their files; image: an example of the first one's input."""
    model = copy.deepcopy(model)
    replace_norms(model, torch.nn.BatchNorm2d)  # which the exporter folds into the convolution before it
    if not hasattr(model, "roi_heads"):
        kinds = ("cls", "reg", "centerness") if isinstance(model, FCOS) else ("cls", "reg")
        with torch.no_grad():
            levels = range(len(model.backbone(image)))
        maps = {f"{kind}_{i}": {0: "N", 2: f"H_{i}", 3: f"W_{i}"} for kind in kinds for i in levels}
        return {"model.onnx": Network(DenseHead(model), image, {"image": {0: "N", 2: "H", 3: "W"}}, maps)}
    levels = range(len(model.rpn.anchor_generator.sizes))
    maps = {f"{kind}_{i}": {0: "N", 2: f"H_{i}", 3: f"W_{i}"} for kind in ("cls", "reg", "feat") for i in levels}
    files = {
        "model1.onnx": Network(Model1(model), image, {"image": {0: "N", 2: "H", 3: "W"}}, maps),
        "model2.onnx": network_of_head(Model2(model), model.roi_heads.box_roi_pool, model, ("cls", "reg")),
    }
    if model.roi_heads.has_mask():
        files["mask.onnx"] = network_of_head(MaskHead(model), model.roi_heads.mask_roi_pool, model, ("mask",))
    return files


def network_of_head(head, pool, model, outputs):
    """Return the Network of a head that takes what `pool` cuts out of a model's features."""
    roi_feats = torch.randn(2, model.backbone.out_channels, *pool.output_size)
    return Network(head, roi_feats, {"roi_feats": {0: "B"}}, {output: {0: "B"} for output in outputs})


# ---------------------------------------------------------------------- what the networks cannot know


def strides_of(model, image):
    """Return the stride of every level, by its name in torchvision; image: an input whose sides all of them divide."""
    with torch.no_grad():
        strides = {name: image.shape[2] / feature.shape[2] for name, feature in model.backbone(image).items()}
    return {name: int(stride) if stride.is_integer() else stride for name, stride in strides.items()}


def describe(model, strides, classes, origin):
    """Return the settings of a model; SettingsError if one of them has a value that does not fit."""
    if hasattr(model, "roi_heads"):
        family, parts = describe_two_stages(model, strides)
    else:
        family, parts = describe_one_stage(model, list(strides.values()))
    finest_stride = 1 if isinstance(model, SSD) else min(strides.values())
    preprocess = describe_preprocessing(model.transform, finest_stride)
    settings = family(source=origin, classes=classes, preprocess=preprocess, **parts)
    return read(write(settings), family)


def describe_two_stages(model, strides):
    """Return the class of the settings of a two-stage detector, and what it adds to those of every export."""
    parts = {
        "proposals": describe_proposals(model.rpn, list(strides.values())),
        "rois": describe_rois(model.roi_heads.box_roi_pool, strides),
        "head": describe_head(model.roi_heads),
    }
    if not model.roi_heads.has_mask():
        return FasterRCNNSettings, parts
    return MaskRCNNSettings, {**parts, "masks": describe_masks(model.roi_heads, strides)}


def describe_one_stage(model, strides):
    """Return the class of the settings of a one-stage detector, and what it adds to those of every export."""
    is_ssd, is_fcos = isinstance(model, SSD), isinstance(model, FCOS)
    head = Dense(
        score_threshold=model.score_thresh,
        iou_threshold=as_float32(model.nms_thresh),
        nms_pre=-1 if is_ssd else model.topk_candidates,
        nms_pre_per_class=model.topk_candidates if is_ssd else None,
        softmax=is_ssd,
        **({"factor": "centerness", "combined": "root"} if is_fcos else {}),
        nms_first_group=1,  # torchvision numbers the classes from the background, or from one that is not trained
        nms_moved_up_to=MOVED_BY_NMS,
        nms_resized=True,
        multiplied_back=True,
        max_per_img=model.detections_per_img,
    )
    if is_ssd:
        anchors = describe_default_boxes(model.anchor_generator, model.transform.fixed_size, strides)
    else:
        boxes = [level.tolist() for level in model.anchor_generator.cell_anchors]
        anchors = CellAnchors(strides=strides, boxes=boxes, strides_of_maps=True)
    if is_fcos:
        units = [x2 - x1 for ((x1, _, x2, _),) in anchors.boxes]
        points = CellPoints(strides=strides, offset=0, units=units, strides_of_maps=True)
        return FCOSSettings, {"points": points, "head": head}
    return RetinaNetSettings, {"anchors": anchors, "deltas": Coder(**describe_coder(model.box_coder)), "head": head}


def describe_default_boxes(generator, size, strides):
    """Return the settings of a DefaultBoxGenerator for pictures of a size (width, height), which is a square."""
    pixels, boxes = size[0], []
    strides = generator.steps or strides
    for stride, pairs in zip(strides, generator._wh_pairs):
        sizes = (pairs.clamp(0, 1) if generator.clip else pairs) * pixels / 2
        boxes.append([[stride / 2 - w, stride / 2 - h, stride / 2 + w, stride / 2 + h] for w, h in sizes.tolist()])
    return CellAnchors(strides=strides, boxes=boxes)


def describe_preprocessing(transform, finest_stride):
    """Return the settings of a GeneralizedRCNNTransform."""
    if transform.size_divisible % finest_stride:
        raise SourceError(f"--set size_divisible: not a multiple of the finest stride, {finest_stride}")
    longest, shortest = transform.max_size, transform.min_size[-1]
    return Preprocess(
        scale=transform.fixed_size or (longest, min(shortest, longest)),
        keep_ratio=transform.fixed_size is None,
        normalize_first=True,
        mean=[255 * mean for mean in transform.image_mean],
        std=[255 * std for std in transform.image_std],
        to_rgb=True,
        pad_divisor=transform.size_divisible,
    )


def describe_proposals(rpn, strides):
    """Return the settings of a RegionProposalNetwork."""
    sizes, ratios = rpn.anchor_generator.sizes, rpn.anchor_generator.aspect_ratios
    anchors = Anchors(
        strides=strides,
        base_sizes=[level[0] for level in sizes],
        scales=[size / sizes[0][0] for size in sizes[0]],  # the same on all levels of these builders
        ratios=ratios[0],
        center_offset=0,
        rounded=True,
        strides_of_maps=True,
    )
    return Proposals(
        anchors=anchors,
        **describe_coder(rpn.box_coder),
        nms_pre=rpn._pre_nms_top_n["testing"],
        rank_logits=True,
        min_bbox_size=just_below(rpn.min_size),
        score_threshold=just_below(rpn.score_thresh) if rpn.score_thresh > 0 else -1,
        iou_threshold=as_float32(rpn.nms_thresh),
        nms_moved_up_to=MOVED_BY_NMS,
        max_per_img=rpn._post_nms_top_n["testing"],
    )


def describe_coder(coder):
    """Return the settings of a BoxCoder, which divides by its weights and limits only how much a box grows."""
    return {"means": [0] * 4, "stds": [1 / weight for weight in coder.weights], "shrinks_freely": True}


def just_below(limit):
    """Return the float32 before a limit: what is above it is what is not below the limit."""
    return float(np.nextafter(np.float32(limit), np.float32(-np.inf)))


def as_float32(limit):
    """Return what a float32 is above exactly where it is above a double: torchvision's NMS compares IoUs with one."""
    return just_below(limit) if float(np.float32(limit)) > limit else limit


def describe_rois(pool, strides):
    """Return the settings of a MultiScaleRoIAlign. Of two levels with the same stride, it reads the first alone."""
    read_strides = sorted({strides[name] for name in pool.featmap_names if name in strides})
    return RoIs(
        strides=read_strides,
        finest_scale=pool.canonical_scale * read_strides[0] / 2**pool.canonical_level,
        output_size=pool.output_size[0],
        sampling_ratio=pool.sampling_ratio,
        aligned=False,
    )


def describe_head(heads):
    """Return the settings of RoIHeads."""
    return Head(
        **describe_coder(heads.box_coder),
        class_agnostic=False,
        min_bbox_size=just_below(SMALLEST_BOX),
        score_threshold=heads.score_thresh,
        iou_threshold=as_float32(heads.nms_thresh),
        nms_resized=True,
        multiplied_back=True,
        nms_first_group=1,
        nms_moved_up_to=MOVED_BY_NMS,
        max_per_img=heads.detections_per_img,
    )


def describe_masks(heads, strides):
    """Return the settings of RoIHeads' masks."""
    return Masks(rois=describe_rois(heads.mask_roi_pool, strides), threshold=MASK_THRESHOLD, bordered=True)


# ---------------------------------------------------------------------- the reference


def reference(model, picture, score_threshold=None):
    """Return the Detections of torchvision's model itself in a picture's file."""
    image = cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB)
    heads = getattr(model, "roi_heads", model)
    own, heads.score_thresh = heads.score_thresh, heads.score_thresh if score_threshold is None else score_threshold
    try:
        with torch.no_grad():
            found = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
    finally:
        heads.score_thresh = own
    masks = encode_masks(found["masks"]) if "masks" in found else None
    labels = (found["labels"].numpy() - 1) % number_of_classes(model)
    return Detections(found["boxes"].numpy(), found["scores"].numpy(), labels, masks)


def encode_masks(scores):
    """Return the scores [d, 1, h, w] of a picture's pixels as run-length encoded masks [d], one by one."""
    masks = np.empty(len(scores), object)
    for i, (pixels,) in enumerate(scores):
        mask = (pixels >= MASK_THRESHOLD).numpy()
        masks[i] = rle.encode(mask, mask.shape)
    return masks
