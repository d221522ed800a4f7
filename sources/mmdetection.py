"""MMDetection 2.28: its detectors as the networks and the settings of an export.

What would be computed differently is refused by its name in the config.
"""

import argparse
import copy
import functools
import hashlib
import inspect
import itertools
import sys
from pathlib import Path
from unittest import mock

import mmcv
import mmcv.ops
import mmdet
import numpy as np
import torch
from mmdet.apis import inference_detector
from mmdet.datasets import DATASETS, replace_ImageToTensor
from mmdet.datasets.pipelines import Compose
from mmdet.models import build_detector
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.dense_heads.anchor_free_head import AnchorFreeHead
from mmdet.models.necks import BFP

from detectors import CKPT, Detections, one_line, rle
from detectors.settings import (
    Anchors,
    CascadeMaskRCNNSettings,
    CascadeRCNNSettings,
    CellAnchors,
    CellPoints,
    CenterNetSettings,
    Coder,
    Dense,
    DETRSettings,
    FasterRCNNSettings,
    FCOSSettings,
    Head,
    MaskRCNNSettings,
    Masks,
    PAASettings,
    PointRendSettings,
    Points,
    Preprocess,
    Proposals,
    Queries,
    Refinement,
    RetinaNetSettings,
    RoIs,
    SettingsError,
    TOODSettings,
    YOLOSettings,
    read,
    write,
)
from postprocess import NMS_SPLIT
from sources import OPSET, Network, Source, SourceError
from sources.checkpoints import fetch, load_checkpoint, load_weights, renamed, weights_in
from sources.deform_conv import OPSET as DEFORM_CONV_OPSET
from sources.deform_conv import has_deform_conv, replace_deform_convs
from sources.layers import GroupNorm, MultiheadAttention, adaptive_max_pool2d, replace_layers

DEFAULT_CONFIG = "faster_rcnn_r50_fpn_1x_coco"
DEFAULT_CHECKPOINT = "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth"
CHECKPOINT_URL = f"https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/{DEFAULT_CONFIG}/{DEFAULT_CHECKPOINT}"
# What a config may call its model.
DETECTORS = (
    "FasterRCNN", "MaskRCNN", "CascadeRCNN", "PointRend", "TridentFasterRCNN",
    "RetinaNet", "ATSS", "FSAF", "FCOS", "FOVEA", "GFL", "VFNet", "AutoAssign", "RepPointsDetector", "DDOD", "NASFCOS",
    "PAA", "TOOD", "SingleStageDetector", "YOLOF", "DETR", "CenterNet", "YOLOV3", "YOLOX",
)  # fmt: skip
STUDENTS = ("KnowledgeDistillationSingleStageDetector", "LAD")  # what it may be called if it was taught by another one
STUDENT_HEADS = {"LDHead": "GFLHead", "LADHead": "PAAHead"}  # and what its head computes
FAMILIES = {  # by what a detector has beside what Faster R-CNN has
    (): FasterRCNNSettings,
    ("refinements",): CascadeRCNNSettings,
    ("masks",): MaskRCNNSettings,
    ("refinements", "masks"): CascadeMaskRCNNSettings,
    ("masks", "points"): PointRendSettings,
}
OLD_NAMES = {  # of layers in files of earlier versions, and what they are called today
    r"^(bbox_head\.transformer\..+)\.self_attn\.": r"\1.attentions.0.",
    r"^(bbox_head\.transformer\..+)\.multihead_attn\.": r"\1.attentions.1.",
    r"^(bbox_head\.transformer\..+)\.ffn\.": r"\1.ffns.0.",
    r"^(bbox_head\.transformer\.decoder)\.norm\.": r"\1.post_norm.",
    r"^(bbox_head)\.(?:fcos|fovea)_(cls|reg|centerness)\.": r"\1.conv_\2.",
    r"^(backbone\..+\.conv2)_offset\.": r"\1.conv_offset.",
}
IMAGE_AXES = {0: "N", 2: "H", 3: "W"}  # of a picture, those that are dynamic
FURTHER_MAPS = {  # what the heads of one-stage detectors predict beside cls and reg; the first is a factor of scores
    **dict.fromkeys(("ATSSHead", "FCOSHead", "NASFCOSHead"), ("centerness",)),
    **dict.fromkeys(("DDODHead", "PAAHead"), ("iou",)),
    **dict.fromkeys(("AutoAssignHead", "YOLOV3Head", "YOLOXHead"), ("objectness",)),
    "TOODHead": ("alignment", "offset"),
}
ANCHOR_HEADS = ("RetinaHead", "RetinaSepBNHead", "FreeAnchorRetinaHead", "PISARetinaHead", "ATSSHead", "DDODHead",
                "PAAHead", "SSDHead", "PISASSDHead", "YOLOFHead")  # fmt: skip
YOLO_HEADS = ("YOLOV3Head", "YOLOXHead")
POINT_HEADS = ("FCOSHead", "TOODHead", "NASFCOSHead", "VFNetHead", "AutoAssignHead", "RepPointsHead", "FoveaHead",
               "FSAFHead", "GFLHead")  # fmt: skip


def load(config, checkpoint, trust=False, names=None, options=()):
    """Return the Source of a config's detector with a checkpoint's weights; without both, of the default.

    names: of the classes, instead of the checkpoint's. options: changes KEY=VALUE of the config.
    """
    if config and checkpoint is None:
        raise SourceError(f"{config}: its checkpoint is missing: CONFIG and CHECKPOINT go together")
    path = find_config(config or DEFAULT_CONFIG)
    if checkpoint is None:
        checkpoint = CKPT / DEFAULT_CHECKPOINT
        fetch(CHECKPOINT_URL, checkpoint)
    return as_source(load_detector(path, checkpoint, trust, names, options), path, checkpoint, options)


def as_source(detector, config, checkpoint, changes=()):
    """Return the Source of a detector that load_detector returned."""
    origin = {
        "config": Path(config).name,
        **({"cfg_options": list(changes)} if changes else {}),
        "checkpoint": Path(checkpoint).name,
        "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "versions": {module.__name__: str(module.__version__) for module in (mmdet, mmcv, torch)},
    }

    def detect(picture, score_threshold=None):
        return reference(detector, picture, score_threshold)

    opset = DEFORM_CONV_OPSET if has_deform_conv(detector) else OPSET
    return Source(networks(detector), describe(detector, origin), detect, opset)


# ---------------------------------------------------------------------- the networks


class PictureNetwork(torch.nn.Module):
    """A network that takes pictures [N, 3, H, W]; each adds what it gives."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector
        self.eval()  # a new module is in training mode, and the exporter would put the detector back into it


class Model1(PictureNetwork):
    """image [N, 3, H, W] -> objectness logits, deltas and features of every level, the finest first."""

    def forward(self, image):
        """Return cls_0.., reg_0.., feat_0.. as one tuple."""
        features = self.detector.extract_feat(image)
        cls, reg = self.detector.rpn_head(features)
        return (*cls, *reg, *features)


class RoIHead(torch.nn.Module):
    """roi_feats [B, C, s, s] -> what a head predicts: cls [B, classes + 1] and reg [B, 4 classes], or mask."""

    def __init__(self, roi_head, head):
        super().__init__()
        self.shared_head = roi_head.shared_head if roi_head.with_shared_head else torch.nn.Identity()
        self.head = SeesawHead(head) if getattr(head, "custom_activation", False) else head
        self.eval()

    def forward(self, roi_feats):
        """Return cls and reg, or mask, as a tuple."""
        outputs = self.head(self.shared_head(roi_feats))
        return outputs if isinstance(outputs, tuple) else (outputs,)


class PointHead(torch.nn.Module):
    """point_feats [B, P, F]: features of a level, then values of the coarse mask -> logits [B, P, classes]."""

    def __init__(self, head):
        super().__init__()
        self.head, self.num_features = head, head.in_channels
        self.eval()

    def forward(self, point_feats):
        """Return logits as a tuple."""
        fine, coarse = point_feats.transpose(1, 2).split([self.num_features, self.head.num_classes], dim=1)
        return (self.head(fine, coarse).transpose(1, 2),)


def box_head(detector):
    """Return the head that says what things are, or those of a cascade's stages."""
    return detector.roi_head.bbox_head if hasattr(detector, "roi_head") else detector.bbox_head


def stages(part):
    """Return the parts of a cascade's stages as a list; of other detectors, there is one."""
    return list(part) if isinstance(part, torch.nn.ModuleList) else [part]


class DenseHead(PictureNetwork):
    """image [N, 3, H, W] -> a one-stage detector's maps: cls, reg and any factor of every level, the finest first."""

    def forward(self, image):
        """Return cls_0.., reg_0.. and, where there is one, the factor's maps as one tuple."""
        head, features = self.detector.bbox_head, self.detector.extract_feat(image)
        if type(head).__name__ == "FCOSHead":
            cls, reg, *factor = zip(*map(functools.partial(fcos_maps, head), features, head.scales))
        elif type(head).__name__ == "TOODHead":
            cls, reg, *factor = zip(*map(functools.partial(tood_maps, head), features, head.scales))
        elif type(head).__name__ == "YOLOV3Head":
            cls, reg, *factor = zip(*map(functools.partial(yolo_maps, head), head(features)[0][::-1]))
        else:
            cls, reg, *factor = head(features)
        to_distances = TO_DISTANCES.get(type(head).__name__, lambda reg, stride: reg)
        reg = [to_distances(values, stride) for values, (stride, _) in zip(reg, head.prior_generator.strides)]
        return (*cls, *reg, *itertools.chain(*factor))


def fcos_maps(head, features, scale):
    """Return cls, reg and centerness of one level; MMDetection's head would return e to the power of reg, in pixels."""
    cls, reg, cls_features, reg_features = AnchorFreeHead.forward_single(head, features)
    reg = scale(reg).clamp(min=0) if head.norm_on_bbox else scale(reg)
    return cls, reg, head.conv_centerness(reg_features if head.centerness_on_reg else cls_features)


def tood_maps(head, features, scale):
    """Return cls, reg, alignment and offset of one level; MMDetection's head would go on and read the boxes there."""
    maps = []
    for layer in head.inter_convs:
        features = layer(features)
        maps.append(features)
    maps = torch.cat(maps, dim=1)
    mean = torch.nn.functional.adaptive_avg_pool2d(maps, (1, 1))
    cls = head.tood_cls(head.cls_decomp(maps, mean))
    reg = scale(head.tood_reg(head.reg_decomp(maps, mean)).exp())
    return cls, reg, head.cls_prob_module(maps), head.reg_offset_module(maps)


def yolo_maps(head, values):
    """Return cls, reg and objectness of one level of YOLOv3, which are one map: for each anchor reg first, cls last."""
    channels = torch.arange(values.shape[1]).view(-1, head.num_attrib)
    return tuple(values[:, part.flatten()] for part in (channels[:, 5:], channels[:, :4], channels[:, 4]))


TO_DISTANCES = {  # what heads return as reg [N, 4, H, W] -> to the left, upper, right and lower side, mostly in strides
    "FSAFHead": lambda reg, stride: reg[:, [2, 0, 3, 1]],  # of anchors; the upper side comes first, then the lower one
    "RepPointsHead": lambda reg, stride: torch.cat([-reg[:, :2], reg[:, 2:]], dim=1),  # where the corners are
    **dict.fromkeys(["VFNetHead", "AutoAssignHead", "NASFCOSHead"], lambda reg, stride: reg / stride),
}


class QueryHead(PictureNetwork):
    """image [N, 3, H, W] -> what DETR's queries answer: cls [N, Q, classes + 1] and reg [N, Q, 4]."""

    def forward(self, image):
        """Return cls and reg, of the last of the decoder's layers."""
        head, features = self.detector.bbox_head, self.detector.extract_feat(image)[-1]
        features = head.input_proj(features)
        padding = torch.zeros_like(features[:, 0], dtype=torch.bool)  # there is less than a cell, see check_padding
        places = head.positional_encoding(padding)
        decoded = head.transformer(features, padding, head.query_embedding.weight, places)[0][-1]
        return head.fc_cls(decoded), head.fc_reg(head.activate(head.reg_ffn(decoded))).sigmoid()


class PeakHead(PictureNetwork):
    """image [N, 3, H, W] -> CenterNet's maps: heatmap [N, classes, h, w], size [N, 2, h, w], offset [N, 2, h, w]."""

    def forward(self, image):
        """Return heatmap, size and offset."""
        return tuple(maps[0] for maps in self.detector.bbox_head(self.detector.extract_feat(image)))


WITHOUT_PRIORS = {  # by the head: the network, the names of its outputs, and their dynamic axes
    "CenterNetHead": (PeakHead, ("heatmap", "size", "offset"), {0: "N", 2: "h", 3: "w"}),
    "DETRHead": (QueryHead, ("cls", "reg"), {0: "N"}),
}


def networks(detector):
    """Return the networks by the names of their files."""
    return (networks_of_two_stages if hasattr(detector, "roi_head") else networks_of_one_stage)(detector)


def networks_of_one_stage(detector):
    """Return the network by the name of its file."""
    kind = type(detector.bbox_head).__name__
    if kind in WITHOUT_PRIORS:
        module, names, axes = WITHOUT_PRIORS[kind]
        outputs = dict.fromkeys(names, axes)
        return {"model.onnx": Network(module(detector), torch.randn(1, 3, 256, 320), {"image": IMAGE_AXES}, outputs)}
    head, preprocess = detector.bbox_head, describe_preprocessing(detector.cfg)
    kinds = ["cls", "reg", *FURTHER_MAPS.get(kind, ())]
    levels = range(len(head.prior_generator.strides))
    maps = {f"{kind}_{i}": {0: "N", 2: f"H_{i}", 3: f"W_{i}"} for kind in kinds for i in levels}
    size = (256, 320) if preprocess.keep_ratio else preprocess.scale[::-1]  # SSD's maps would vanish
    return {"model.onnx": Network(DenseHead(detector), torch.randn(1, 3, *size), {"image": IMAGE_AXES}, maps)}


def networks_of_two_stages(detector):
    """Return the networks by the names of their files."""
    levels = range(len(detector.rpn_head.prior_generator.strides))
    maps = {f"{kind}_{i}": {0: "N", 2: f"H_{i}", 3: f"W_{i}"} for kind in ("cls", "reg", "feat") for i in levels}
    files = {"model1.onnx": Network(Model1(detector), torch.randn(1, 3, 256, 320), {"image": IMAGE_AXES}, maps)}
    roi_head = detector.roi_head
    files.update(networks_of_heads("model2", roi_head, roi_head.bbox_head, roi_head.bbox_roi_extractor, ("cls", "reg")))
    if roi_head.with_mask:
        files.update(networks_of_heads("mask", roi_head, roi_head.mask_head, roi_head.mask_roi_extractor, ("mask",)))
    if hasattr(roi_head, "point_head"):
        head = PointHead(roi_head.point_head)
        point_feats = torch.randn(2, 50, head.num_features + roi_head.mask_head.num_classes)
        axes = {0: "B", 1: "P"}
        files["point.onnx"] = Network(head, point_feats, {"point_feats": axes}, {"logits": axes})
    return files


def networks_of_heads(name, roi_head, heads, extractors, outputs):
    """Return the networks of the heads of one kind, numbered where there are several."""
    files, heads = {}, stages(heads)
    for stage, (head, extractor) in enumerate(zip(heads, stages(extractors))):
        roi_feats = torch.randn(2, extractor.out_channels, *extractor.roi_layers[0].output_size)
        file = f"{name}.onnx" if len(heads) == 1 else f"{name}_{stage}.onnx"
        axes = {output: {0: "B"} for output in outputs}
        files[file] = Network(RoIHead(roi_head, head), roi_feats, {"roi_feats": {0: "B"}}, axes)
    return files


class WindowAttention(ShiftWindowMSA):
    """Swin Transformer's attention; MMDetection's own makes the batch size a constant of the exported graph."""

    def window_reverse(self, windows, height, width):
        """Lay the windows [n, s, s, C] side by side: [N, height, width, C]; when not exported, as MMDetection does."""
        if not torch.onnx.is_in_onnx_export():
            return super().window_reverse(windows, height, width)
        size, channels = self.window_size, windows.shape[-1]
        grid = windows.view(-1, height // size, width // size, size, size, channels)
        return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


class BalancedFPN(BFP):
    """Libra R-CNN's neck; the pooling of MMDetection's own cannot be exported for maps whose sizes vary."""

    def forward(self, inputs):
        """Return the maps of all levels, balanced; when not exported, as MMDetection does."""
        if not torch.onnx.is_in_onnx_export():
            return super().forward(inputs)
        with mock.patch.object(torch.nn.functional, "adaptive_max_pool2d", adaptive_max_pool2d):
            return super().forward(inputs)


class SeesawHead(torch.nn.Module):
    """A box head of Seesaw loss, whose classes' scores and the background's come from two softmaxes.

    Its logits are exported such that one softmax makes the same scores: as their logarithms.
    """

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, roi_feats):
        """Return cls and reg."""
        cls, reg = self.head(roi_feats)
        classes, objectness = cls[:, :-2].log_softmax(dim=1), cls[:, -2:].log_softmax(dim=1)
        return torch.cat([classes + objectness[:, :1], objectness[:, 1:]], dim=1), reg


# ---------------------------------------------------------------------- config, checkpoint, detector


def find_config(name):
    """Return the path of a config: a file, or the name of one inside MMDetection's wheel."""
    if Path(name).is_file():
        return Path(name)
    shipped = Path(mmdet.__file__).parent / ".mim" / "configs"
    found = [path for path in sorted(shipped.rglob("*.py")) if name in (path.stem, path.name)]
    if not found:
        raise SourceError(f"{name}: no such file, and MMDetection ships no config of this name")
    return found[0]


def class_names(cfg, checkpoint, num_classes, names=None):
    """Return the names of the classes: those given, or the checkpoint's, or else those of the config's dataset."""
    meta = checkpoint.get("meta")
    names = names or (meta.get("CLASSES") if isinstance(meta, dict) else None)
    if not names:
        names = cfg.data.test.get("classes")
        if isinstance(names, str):  # a file with a name a line; only a config, which is trusted, may name one
            names = mmcv.list_from_file(names)
    names = [names] if isinstance(names, str) else names
    names = list(names or getattr(DATASETS.get(cfg.data.test.type), "CLASSES", None) or [])
    if len(names) != num_classes:
        raise SourceError(f"the model has {num_classes} classes, but {len(names)} names: set data.test.classes, "
                          "or give them with --classes FILE, a name a line")  # fmt: skip
    return names


def read_config(path, changes=()):
    """Return the config in a file, with changes KEY=VALUE in the syntax of MMDetection's own programs."""
    try:
        cfg = mmcv.Config.fromfile(str(path))
    except (Exception, SystemExit) as error:  # a config is Python: anything can be wrong with it
        raise SourceError(f"{path} cannot be read: {one_line(error) or type(error).__name__}") from error
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cfg-options", nargs="*", action=mmcv.DictAction)
    for change in changes:
        try:
            cfg.merge_from_dict(parser.parse_args(["--cfg-options", change]).cfg_options)
        except Exception as error:  # mmcv's own are of many kinds
            raise SourceError(f"--cfg-options {change}: {one_line(error)}") from error
    return cfg


def load_detector(config, checkpoint_path, trust=False, names=None, changes=()):
    """Return MMDetection's detector with its weights, in evaluation mode; model.cfg is its config."""
    cfg = read_config(config, changes)
    model = cfg.get("model") or {}
    if isinstance(model, dict):
        forget_teacher(model)
    found = model.get("type") if isinstance(model, dict) else model
    if found not in DETECTORS:
        raise SourceError(f"{config}: model.type is {found}, not one of {', '.join(DETECTORS)}")
    try:
        cfg.model.pretrained = None
        if "init_cfg" in cfg.model.backbone:
            cfg.model.backbone.init_cfg = None
        cfg.model.train_cfg = None
        replace_sync_norms(cfg.model)
        detector = build_detector(cfg.model, test_cfg=cfg.get("test_cfg")).eval()
    except Exception as error:
        raise SourceError(f"{config}: MMDetection cannot build its model: {one_line(error)}") from error
    try:
        check_supported(detector)
        check_padding(detector, describe_preprocessing(cfg))  # refuses what does not fit before the work begins
        check_pipeline(cfg)
        checkpoint = load_checkpoint(checkpoint_path, trust)
        load_weights(detector, without_averages(renamed(weights_in(checkpoint), OLD_NAMES), detector), checkpoint_path)
        detector.CLASSES = class_names(cfg, checkpoint, stages(box_head(detector))[-1].num_classes, names)
        detector.cfg = cfg
        describe(detector, {})
    except (AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{config} lacks what export.py needs: {one_line(error)}") from error
    except SettingsError as error:
        raise SourceError(f"{config} or its checkpoint cannot be exported: {error}") from error
    replace_layers(detector, {
        torch.nn.GroupNorm: GroupNorm, torch.nn.MultiheadAttention: MultiheadAttention, ShiftWindowMSA: WindowAttention,
        BFP: BalancedFPN,
    })  # fmt: skip
    replace_deform_convs(detector)
    return detector


def without_averages(state, detector):
    """Return a state dict without what a hook that averages weights keeps beside them; the averages are in their place.

    Before each epoch MMDetection's EMA hooks exchange the two, and after it again.
    """
    kept = {"ema_" + name.replace(".", "_") for name in detector.state_dict()}
    return {name: value for name, value in state.items() if name not in kept}


def forget_teacher(model):
    """Turn the model of a config that has a teacher into its student, which is all that is left after training."""
    head = model.get("bbox_head")
    if model.get("type") in STUDENTS and isinstance(head, dict):
        model["type"] = "SingleStageDetector"
        head["type"] = STUDENT_HEADS.get(head.get("type"), head.get("type"))
        head.pop("loss_ld", None)
        for key in [key for key in model if "teacher" in key]:
            del model[key]


def replace_sync_norms(cfg):
    """Turn the batch normalisations of a model's config that need several GPUs into those that need none."""
    if isinstance(cfg, dict):
        if cfg.get("type") in ("SyncBN", "MMSyncBN"):
            cfg["type"] = "BN"
        cfg = cfg.values()
    for part in cfg:
        if not isinstance(part, (str, int, float, bool, type(None))):
            replace_sync_norms(part)


# ---------------------------------------------------------------------- what cannot be exported


def check_supported(detector):
    """Refuse, by its name in the config, every part that an export would compute differently."""
    if hasattr(detector, "roi_head"):
        check_two_stages(detector)
    else:
        check_one_stage(detector)
    check_operators(detector)


def check_one_stage(detector):
    """Refuse the parts of a one-stage detector that an export would compute differently."""
    head = detector.bbox_head
    check_types(detector, {"bbox_head": (*ANCHOR_HEADS, *POINT_HEADS, *YOLO_HEADS, *WITHOUT_PRIORS)})
    if type(head).__name__ == "CenterNetHead":
        check_values(detector, {"test_cfg.local_maximum_kernel": 3})
        return
    if type(head).__name__ == "DETRHead":
        check_values(detector, {"bbox_head.loss_cls.use_sigmoid": False})
        if (detector.test_cfg.get("max_per_img") or 1) > head.num_query:
            raise SourceError(f"model.test_cfg.max_per_img is more than bbox_head.num_query: {head.num_query}")
        return
    if type(head).__name__ in ANCHOR_HEADS:
        check_types(detector, {
            "bbox_head.prior_generator": ("AnchorGenerator", "SSDAnchorGenerator"),
            "bbox_head.bbox_coder": ("DeltaXYWHBBoxCoder",),
        })  # fmt: skip
    elif type(head).__name__ in POINT_HEADS:
        describe_points_of_cells(detector)  # refuses what does not fit before the work begins
    if type(head).__name__ == "TOODHead":
        check_values(detector, {"bbox_head.anchor_type": "anchor_free"})
    if hasattr(head, "with_score_voting"):
        check_values(detector, {"bbox_head.with_score_voting": True})
    if type(head).__name__ not in YOLO_HEADS:
        check_values(detector, {"bbox_head.bbox_coder.clip_border": True})
        if (detector.test_cfg.get("nms_pre") or 0) <= 0 and type(head).__name__ != "PAAHead":
            raise SourceError("model.test_cfg needs an nms_pre above 0")
    if type(head).__name__ == "YOLOV3Head":
        check_values(detector, {"bbox_head.featmap_strides": [stride for stride, _ in head.prior_generator.strides]})
    key = "anchor_generator.strides" if hasattr(head.prior_generator, "base_anchors") else "strides"
    check_sides(f"bbox_head.{key}", head.prior_generator.strides)
    check_test_cfg("model.test_cfg", detector.test_cfg, soft=True, limited=type(head).__name__ != "YOLOXHead")


def check_padding(detector, preprocess):
    """Refuse padding of whole cells where the detector would mask them."""
    if type(box_head(detector)).__name__ != "DETRHead":
        return
    with torch.no_grad():
        features = detector.extract_feat(torch.zeros(1, 3, 256, 256))[-1]
    stride = 256 // features.shape[-1]
    if preprocess.pad_to_square or preprocess.pad_divisor > stride:
        raise SourceError(f"data.test.pipeline: this DETR cannot be exported with padding to more than multiples of "
                          f"{stride}, the stride of its backbone")  # fmt: skip


def check_two_stages(detector):
    """Refuse the parts of a two-stage detector that an export would compute differently."""
    check_types(detector, {
        "rpn_head": ("RPNHead",),
        "rpn_head.prior_generator": ("AnchorGenerator",),
        "roi_head": ("StandardRoIHead", "DynamicRoIHead", "PISARoIHead", "TridentRoIHead", "CascadeRoIHead",
                     "PointRendRoIHead"),
    })  # fmt: skip
    extractors = find_stages(detector, "roi_head.bbox_roi_extractor")
    heads = find_stages(detector, "roi_head.bbox_head")
    coders = [f"{name}.bbox_coder" for name in ("rpn_head", *heads)]
    if hasattr(detector.roi_head, "point_head"):
        check_point_rend(detector)
    elif detector.roi_head.with_mask:
        extractors += find_stages(detector, "roi_head.mask_roi_extractor")
        check_types(detector, dict.fromkeys(find_stages(detector, "roi_head.mask_head"), ("FCNMaskHead",)))
    layers = [f"{name}.roi_layers.0" for name in extractors]
    check_scores(detector, heads)
    bbox_heads = ("BBoxHead", "ConvFCBBoxHead", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead")
    for names, supported in (
        (extractors, ("SingleRoIExtractor",)),
        (layers, ("RoIAlign",)),
        (heads, bbox_heads),
        (coders, ("DeltaXYWHBBoxCoder",)),
    ):
        check_types(detector, dict.fromkeys(names, supported))
    check_values(detector, {
        "rpn_head.prior_generator.scale_major": True,
        "rpn_head.prior_generator.centers": None,
        **dict.fromkeys([f"{name}.pool_mode" for name in layers], "avg"),
        **dict.fromkeys([f"{name}.clip_border" for name in coders], True),
        **dict.fromkeys([f"{name}.add_ctr_clamp" for name in coders], False),
    })  # fmt: skip
    check_square(detector, extractors)
    check_stages(detector.roi_head)
    is_trident = type(detector.roi_head).__name__ == "TridentRoIHead"
    if is_trident and detector.roi_head.with_mask:
        raise SourceError("model.roi_head is a TridentRoIHead with masks, which MMDetection does not return")
    check_test_cfg("model.test_cfg.rpn", detector.test_cfg.rpn, soft=False)
    check_test_cfg("model.test_cfg.rcnn", detector.test_cfg.rcnn, soft=not is_trident)  # which runs its NMS twice


def check_scores(detector, heads):
    """Refuse box heads, given by their names, whose scores are no softmax, and which cannot be made such."""
    if len(heads) > 1:  # the scores of a cascade are those of the mean of its stages' logits
        check_values(detector, dict.fromkeys([f"{name}.custom_cls_channels" for name in heads], False))
    elif find_part(detector, f"{heads[0]}.custom_cls_channels"):
        check_types(detector, {f"{heads[0]}.loss_cls": ("SeesawLoss",)})
    if getattr(detector.roi_head, "test_branch_idx", 0) == -1:
        raise SourceError("model.roi_head.test_branch_idx is -1: several branches of TridentNet cannot be exported")


def check_point_rend(detector):
    """Refuse masks of PointRend whose features come from elsewhere than the centres of a level's cells."""
    extractor = "roi_head.mask_roi_extractor"
    check_types(detector, {
        extractor: ("GenericRoIExtractor",),
        f"{extractor}.roi_layers.0": ("SimpleRoIAlign",),
        "roi_head.mask_head": ("CoarseMaskHead",),
        "roi_head.point_head": ("MaskPointHead",),
    })  # fmt: skip
    check_values(detector, {
        f"{extractor}.num_inputs": 1,
        f"{extractor}.with_pre": False,
        f"{extractor}.with_post": False,
        f"{extractor}.roi_layers.0.aligned": True,
        "roi_head.mask_head.class_agnostic": False,
        "roi_head.point_head.class_agnostic": False,
    })  # fmt: skip


def check_types(detector, types):
    """Refuse parts that are of another class: {name: the classes that are known}."""
    for name, supported in types.items():
        found = type(find_part(detector, name)).__name__
        if found not in supported:
            raise SourceError(f"model.{name} is a {found}, which cannot be exported; supported: {', '.join(supported)}")


def check_values(detector, values):
    """Refuse attributes that have another value: {name: value}."""
    for name, supported in values.items():
        found = find_part(detector, name)
        if found != supported:
            raise SourceError(f"model.{name} is {found!r}, which cannot be exported; supported: {supported!r}")


def find_stages(detector, name):
    """Return the name of a part, or the names of those that it has for each stage of a cascade."""
    part = find_part(detector, name)
    return [f"{name}.{stage}" for stage in range(len(part))] if isinstance(part, torch.nn.ModuleList) else [name]


def find_part(detector, name):
    """Return the attribute that a dotted name leads to, None where there is none; a number is a place in a list."""
    part = detector
    for key in name.split("."):
        part = part[int(key)] if key.isdigit() else getattr(part, key, None)
    return part


def check_operators(detector):
    """Refuse layers of the networks that are compiled operators of mmcv's own, unless ONNX has them, too."""
    for name, layer in detector.named_modules():
        if isinstance(layer, (mmcv.ops.DeformConv2d, mmcv.ops.ModulatedDeformConv2d)):
            continue
        files = [sys.modules[base.__module__] for base in type(layer).__mro__]
        compiled = any(hasattr(file, "ext_module") for file in files) or isinstance(layer, mmcv.ops.SAConv2d)
        if compiled and "roi_layers" not in name:
            raise SourceError(
                f"model.{name} is mmcv's operator {type(layer).__name__}, for which ONNX has no standard operator"
            )


def check_square(detector, extractors):
    """Refuse strides and RoIAlign outputs whose width and height differ; extractors: the names of those that pool."""
    check_sides("rpn_head.anchor_generator.strides", detector.rpn_head.prior_generator.strides)
    for name in extractors:
        sizes = [layer.output_size for layer in find_part(detector, name).roi_layers]
        check_sides(f"{name}.roi_layer.output_size", sizes)


def check_sides(name, sizes):
    """Refuse sizes (width, height) of which one is not that of a square."""
    if any(first != second for first, second in sizes):
        raise SourceError(f"model.{name} is {sizes}, whose sides differ: this cannot be exported")


def check_stages(roi_head):
    """Refuse a cascade whose stages pool their RoIs in different ways."""
    kinds = {"bbox_roi_extractor": roi_head.bbox_roi_extractor}
    if roi_head.with_mask:
        kinds["mask_roi_extractor"] = roi_head.mask_roi_extractor
        kinds["mask_head"] = roi_head.mask_head
    for name, part in kinds.items():
        describe_part = describe_rois if name.endswith("extractor") else lambda head: head.class_agnostic
        if any(describe_part(other) != describe_part(stages(part)[0]) for other in stages(part)):
            raise SourceError(f"model.roi_head.{name} differs from stage to stage: this cannot be exported")


def check_test_cfg(name, cfg, soft, limited=True):
    """Refuse an NMS with options that are not known here, and a missing threshold or limit.

    soft: it may be Soft-NMS, or one over all classes together. limited: there has to be a limit.
    """
    known = {"type": ("nms",), "iou_threshold": None, "split_thr": None}  # None: any value
    if soft:
        known.update(type=("nms", "soft_nms"), class_agnostic=(True, False), min_score=None, method=("linear",))
    if cfg.nms.get("type") == "soft_nms" or cfg.nms.get("class_agnostic"):
        known["split_thr"] = (NMS_SPLIT,)
    for option, value in cfg.nms.items():
        if option not in known or value is None or (known[option] is not None and value not in known[option]):
            raise SourceError(f"{name}.nms has {option}={value!r}, which cannot be exported")
    if "iou_threshold" not in cfg.nms or (limited and (cfg.get("max_per_img") or 0) <= 0):
        raise SourceError(f"{name} needs nms.iou_threshold, and a max_per_img above 0")


# ---------------------------------------------------------------------- what the networks cannot know


def describe(detector, origin):
    """Return the settings of a detector; SettingsError if one of them has a value that does not fit."""
    if hasattr(detector, "roi_head"):
        family, parts = describe_two_stages(detector)
    elif type(detector.bbox_head).__name__ in YOLO_HEADS:
        family, parts = describe_yolo(detector)
    elif type(detector.bbox_head).__name__ == "DETRHead":
        limit = detector.test_cfg.get("max_per_img") or detector.bbox_head.num_query
        family, parts = DETRSettings, {"head": Queries(max_per_img=limit)}
    elif type(detector.bbox_head).__name__ == "CenterNetHead":
        family, parts = CenterNetSettings, {"head": Queries(max_per_img=detector.test_cfg.topk)}
    else:
        family, parts = describe_one_stage(detector)
    preprocess = describe_preprocessing(detector.cfg)
    settings = family(source=origin, classes=detector.CLASSES, preprocess=preprocess, **parts)
    return read(write(settings), family)


def describe_two_stages(detector):
    """Return the class of the settings of a two-stage detector, and what it adds to those of every export."""
    roi_head, cfg = detector.roi_head, detector.test_cfg.rcnn
    *earlier, last = stages(roi_head.bbox_head)
    added = {}
    if earlier:
        added["refinements"] = [Refinement(**describe_coder(head)) for head in earlier]
    if roi_head.with_mask:
        added["masks"] = describe_masks(roi_head, cfg)
    if hasattr(roi_head, "point_head"):
        added["points"] = describe_points(roi_head, cfg)
    parts = {
        "proposals": describe_proposals(detector.rpn_head, detector.test_cfg.rpn),
        "rois": describe_rois(stages(roi_head.bbox_roi_extractor)[0]),
        "head": describe_head(last, cfg),
    }
    return FAMILIES[tuple(added)], {**parts, **added}


def describe_proposals(rpn, cfg):
    """Return the settings of a region proposal network."""
    generator = rpn.prior_generator
    anchors = Anchors(
        strides=[stride[0] for stride in generator.strides],
        base_sizes=generator.base_sizes,
        scales=generator.scales.tolist(),
        ratios=generator.ratios.tolist(),
        center_offset=generator.center_offset,
    )
    return Proposals(
        anchors=anchors,
        softmax=not rpn.use_sigmoid_cls,
        means=rpn.bbox_coder.means,
        stds=rpn.bbox_coder.stds,
        nms_pre=cfg.nms_pre,
        min_bbox_size=cfg.min_bbox_size,
        iou_threshold=cfg.nms.iou_threshold,
        max_per_img=cfg.max_per_img,
    )


def describe_rois(extractor):
    """Return the settings of a RoI extractor."""
    layer = extractor.roi_layers[0]
    return RoIs(
        strides=extractor.featmap_strides,
        finest_scale=getattr(extractor, "finest_scale", 56),  # PointRend reads one level, at the centre of each bin
        output_size=layer.output_size[0],
        sampling_ratio=getattr(layer, "sampling_ratio", 1),
        aligned=layer.aligned,
    )


def describe_head(head, cfg):
    """Return the settings of a RoI head."""
    return Head(**describe_coder(head), **describe_nms(cfg))


def describe_nms(cfg):
    """Return the settings that say which boxes of a head are kept."""
    default = inspect.signature(mmcv.ops.soft_nms).parameters["min_score"].default
    return {
        "score_threshold": cfg.score_thr,
        "iou_threshold": cfg.nms.iou_threshold,
        "nms_class_agnostic": cfg.nms.get("class_agnostic", False),
        "soft_min_score": cfg.nms.get("min_score", default) if cfg.nms.get("type") == "soft_nms" else None,
        "max_per_img": cfg.get("max_per_img"),
    }


def describe_coder(head):
    """Return the settings that say what a RoI head's deltas mean."""
    coder = head.bbox_coder
    return {"means": coder.means, "stds": coder.stds, "class_agnostic": head.reg_class_agnostic}


def describe_masks(roi_head, cfg):
    """Return the settings of a RoI head's masks."""
    if cfg.mask_thr_binary < 0:
        raise SourceError(f"model.test_cfg.rcnn.mask_thr_binary is {cfg.mask_thr_binary}: this cannot be exported")
    return Masks(
        rois=describe_rois(stages(roi_head.mask_roi_extractor)[0]),
        class_agnostic=stages(roi_head.mask_head)[0].class_agnostic,
        threshold=cfg.mask_thr_binary,
    )


def describe_points(roi_head, cfg):
    """Return the settings of PointRend's subdivision."""
    if cfg.scale_factor != 2:
        raise SourceError(f"model.test_cfg.rcnn.scale_factor is {cfg.scale_factor}: only 2 can be exported")
    return Points(steps=cfg.subdivision_steps, num_points=cfg.subdivision_num_points)


def describe_one_stage(detector):
    """Return the class of the settings of a one-stage detector, and what it adds to those of every export."""
    head = detector.bbox_head
    dense = Dense(
        **describe_nms(detector.test_cfg),
        nms_pre=detector.test_cfg.get("nms_pre", -1),
        softmax=head.cls_out_channels > head.num_classes,
        factor=FURTHER_MAPS.get(type(head).__name__, ("",))[0],
        combined="root" if type(head).__name__ in ("PAAHead", "TOODHead") else "last",
    )
    if type(head).__name__ in POINT_HEADS:
        return TOODSettings if type(head).__name__ == "TOODHead" else FCOSSettings, {
            "points": describe_points_of_cells(detector),
            "head": dense,
        }
    generator, coder = head.prior_generator, head.bbox_coder
    anchors = CellAnchors(
        strides=[stride[0] for stride in generator.strides],
        boxes=[boxes.tolist() for boxes in generator.base_anchors],
    )
    clamped = coder.add_ctr_clamp
    deltas = Coder(means=coder.means, stds=coder.stds, shrinks_freely=clamped)
    return PAASettings if hasattr(head, "with_score_voting") else RetinaNetSettings, {
        "anchors": anchors,
        "deltas": deltas,
        "max_shift": coder.ctr_clamp if clamped else None,
        "head": dense,
    }


def describe_yolo(detector):
    """Return the class of the settings of YOLOv3 or YOLOX, and what it adds to those of every export."""
    head, cfg = detector.bbox_head, detector.test_cfg
    generator, has_anchors = head.prior_generator, hasattr(head.prior_generator, "base_anchors")
    strides = [stride for stride, _ in generator.strides]
    boxes = [[[-stride / 2, -stride / 2, stride / 2, stride / 2]] for stride in strides]
    if has_anchors:
        boxes = [level.tolist() for level in generator.base_anchors]
    dense = {"nms_pre": -1, "factor": "objectness", **describe_nms(cfg)}
    if has_anchors:
        dense["factor_threshold"] = just_below(cfg.conf_thr) if cfg.get("conf_thr", -1) > 0 else -1
    else:
        dense.update(one_class=True, combined="product", score_threshold=just_below(cfg.score_thr), max_per_img=None)
    order = slice(None, None, -1 if has_anchors else 1)  # the finest first
    anchors = CellAnchors(strides=strides[order], boxes=boxes[order])
    return YOLOSettings, {"anchors": anchors, "within_cell": has_anchors, "head": Dense(**dense)}


def just_below(limit):
    """Return the float32 before a limit: what is above it is what is not below the limit."""
    return float(np.nextafter(np.float32(limit), np.float32(-np.inf)))


def describe_points_of_cells(detector):
    """Return the settings of a detector whose head predicts distances."""
    head, generator = detector.bbox_head, detector.bbox_head.prior_generator
    kind = type(head).__name__
    if hasattr(generator, "base_anchors"):  # a point is the centre of a cell's anchors
        check_values(detector, {
            "bbox_head.prior_generator.center_offset": 0, "bbox_head.prior_generator.centers": None,
        })  # fmt: skip
    strides = [stride for stride, _ in generator.strides]
    units, exponential = {
        "FCOSHead": lambda: (strides, False) if head.norm_on_bbox else ([1] * len(strides), True),
        "FoveaHead": lambda: (head.base_edge_list, True),
        "FSAFHead": lambda: ([describe_square(*level, head.bbox_coder) for level in generator.base_anchors], False),
    }.get(kind, lambda: (strides, False))()
    return CellPoints(
        strides=strides,
        offset=getattr(generator, "offset", 0),
        units=units,
        exponential=exponential,
        bins=head.reg_max + 1 if kind == "GFLHead" else 0,
        last_pixel=kind == "FoveaHead",
    )


def describe_square(anchor, coder):
    """Return the unit of FSAF's distances: a multiple of the side of a cell's anchor, which has to be a square."""
    x1, y1, x2, y2 = anchor.tolist()
    if x2 - x1 != y2 - y1 or not isinstance(coder.normalizer, float):
        raise SourceError("model.bbox_head: anchors that are no squares, or several normalizers, cannot be exported")
    return (x2 - x1) * coder.normalizer


def describe_preprocessing(cfg):
    """Return the settings of a test pipeline; refuse any step, option or order that is not known here."""
    if len(cfg.data.test.pipeline) != 2:
        raise SourceError("data.test.pipeline is not LoadImageFromFile and MultiScaleFlipAug")
    load, augmentation = cfg.data.test.pipeline
    # CenterNet's pictures keep their size; they are read as float32, which then makes no difference.
    scaled = augmentation.get("img_scale") is not None
    check_step(load, "LoadImageFromFile", {"to_float32": not scaled, "color_type": "color", "channel_order": "bgr",
                                           "file_client_args": {"backend": "disk"}})  # fmt: skip
    check_step(augmentation, "MultiScaleFlipAug",
               {"img_scale": None, "scale_factor": 1.0, "transforms": None, "flip": False,
                "flip_direction": None})  # fmt: skip
    steps = resize_to_collect(augmentation.transforms)
    scale = augmentation.get("img_scale")
    if isinstance(scale, list) and len(scale) == 1:
        scale = scale[0]
    is_size = isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(side, int) for side in scale)
    if scaled and not is_size:
        raise SourceError(f"data.test.pipeline: img_scale is {scale!r}, not one (long side, short side)")
    if scaled == ("RandomCenterCropPad" in steps) or scaled == ("scale_factor" in augmentation):
        raise SourceError("data.test.pipeline: RandomCenterCropPad and scale_factor go together, without img_scale")
    if not scaled and not (load.get("to_float32") and steps["RandomCenterCropPad"].get("test_pad_add_pix") == 1):
        raise SourceError(
            "data.test.pipeline: RandomCenterCropPad needs test_pad_add_pix=1, and to_float32=True before it"
        )
    normalize = steps.get("Normalize", {"mean": [0] * 3, "std": [1] * 3, "to_rgb": False})
    return Preprocess(
        scale=scale,
        keep_ratio=steps["Resize"].get("keep_ratio", True),
        mean=normalize["mean"],
        std=normalize["std"],
        to_rgb=normalize.get("to_rgb", True),
        **describe_padding(steps.get("Pad", {})),
        canvas=0 if scaled else steps["RandomCenterCropPad"]["test_pad_mode"][1],
    )


def describe_padding(pad):
    """Return the settings of a step of a test pipeline that pads, {} if there is none."""
    value = pad.get("pad_val", 0)
    value = value.get("img", 0) if isinstance(value, dict) else value
    # A single number other than zero would pad the first channel only, as OpenCV does.
    values = set(value) if isinstance(value, (list, tuple)) and len(value) == 3 else {value, 0}
    if len(values) > 1 or pad.get("size"):
        raise SourceError(f"data.test.pipeline: {pad} cannot be exported: its pad_val needs three equal numbers")
    return {
        "pad_divisor": 1 if pad.get("size_divisor") is None else pad["size_divisor"],
        "pad_to_square": pad.get("pad_to_square", False),
        "pad_value": values.pop(),
    }


def check_pipeline(cfg):
    """Refuse a test pipeline that MMDetection itself refuses, which would only be seen after the export."""
    try:
        Compose(replace_ImageToTensor(copy.deepcopy(cfg.data.test.pipeline)))
    except Exception as error:  # many of them are AssertionErrors
        raise SourceError(f"data.test.pipeline: MMDetection cannot build it: {one_line(error)}") from error


def check_step(step, name, known):
    """Refuse a step of the test pipeline with another name, or an option that is not known to have this value.

    known: {option: value}; None stands for any value.
    """
    if step.get("type") != name:
        raise SourceError(f"data.test.pipeline: found {step.get('type')} where only {name} can be exported")
    for option, value in step.items():
        value = list(value) if isinstance(value, tuple) else value
        if option != "type" and (option not in known or (known[option] is not None and value != known[option])):
            raise SourceError(f"data.test.pipeline: {name}({option}={value!r}) cannot be exported")


def resize_to_collect(transforms):
    """Return the steps that follow reading, by their names; refuse another step, option or order."""
    known = {
        "Resize": {"keep_ratio": None},
        "RandomCenterCropPad": {
            "ratios": None, "border": None, "mean": [0, 0, 0], "std": [1, 1, 1], "to_rgb": None, "test_mode": True,
            "test_pad_mode": ["logical_or", 31], "test_pad_add_pix": 1,
        },
        "RandomFlip": {"flip_ratio": None, "direction": None},  # does nothing without flip=True around it
        "Normalize": {"mean": None, "std": None, "to_rgb": None},
        "Pad": {"size_divisor": None, "pad_to_square": None, "pad_val": None},
        "ImageToTensor": {"keys": None},
        "DefaultFormatBundle": {},
        "Collect": {"keys": None, "meta_keys": None},
    }  # fmt: skip
    order = [step.get("type") for step in transforms]
    foreign = [name for name in order if name not in known]
    if foreign:
        raise SourceError(f"data.test.pipeline: {foreign[0]} cannot be exported")
    for name, step in zip(order, transforms):
        check_step(step, name, known[name])
    makes_floats = {"Normalize", "DefaultFormatBundle"} & set(order)
    if order != [name for name in known if name in order] or "Resize" not in order or not makes_floats:
        raise SourceError(f"data.test.pipeline: {order} is not MMDetection's order of resizing, normalising, padding")
    return dict(zip(order, transforms))


# ---------------------------------------------------------------------- the reference


def reference(detector, picture, score_threshold=None):
    """Return the Detections of MMDetection's inference_detector, which reads the picture itself."""
    test_cfg = (detector.roi_head if hasattr(detector, "roi_head") else detector.bbox_head).test_cfg
    own = test_cfg.get("score_thr")
    if score_threshold is not None and own is not None:
        test_cfg.score_thr = score_threshold
    try:
        found = inference_detector(detector, str(picture))
    except Exception as error:  # of any kind
        raise SourceError(f"MMDetection fails with {picture}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        if own is not None:
            test_cfg.score_thr = own
    per_class, masks = found if isinstance(found, tuple) else (found, None)
    boxes = np.concatenate(per_class)
    labels = np.repeat(np.arange(len(per_class)), [len(found) for found in per_class])
    if masks is not None:
        masks = np.array([rle.encode(mask, mask.shape) for of_class in masks for mask in of_class], object)
    return Detections(boxes[:, :4], boxes[:, 4], labels, masks)
