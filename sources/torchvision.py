"""torchvision: its Faster R-CNNs and Mask R-CNNs as the networks and the settings of an export.

They differ from MMDetection's in settings, and in the place of the background, which is class 0 of torchvision. The
exported head has it last, the exported mask head lacks it; so a label is a position in the list of classes and a mask's
channel, and torchvision's own label is one more.
"""

import ast
import copy
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Tuple

import cv2
import msgspec
import numpy as np
import torch
import torchvision
from torchvision.models import get_model_builder, get_model_weights
from torchvision.ops import FrozenBatchNorm2d
from typing_extensions import Annotated

from detectors import Detections, one_line, rle
from detectors.settings import (
    Anchors,
    Count,
    FasterRCNNSettings,
    Head,
    MaskRCNNSettings,
    Masks,
    Number,
    Positive,
    Preprocess,
    Proposals,
    RoIs,
    SettingsError,
    read,
    write,
)
from sources import Network, Source, SourceError
from sources.checkpoints import fetch, load_checkpoint, load_weights, weights_in

CKPT = Path(__file__).resolve().parents[1] / "ckpt"
FROZEN_EPS = {  # of the frozen batch normalisation in what each builder's own weights, or others from them, trained
    "fasterrcnn_resnet50_fpn": 0.0,
    "fasterrcnn_resnet50_fpn_v2": 1e-5,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
    "maskrcnn_resnet50_fpn": 0.0,
    "maskrcnn_resnet50_fpn_v2": 1e-5,
}
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
OPTIONS = {  # the builders' arguments that change what is detected
    "min_size": Count,
    "max_size": Count,
    "fixed_size": Tuple[Count, Count],
    "size_divisible": Count,
    "image_mean": Tuple[Number, Number, Number],
    "image_std": Tuple[Positive, Positive, Positive],
    "rpn_pre_nms_top_n_test": Count,
    "rpn_post_nms_top_n_test": Count,
    "rpn_nms_thresh": Share,
    "rpn_score_thresh": Number,
    "box_score_thresh": Number,
    "box_nms_thresh": Share,
    "box_detections_per_img": Count,
    "bbox_reg_weights": Tuple[Positive, Positive, Positive, Positive],
    "frozen_eps": Share,  # no argument of theirs, see frozen_eps
}
OLD_NAMES = {  # of layers before torchvision 0.13, which most of its own files have, and what they are called today
    r"^(rpn\.head\.conv)\.(weight|bias)$": r"\1.0.0.\2",
    r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$": r"\1.0.\2",
    **{rf"^(roi_heads\.mask_head)\.mask_fcn{i + 1}\.(weight|bias)$": rf"\1.{i}.0.\2" for i in range(4)},
}
MOVED_BY_NMS = 1000  # torchvision.ops.batched_nms moves the classes apart for no more boxes than this, on a CPU
SMALLEST_BOX = 1e-2  # side of a detection in the resized picture, a constant inside RoIHeads
MASK_THRESHOLD = 0.5  # torchvision returns scores of pixels, and recommends to take those that are not below


def load(builder, checkpoint, trust=False, names=None, options=()):
    """Return the Source of a builder's model with a checkpoint's weights; without one, with torchvision's own.

    options: (name, value as text) of the builder's arguments, see OPTIONS; names: of the classes, without background.
    """
    if builder not in FROZEN_EPS:
        raise SourceError(f"torchvision:{builder} cannot be exported; supported: {', '.join(FROZEN_EPS)}")
    if tuple(map(int, torchvision.__version__.split(".")[:2])) < (0, 16):
        raise SourceError(f"torchvision {torchvision.__version__} resizes pictures to other sizes: use 0.16 or newer")
    arguments = dict(read_option(*option) for option in options)
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

    image = torch.randn(1, 3, 256, 320)
    try:
        settings = describe(model, strides_of(model, image), classes, origin)
    except SettingsError as error:
        raise SourceError(f"this model cannot be exported: {error}") from error
    return Source(networks(model, image), settings, detect)


# ---------------------------------------------------------------------- checkpoint, classes, model


def read_option(name, text):
    """Return an argument of a builder and its value; SourceError if it has no such value or cannot be set."""
    if name not in OPTIONS:
        raise SourceError(f"--set {name}: cannot be set; these can: {', '.join(OPTIONS)}")
    try:
        return name, msgspec.convert(ast.literal_eval(text), OPTIONS[name], strict=True)
    except msgspec.ValidationError as error:
        raise SourceError(f"--set {name}={text}: {one_line(error)}") from error
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise SourceError(f"--set {name}={text}: not a number, or numbers as in [1, 2]") from error


def build_model(builder, arguments, content, path):
    """Return torchvision's model with the weights of a checkpoint, in evaluation mode."""
    state = renamed(weights_in(content))
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2 or len(scores) < 2:
        raise SourceError(f"{path} holds no Faster R-CNN of torchvision: it lacks roi_heads.box_predictor.cls_score")
    known = {name: value for name, value in arguments.items() if name != "frozen_eps"}
    # Without weights torchvision builds BatchNorm2d where a trained model has FrozenBatchNorm2d, which counts nothing.
    try:
        model = get_model_builder(builder)(weights=None, weights_backbone=None, num_classes=len(scores), **known).eval()
    except (RuntimeError, MemoryError) as error:  # a small file may claim billions of classes
        raise SourceError(f"{path}: {builder} with {len(scores)} classes cannot be built: {one_line(error)}") from error
    load_weights(model, state, path)
    if not any(name.endswith("num_batches_tracked") for name in state):
        replace_norms(model, FrozenBatchNorm2d, frozen_eps(builder, arguments))
    elif "frozen_eps" in arguments:
        raise SourceError(f"--set frozen_eps: {path} holds no frozen batch normalisation")
    return model


def frozen_eps(builder, arguments):
    """Return the eps of frozen batch normalisation, which is in no checkpoint; say so where it has to be assumed."""
    if "frozen_eps" in arguments:
        return arguments["frozen_eps"]
    print(
        f"frozen batch normalisation: eps {FROZEN_EPS[builder]:g} assumed, as in torchvision's own weights and what is "
        "fine-tuned from them; if trained from an ImageNet backbone: --set frozen_eps=1e-5"
    )
    return FROZEN_EPS[builder]


def renamed(state):
    """Return a state dict with the names that torchvision gives today."""
    for old, new in OLD_NAMES.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


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
    number = model.roi_heads.box_predictor.cls_score.out_features
    names = names or content.get("classes")
    if not isinstance(names, (list, tuple)):
        names = weights.meta["categories"] if len(weights.meta["categories"]) == number else []
    names = ["" if name == "N/A" else name for name in names]  # a number that COCO never gave to a class
    if names[:1] == ["__background__"]:
        names = names[1:]
    if len(names) != number - 1:
        raise SourceError(
            f"the model has {number - 1} classes beside the background, but {len(names)} names: give them with "
            "--classes FILE, a name a line"
        )
    twice = [name for name, times in Counter(filter(None, map(str, names))).items() if times > 1]
    if twice:
        raise SourceError(f"{len(twice)} names stand for more than one class, the first is {twice[0]}")
    return names


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
        return {name: image.shape[2] // feature.shape[2] for name, feature in model.backbone(image).items()}


def describe(model, strides, classes, origin):
    """Return the settings of a model; SettingsError if one of them has a value that does not fit."""
    family, added = FasterRCNNSettings, {}
    if model.roi_heads.has_mask():
        family, added = MaskRCNNSettings, {"masks": describe_masks(model.roi_heads, strides)}
    settings = family(
        source=origin,
        classes=classes,
        preprocess=describe_preprocessing(model.transform, min(strides.values())),
        proposals=describe_proposals(model.rpn, list(strides.values())),
        rois=describe_rois(model.roi_heads.box_roi_pool, strides),
        head=describe_head(model.roi_heads),
        **added,
    )
    return read(write(settings), family)


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
    heads = model.roi_heads
    own, heads.score_thresh = heads.score_thresh, heads.score_thresh if score_threshold is None else score_threshold
    try:
        with torch.no_grad():
            found = model([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
    finally:
        heads.score_thresh = own
    masks = encode_masks(found["masks"]) if "masks" in found else None
    return Detections(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy() - 1, masks)


def encode_masks(scores):
    """Return the scores [d, 1, h, w] of a picture's pixels as run-length encoded masks [d], one by one."""
    masks = np.empty(len(scores), object)
    for i, (pixels,) in enumerate(scores):
        mask = (pixels >= MASK_THRESHOLD).numpy()
        masks[i] = rle.encode(mask, mask.shape)
    return masks
