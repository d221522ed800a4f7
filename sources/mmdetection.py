"""MMDetection 2.28: its Faster R-CNN as the two networks and the settings of an export.

What would be computed differently is refused by its name in the config.
"""

import hashlib
import inspect
import sys
from pathlib import Path

import mmcv
import mmcv.ops
import mmdet
import numpy as np
import torch
from mmcv.cnn.utils import revert_sync_batchnorm
from mmdet.apis import inference_detector
from mmdet.datasets import DATASETS
from mmdet.models import build_detector
from mmdet.models.backbones.swin import ShiftWindowMSA

from detectors import Detections, one_line
from detectors.settings import (
    Anchors,
    FasterRCNNSettings,
    Head,
    Preprocess,
    Proposals,
    RoIs,
    SettingsError,
    read,
    write,
)
from postprocess import NMS_SPLIT
from sources import Network, Source, SourceError
from sources.checkpoints import fetch, load_checkpoint, load_weights, weights_in
from sources.layers import GroupNorm, replace_layers

DEFAULT_CONFIG = "faster_rcnn_r50_fpn_1x_coco"
DEFAULT_CHECKPOINT = "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth"
CHECKPOINT_URL = f"https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/{DEFAULT_CONFIG}/{DEFAULT_CHECKPOINT}"
CKPT = Path(__file__).resolve().parents[1] / "ckpt"


def load(config, checkpoint, trust=False, names=None, options=()):
    """Return the Source of a config's detector with a checkpoint's weights; without both, of the default.

    names: of the classes, instead of the checkpoint's. There are no options: the config says everything.
    """
    if options:
        raise SourceError(f"--set {options[0][0]}: for torchvision only; MMDetection's settings are in the config")
    if config and checkpoint is None:
        raise SourceError(f"{config}: its checkpoint is missing: CONFIG and CHECKPOINT go together")
    path = find_config(config or DEFAULT_CONFIG)
    if checkpoint is None:
        checkpoint = CKPT / DEFAULT_CHECKPOINT
        fetch(CHECKPOINT_URL, checkpoint)
    return as_source(load_detector(path, checkpoint, trust, names), path, checkpoint)


def as_source(detector, config, checkpoint):
    """Return the Source of a detector that load_detector returned."""
    origin = {
        "config": Path(config).name,
        "checkpoint": Path(checkpoint).name,
        "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "versions": {module.__name__: str(module.__version__) for module in (mmdet, mmcv, torch)},
    }

    def detect(picture, score_threshold=None):
        return reference(detector, picture, score_threshold)

    return Source(networks(detector), describe(detector, origin), detect)


# ---------------------------------------------------------------------- the two networks


class Model1(torch.nn.Module):
    """image [N, 3, H, W] -> objectness logits, deltas and features of every level, the finest first."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector
        self.eval()  # a new module is in training mode, and the exporter would put the detector back into it

    def forward(self, image):
        """Return cls_0.., reg_0.., feat_0.. as one tuple."""
        features = self.detector.extract_feat(image)
        cls, reg = self.detector.rpn_head(features)
        return (*cls, *reg, *features)


class Model2(torch.nn.Module):
    """roi_feats [B, C, s, s] -> class logits [B, classes + 1], deltas [B, 4 classes]."""

    def __init__(self, detector):
        super().__init__()
        roi_head = detector.roi_head
        self.shared_head = roi_head.shared_head if roi_head.with_shared_head else torch.nn.Identity()
        self.bbox_head = roi_head.bbox_head
        self.eval()

    def forward(self, roi_feats):
        """Return cls and reg."""
        return self.bbox_head(self.shared_head(roi_feats))


def networks(detector):
    """Return the two networks by the names of their files."""
    extractor = detector.roi_head.bbox_roi_extractor
    levels = range(len(detector.rpn_head.prior_generator.strides))
    maps = {f"{kind}_{i}": {0: "N", 2: f"H_{i}", 3: f"W_{i}"} for kind in ("cls", "reg", "feat") for i in levels}
    image = torch.randn(1, 3, 256, 320)
    roi_feats = torch.randn(2, extractor.out_channels, *extractor.roi_layers[0].output_size)
    return {
        "model1.onnx": Network(Model1(detector), image, {"image": {0: "N", 2: "H", 3: "W"}}, maps),
        "model2.onnx": Network(
            Model2(detector), roi_feats, {"roi_feats": {0: "B"}}, {"cls": {0: "B"}, "reg": {0: "B"}}
        ),
    }


class WindowAttention(ShiftWindowMSA):
    """Swin Transformer's attention; MMDetection's own makes the batch size a constant of the exported graph."""

    def window_reverse(self, windows, height, width):
        """Lay the windows [n, s, s, C] side by side: [N, height, width, C]; when not exported, as MMDetection does."""
        if not torch.onnx.is_in_onnx_export():
            return super().window_reverse(windows, height, width)
        size, channels = self.window_size, windows.shape[-1]
        grid = windows.view(-1, height // size, width // size, size, size, channels)
        return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


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


def load_detector(config, checkpoint_path, trust=False, names=None):
    """Return MMDetection's detector with its weights, in evaluation mode; model.cfg is its config."""
    try:
        cfg = mmcv.Config.fromfile(str(config))
    except (Exception, SystemExit) as error:  # a config is Python: anything can be wrong with it
        raise SourceError(f"{config} cannot be read: {one_line(error) or type(error).__name__}") from error
    model = cfg.get("model") or {}
    if not isinstance(model, dict) or model.get("type") != "FasterRCNN":
        found = model.get("type") if isinstance(model, dict) else model
        raise SourceError(f"{config}: model.type is {found}, not FasterRCNN")
    try:
        cfg.model.pretrained = None
        if "init_cfg" in cfg.model.backbone:
            cfg.model.backbone.init_cfg = None
        cfg.model.train_cfg = None
        detector = revert_sync_batchnorm(build_detector(cfg.model, test_cfg=cfg.get("test_cfg"))).eval()
    except Exception as error:
        raise SourceError(f"{config}: MMDetection cannot build its model: {one_line(error)}") from error
    try:
        check_supported(detector)
        describe_preprocessing(cfg)  # refuses what does not fit before the work begins
        checkpoint = load_checkpoint(checkpoint_path, trust)
        load_weights(detector, weights_in(checkpoint), checkpoint_path)
        detector.CLASSES = class_names(cfg, checkpoint, detector.roi_head.bbox_head.num_classes, names)
        detector.cfg = cfg
        describe(detector, {})
    except (AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{config} lacks what export.py needs: {one_line(error)}") from error
    except SettingsError as error:
        raise SourceError(f"{config} or its checkpoint cannot be exported: {error}") from error
    replace_layers(detector, {torch.nn.GroupNorm: GroupNorm, ShiftWindowMSA: WindowAttention})
    return detector


# ---------------------------------------------------------------------- what cannot be exported


def check_supported(detector):
    """Refuse, by its name in the config, every part that an export would compute differently."""
    bbox_heads = ("BBoxHead", "ConvFCBBoxHead", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead")
    types = {
        "rpn_head": ("RPNHead",),
        "rpn_head.prior_generator": ("AnchorGenerator",),
        "rpn_head.bbox_coder": ("DeltaXYWHBBoxCoder",),
        "roi_head": ("StandardRoIHead", "DynamicRoIHead", "PISARoIHead"),  # they differ only in training
        "roi_head.bbox_roi_extractor": ("SingleRoIExtractor",),
        "roi_head.bbox_roi_extractor.roi_layers.0": ("RoIAlign",),
        "roi_head.bbox_head": bbox_heads,
        "roi_head.bbox_head.bbox_coder": ("DeltaXYWHBBoxCoder",),
    }
    for name, supported in types.items():
        found = type(find_part(detector, name)).__name__
        if found not in supported:
            raise SourceError(f"model.{name} is a {found}, which cannot be exported; supported: {', '.join(supported)}")
    values = {
        "rpn_head.prior_generator.scale_major": True,
        "rpn_head.prior_generator.centers": None,
        "rpn_head.bbox_coder.clip_border": True,
        "rpn_head.bbox_coder.add_ctr_clamp": False,
        "roi_head.with_mask": False,
        "roi_head.bbox_roi_extractor.roi_layers.0.pool_mode": "avg",
        "roi_head.bbox_head.custom_cls_channels": False,
        "roi_head.bbox_head.bbox_coder.clip_border": True,
        "roi_head.bbox_head.bbox_coder.add_ctr_clamp": False,
    }
    for name, supported in values.items():
        found = find_part(detector, name)
        if found != supported:
            raise SourceError(f"model.{name} is {found!r}, which cannot be exported; supported: {supported!r}")
    check_operators(detector)
    check_square(detector)
    for name in ("rpn", "rcnn"):
        check_test_cfg(name, detector.test_cfg[name])


def find_part(detector, name):
    """Return the attribute that a dotted name leads to, None where there is none; a number is a place in a list."""
    part = detector
    for key in name.split("."):
        part = part[int(key)] if key.isdigit() else getattr(part, key, None)
    return part


def check_operators(detector):
    """Refuse layers of the networks that are compiled operators of mmcv's own, such as deformable convolution."""
    for name, layer in detector.named_modules():
        files = [sys.modules[base.__module__] for base in type(layer).__mro__]
        if any(hasattr(file, "ext_module") for file in files) and "roi_layers" not in name:
            raise SourceError(
                f"model.{name} is mmcv's operator {type(layer).__name__}, for which ONNX has no standard operator"
            )


def check_square(detector):
    """Refuse strides and RoIAlign outputs whose width and height differ."""
    pairs = {"rpn_head.anchor_generator.strides": detector.rpn_head.prior_generator.strides}
    pairs["roi_head.bbox_roi_extractor.roi_layer.output_size"] = [
        layer.output_size for layer in detector.roi_head.bbox_roi_extractor.roi_layers
    ]
    for name, sizes in pairs.items():
        if any(first != second for first, second in sizes):
            raise SourceError(f"model.{name} is {sizes}, whose sides differ: this cannot be exported")


def check_test_cfg(name, cfg):
    """Refuse an NMS with options that are not known here, and a missing threshold or limit."""
    known = {"type": ("nms",), "iou_threshold": None, "split_thr": None}  # None: any value
    if name == "rcnn":
        known.update(type=("nms", "soft_nms"), class_agnostic=(True, False), min_score=None, method=("linear",))
    if cfg.nms.get("type") == "soft_nms" or cfg.nms.get("class_agnostic"):
        known["split_thr"] = (NMS_SPLIT,)
    for option, value in cfg.nms.items():
        if option not in known or value is None or (known[option] is not None and value not in known[option]):
            raise SourceError(f"model.test_cfg.{name}.nms has {option}={value!r}, which cannot be exported")
    if "iou_threshold" not in cfg.nms or cfg.max_per_img <= 0:
        raise SourceError(f"model.test_cfg.{name} needs nms.iou_threshold, and a max_per_img above 0")


# ---------------------------------------------------------------------- what the networks cannot know


def describe(detector, origin):
    """Return the settings of a detector; SettingsError if one of them has a value that does not fit."""
    settings = FasterRCNNSettings(
        source=origin,
        classes=detector.CLASSES,
        preprocess=describe_preprocessing(detector.cfg),
        proposals=describe_proposals(detector.rpn_head, detector.test_cfg.rpn),
        rois=describe_rois(detector.roi_head.bbox_roi_extractor),
        head=describe_head(detector.roi_head.bbox_head, detector.test_cfg.rcnn),
    )
    return read(write(settings), FasterRCNNSettings)


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
        finest_scale=extractor.finest_scale,
        output_size=layer.output_size[0],
        sampling_ratio=layer.sampling_ratio,
        aligned=layer.aligned,
    )


def describe_head(head, cfg):
    """Return the settings of a RoI head."""
    default = inspect.signature(mmcv.ops.soft_nms).parameters["min_score"].default
    return Head(
        means=head.bbox_coder.means,
        stds=head.bbox_coder.stds,
        class_agnostic=head.reg_class_agnostic,
        score_threshold=cfg.score_thr,
        iou_threshold=cfg.nms.iou_threshold,
        nms_class_agnostic=cfg.nms.get("class_agnostic", False),
        soft_min_score=cfg.nms.get("min_score", default) if cfg.nms.get("type") == "soft_nms" else None,
        max_per_img=cfg.max_per_img,
    )


def describe_preprocessing(cfg):
    """Return the settings of a test pipeline; refuse any step, option or order that is not known here."""
    if len(cfg.data.test.pipeline) != 2:
        raise SourceError("data.test.pipeline is not LoadImageFromFile and MultiScaleFlipAug")
    load, augmentation = cfg.data.test.pipeline
    check_step(load, "LoadImageFromFile", {"to_float32": False, "color_type": "color", "channel_order": "bgr",
                                           "file_client_args": {"backend": "disk"}})  # fmt: skip
    check_step(augmentation, "MultiScaleFlipAug",
               {"img_scale": None, "transforms": None, "flip": False, "flip_direction": None})  # fmt: skip
    steps = resize_to_collect(augmentation.transforms)
    scale = augmentation.get("img_scale")
    if isinstance(scale, list) and len(scale) == 1:
        scale = scale[0]
    if not (isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(side, int) for side in scale)):
        raise SourceError(f"data.test.pipeline: img_scale is {scale!r}, not one (long side, short side)")
    return Preprocess(
        scale=scale,
        keep_ratio=steps["Resize"].get("keep_ratio", True),
        mean=steps["Normalize"].mean,
        std=steps["Normalize"].std,
        to_rgb=steps["Normalize"].get("to_rgb", True),
        pad_divisor=steps["Pad"].size_divisor if "Pad" in steps else 1,
    )


def check_step(step, name, known):
    """Refuse a step of the test pipeline with another name, or an option that is not known to have this value.

    known: {option: value}; None stands for any value.
    """
    if step.get("type") != name:
        raise SourceError(f"data.test.pipeline: found {step.get('type')} where only {name} can be exported")
    for option, value in step.items():
        if option != "type" and (option not in known or (known[option] is not None and value != known[option])):
            raise SourceError(f"data.test.pipeline: {name}({option}={value!r}) cannot be exported")


def resize_to_collect(transforms):
    """Return the steps that follow reading, by their names; refuse another step, option or order."""
    known = {
        "Resize": {"keep_ratio": None},
        "RandomFlip": {"flip_ratio": None, "direction": None},  # does nothing without flip=True around it
        "Normalize": {"mean": None, "std": None, "to_rgb": None},
        "Pad": {"size_divisor": None},
        "ImageToTensor": {"keys": None},
        "DefaultFormatBundle": {},
        "Collect": {"keys": None, "meta_keys": None},
    }
    order = [step.get("type") for step in transforms]
    foreign = [name for name in order if name not in known]
    if foreign:
        raise SourceError(f"data.test.pipeline: {foreign[0]} cannot be exported")
    for name, step in zip(order, transforms):
        check_step(step, name, known[name])
    if order != [name for name in known if name in order] or not {"Resize", "Normalize"} <= set(order):
        raise SourceError(f"data.test.pipeline: {order} is not MMDetection's order of resizing, normalising, padding")
    return dict(zip(order, transforms))


# ---------------------------------------------------------------------- the reference


def reference(detector, picture, score_threshold=None):
    """Return the Detections of MMDetection's inference_detector, which reads the picture itself."""
    test_cfg = detector.roi_head.test_cfg
    own, test_cfg.score_thr = test_cfg.score_thr, test_cfg.score_thr if score_threshold is None else score_threshold
    try:
        per_class = inference_detector(detector, str(picture))
    finally:
        test_cfg.score_thr = own
    boxes = np.concatenate(per_class)
    labels = np.repeat(np.arange(len(per_class)), [len(found) for found in per_class])
    return Detections(boxes[:, :4], boxes[:, 4], labels)
