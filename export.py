"""Split MMDetection's Faster R-CNN into model1.onnx and model2.onnx, and prove that nothing was lost.

python export.py                        Faster R-CNN R50-FPN 1x COCO, downloaded into ckpt/ if it is not there
python export.py CONFIG CHECKPOINT      your own; CONFIG is a file, or the name of a config MMDetection ships

model1 is backbone, neck and RPN head; model2 is the RoI head. Both run in PyTorch and in ONNX Runtime, every
output is compared (True below 1e-4), then the detections of the whole pipeline in a picture. Only when all is
True are the files moved to --out. Exit status: 0 all True, 1 something differs, 2 nothing could be exported, 130
interrupted. A CONFIG is Python and is run.
"""

import argparse
import contextlib
import hashlib
import inspect
import json
import logging
import os
import pickle
import socket
import sys
import tempfile
import warnings
from http.client import HTTPException
from pathlib import Path
from unittest import mock

warnings.filterwarnings("ignore")  # of mmcv's future and of tracing: the verification says what matters
logging.disable(logging.WARNING)  # of CUDA that is not there, of pretrained weights that are not needed

import mmcv  # noqa: E402
import mmcv.ops  # noqa: E402
import mmdet  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from mmcv.cnn.utils import revert_sync_batchnorm  # noqa: E402
from mmdet.apis import inference_detector  # noqa: E402
from mmdet.datasets import DATASETS  # noqa: E402
from mmdet.models import build_detector  # noqa: E402
from mmdet.models.backbones.swin import ShiftWindowMSA  # noqa: E402

import demo  # noqa: E402

HERE = Path(__file__).resolve().parent
DEFAULT_CONFIG = "faster_rcnn_r50_fpn_1x_coco"
DEFAULT_CHECKPOINT = "faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth"
CHECKPOINT_URL = f"https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/{DEFAULT_CONFIG}/{DEFAULT_CHECKPOINT}"
STALL = 60  # seconds without a byte after which the download is given up
OUTPUT_TOLERANCE, BOX_TOLERANCE, SCORE_TOLERANCE = 1e-4, 1e-2, 1e-4  # boxes in pixels


class ExportError(Exception):
    """Nothing can be exported; the message says why and what to do."""


class Model1(torch.nn.Module):
    """image [N, 3, H, W] -> objectness logits, deltas and features of every level, the finest first."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector
        self.eval()  # a module is born training, and the exporter would put the detector back into it

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


def find_config(name):
    """Return the path of a config: a file, or the name of one inside MMDetection's wheel."""
    if Path(name).is_file():
        return Path(name)
    shipped = Path(mmdet.__file__).parent / ".mim" / "configs"
    found = [path for path in sorted(shipped.rglob("*.py")) if name in (path.stem, path.name)]
    if not found:
        raise ExportError(f"{name}: no such file, and MMDetection ships no config of this name")
    return found[0]


def fetch_default_checkpoint():
    """Return the path of the default checkpoint in ckpt/, downloaded if it is not there."""
    path = HERE / "ckpt" / DEFAULT_CHECKPOINT
    if path.exists():
        return path
    print(f"downloading {CHECKPOINT_URL}")
    hash_prefix = path.stem.rsplit("-", 1)[1]
    socket.setdefaulttimeout(STALL)  # torch.hub sets none, and would wait forever
    try:
        torch.hub.download_url_to_file(CHECKPOINT_URL, str(path), hash_prefix)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network or disk; a wrong hash; no HTTP
        raise ExportError(
            f"the download failed ({demo.first_line(error)}): "
            f"try again, or get {CHECKPOINT_URL} by other means and put it at {path}"
        ) from error
    return path


def load_checkpoint(path, trust):
    """Return the content of a checkpoint; unless trusted, only tensors and plain values are let in."""
    if not Path(path).is_file():
        raise ExportError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise ExportError(f"{path} is not a checkpoint of PyTorch: {demo.first_line(error)}") from error
        raise ExportError(
            f"{path} is no checkpoint, or holds more than tensors and plain values, and could run code when loaded: "
            "if you trust where it comes from, add --trust-checkpoint"
        ) from error
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise ExportError(f"{path} is not a checkpoint of PyTorch: {demo.first_line(error)}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ExportError(f"{path} holds no state dict")
    return checkpoint


def load_weights(detector, checkpoint, path):
    """Load a checkpoint's weights; refuse it if any is missing, left over or of another shape."""
    state = checkpoint.get("state_dict", checkpoint)
    state = {name[7:] if name.startswith("module.") else name: value for name, value in state.items()}
    expected = {name: tuple(value.shape) for name, value in detector.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in state.items() if name != "meta"}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # unused, and absent in old files
    problems = [f"{name} is missing" for name in expected if name not in found and name not in counters]
    problems += [f"{name} is left over" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    problems += [f"{name} holds NaN or infinity" for name, value in tensors.items() if not value.isfinite().all()]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ExportError(f"{path} does not fit the config: {'; '.join(problems[:3])}{more}")
    detector.load_state_dict({name: state[name] for name in found}, strict=False)


def class_names(cfg, checkpoint, num_classes):
    """Return the names of the classes, from the checkpoint or else from the config's dataset."""
    meta = checkpoint.get("meta")
    names = (meta.get("CLASSES") if isinstance(meta, dict) else None) or cfg.data.test.get("classes")
    if isinstance(
        names, str
    ):  # a file with a name a line, as MMDetection reads it; or, in a checkpoint, the only class
        names = mmcv.list_from_file(names) if Path(names).is_file() else [names]
    names = list(names or getattr(DATASETS.get(cfg.data.test.type), "CLASSES", None) or [])
    if len(names) != num_classes:
        raise ExportError(f"the model has {num_classes} classes, but {len(names)} names: set data.test.classes")
    problem = demo.find_problem("classes", names, [demo.TEXT])
    if problem:
        raise ExportError(f"the names of the classes cannot be used: {problem}: set data.test.classes")
    return names


def load_detector(config, checkpoint_path, trust=False):
    """Return MMDetection's detector with its weights, in evaluation mode; model.cfg is its config."""
    try:
        cfg = mmcv.Config.fromfile(str(config))
    except (Exception, SystemExit) as error:  # a config is Python: anything can be wrong with it
        raise ExportError(f"{config} cannot be read: {demo.first_line(error) or type(error).__name__}") from error
    if cfg.get("model", {}).get("type") != "FasterRCNN":
        raise ExportError(f"{config}: model.type is {cfg.get('model', {}).get('type')}, not FasterRCNN")
    try:
        cfg.model.pretrained = None
        if "init_cfg" in cfg.model.backbone:
            cfg.model.backbone.init_cfg = None
        cfg.model.train_cfg = None
        detector = revert_sync_batchnorm(build_detector(cfg.model, test_cfg=cfg.get("test_cfg")))
    except Exception as error:
        raise ExportError(f"{config}: MMDetection cannot build its model: {demo.first_line(error)}") from error
    try:
        check_supported(detector)
        describe_preprocessing(cfg)  # refuses what does not fit before the work begins
        checkpoint = load_checkpoint(checkpoint_path, trust)
        load_weights(detector, checkpoint, checkpoint_path)
        detector.CLASSES = class_names(cfg, checkpoint, detector.roi_head.bbox_head.num_classes)
        detector.cfg = cfg
        describe(detector, {})
    except (AttributeError, KeyError, TypeError) as error:
        raise ExportError(f"{config} lacks what export.py needs: {demo.first_line(error)}") from error
    return detector.eval()


def check_supported(detector):
    """Refuse, by its name in the config, every part that demo.py would compute differently."""
    bbox_heads = ("BBoxHead", "ConvFCBBoxHead", "Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead")
    types = {
        "rpn_head": ("RPNHead",),
        "rpn_head.prior_generator": ("AnchorGenerator",),
        "rpn_head.bbox_coder": ("DeltaXYWHBBoxCoder",),
        "roi_head": ("StandardRoIHead", "DynamicRoIHead", "PISARoIHead"),  # the same but for training
        "roi_head.bbox_roi_extractor": ("SingleRoIExtractor",),
        "roi_head.bbox_roi_extractor.roi_layers.0": ("RoIAlign",),
        "roi_head.bbox_head": bbox_heads,
        "roi_head.bbox_head.bbox_coder": ("DeltaXYWHBBoxCoder",),
    }
    for name, supported in types.items():
        found = type(find_part(detector, name)).__name__
        if found not in supported:
            raise ExportError(f"model.{name} is a {found}, which cannot be exported; supported: {', '.join(supported)}")
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
            raise ExportError(f"model.{name} is {found!r}, which cannot be exported; supported: {supported!r}")
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
            raise ExportError(f"model.{name} is mmcv's operator {type(layer).__name__}, which standard ONNX has not")


def check_square(detector):
    """Refuse strides and RoIAlign outputs whose width and height differ."""
    pairs = {"rpn_head.anchor_generator.strides": detector.rpn_head.prior_generator.strides}
    pairs["roi_head.bbox_roi_extractor.roi_layer.output_size"] = [
        layer.output_size for layer in detector.roi_head.bbox_roi_extractor.roi_layers
    ]
    for name, sizes in pairs.items():
        if any(first != second for first, second in sizes):
            raise ExportError(f"model.{name} is {sizes}, whose sides differ: this cannot be exported")


def check_test_cfg(name, cfg):
    """Refuse an NMS with options that demo.py does not know, and a limit that is none."""
    known = {"type": ("nms",), "iou_threshold": None, "split_thr": None}  # None: any value
    if name == "rcnn":
        known.update(type=("nms", "soft_nms"), class_agnostic=(True, False), min_score=None, method=("linear",))
    for option, value in cfg.nms.items():
        if option not in known or (known[option] is not None and value not in known[option]):
            raise ExportError(f"model.test_cfg.{name}.nms has {option}={value!r}, which cannot be exported")
    if cfg.nms.get("min_score", 0) > cfg.get("score_thr", 0):
        raise ExportError(f"model.test_cfg.{name}.nms.min_score is above score_thr, which cannot be exported")
    if "iou_threshold" not in cfg.nms or cfg.max_per_img <= 0:
        raise ExportError(f"model.test_cfg.{name} needs nms.iou_threshold, and a max_per_img above 0")


def describe(detector, source):
    """Return what the networks cannot know, as plain values: the metadata that demo.py reads."""
    rpn, roi = detector.rpn_head, detector.roi_head
    anchors, extractor, head = rpn.prior_generator, roi.bbox_roi_extractor, roi.bbox_head
    rpn_cfg, rcnn_cfg = detector.test_cfg.rpn, detector.test_cfg.rcnn
    layer = extractor.roi_layers[0]
    return {
        "format": demo.FORMAT,
        "type": demo.TYPE,
        "source": source,
        "classes": detector.CLASSES,
        "preprocess": describe_preprocessing(detector.cfg),
        "anchors": {
            "strides": [stride[0] for stride in anchors.strides],
            "base_sizes": list(anchors.base_sizes),
            "scales": anchors.scales.tolist(),
            "ratios": anchors.ratios.tolist(),
            "center_offset": anchors.center_offset,
        },
        "rpn": {
            "means": list(rpn.bbox_coder.means),
            "stds": list(rpn.bbox_coder.stds),
            "nms_pre": rpn_cfg.nms_pre,
            "iou_threshold": rpn_cfg.nms.iou_threshold,
            "max_per_img": rpn_cfg.max_per_img,
            "min_bbox_size": rpn_cfg.min_bbox_size,
        },
        "roi": {
            "strides": list(extractor.featmap_strides),
            "output_size": layer.output_size[0],
            "sampling_ratio": layer.sampling_ratio,
            "aligned": layer.aligned,
            "finest_scale": extractor.finest_scale,
        },
        "rcnn": {
            "means": list(head.bbox_coder.means),
            "stds": list(head.bbox_coder.stds),
            "class_agnostic": head.reg_class_agnostic,
            "score_threshold": rcnn_cfg.score_thr,
            "iou_threshold": rcnn_cfg.nms.iou_threshold,
            "max_per_img": rcnn_cfg.max_per_img,
            **describe_nms(rcnn_cfg.nms),
        },
    }


def describe_nms(cfg):
    """Return what the head's NMS has beyond its threshold, if anything."""
    extra = {"nms_class_agnostic": True} if cfg.get("class_agnostic") else {}
    if cfg.get("type") == "soft_nms":
        default = inspect.signature(mmcv.ops.soft_nms).parameters["min_score"].default
        extra["soft_min_score"] = cfg.get("min_score", default)
    return extra


def describe_preprocessing(cfg):
    """Return the test pipeline's resizing, normalisation and padding; refuse any other step, option or order."""
    load, augmentation = cfg.data.test.pipeline if len(cfg.data.test.pipeline) == 2 else ({}, {})
    if load.get("type") not in ("LoadImageFromFile", "LoadImageFromWebcam") or load.get("to_float32"):
        raise ExportError("data.test.pipeline is not LoadImageFromFile and MultiScaleFlipAug")
    if augmentation.get("type") != "MultiScaleFlipAug" or augmentation.get("flip"):
        raise ExportError("data.test.pipeline: its second step is not MultiScaleFlipAug with flip=False")
    scale = augmentation.get("img_scale")
    if isinstance(scale, list) and len(scale) == 1:
        scale = scale[0]
    if not (isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(side, int) for side in scale)):
        raise ExportError(f"data.test.pipeline: img_scale is {scale!r}, not one (long side, short side)")

    known = {
        "Resize": {"keep_ratio"},
        "RandomFlip": {"flip_ratio", "direction"},  # does nothing without flip=True above
        "Normalize": {"mean", "std", "to_rgb"},
        "Pad": {"size_divisor"},
        "ImageToTensor": {"keys"},
        "DefaultFormatBundle": set(),
        "Collect": {"keys", "meta_keys"},
    }
    order = [step.type for step in augmentation.transforms]
    for step in augmentation.transforms:
        foreign = set(step) - {"type"} - known.get(step.type, set())
        if step.type not in known or foreign:
            raise ExportError(f"data.test.pipeline: {step.type}({', '.join(sorted(foreign))}) cannot be exported")
    if order != [name for name in known if name in order] or not {"Resize", "Normalize"} <= set(order):
        raise ExportError(f"data.test.pipeline: {order} is not MMDetection's order of resizing, normalising, padding")
    steps = dict(zip(order, augmentation.transforms))
    return {
        "scale": list(scale),
        "mean": list(steps["Normalize"].mean),
        "std": list(steps["Normalize"].std),
        "to_rgb": steps["Normalize"].get("to_rgb", True),
        "pad_divisor": steps["Pad"].size_divisor if "Pad" in steps else 1,
        **({} if steps["Resize"].get("keep_ratio", True) else {"keep_ratio": False}),
    }


def output_names(detector):
    """Return the names of model1's outputs."""
    levels = range(len(detector.rpn_head.prior_generator.strides))
    return [f"{kind}_{level}" for kind in ("cls", "reg", "feat") for level in levels]


def group_norm(module, x):
    """Compute the GroupNorm of x [N, C, H, W], taking its means along one axis after the other.

    ONNX Runtime's InstanceNormalization, which PyTorch would export it to, adds up a whole group in one row:
    half a million float32 for a picture of 800 x 1333, whose rounding alone makes the outputs differ by over 1e-4.
    """
    groups = x.reshape(x.shape[0], module.num_groups, -1, *x.shape[2:])

    def mean(values):
        for axis in (4, 3, 2):
            values = values.mean(axis, keepdim=True)
        return values

    groups = groups - mean(groups)
    groups = groups / (mean(groups * groups) + module.eps).sqrt()
    return groups.reshape(x.shape) * module.weight[:, None, None] + module.bias[:, None, None]


def window_reverse(module, windows, height, width):
    """Lay the windows [n, s, s, C] of Swin Transformer side by side: [N, height, width, C].

    MMDetection's own makes N a constant of the exported graph.
    """
    size, channels = module.window_size, windows.shape[-1]
    grid = windows.view(-1, height // size, width // size, size, size, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


@contextlib.contextmanager
def exportable():
    """Compute, while PyTorch traces, what its exporter gets wrong in a way that it exports right."""
    group_norms = mock.patch.object(torch.nn.GroupNorm, "forward", group_norm)
    windows = mock.patch.object(ShiftWindowMSA, "window_reverse", window_reverse)
    with torch.no_grad(), group_norms, windows:
        yield


@contextlib.contextmanager
def silent_stdout():
    """Keep what compiled code prints, too, from stdout: the exporter prints its whole graph when it fails."""
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def to_onnx(module, example, path, inputs, outputs, opset):
    """Write a module as ONNX with standard operators; sizes are dynamic where `inputs` and `outputs` name them."""
    legacy = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    names = {"input_names": list(inputs), "output_names": list(outputs), "dynamic_axes": {**inputs, **outputs}}
    try:
        with exportable(), silent_stdout():
            torch.onnx.export(module, (example,), str(path), opset_version=opset, **names, **legacy)
    except Exception as error:  # the exporter's own errors have no class in common
        reason = demo.first_line(error).split(" Please feel free")[0].rstrip(".")[:500]  # to ask PyTorch's developers
        raise ExportError(f"PyTorch cannot export this {type(module).__name__} at opset {opset}: {reason}") from error
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise ExportError(f"these operators are not standard ONNX: {', '.join(sorted(foreign))}")
    return model


def write_pair(detector, folder, source, opset):
    """Write model1.onnx and model2.onnx with their metadata to a folder."""
    extractor = detector.roi_head.bbox_roi_extractor
    maps = {name: {0: "N", 2: f"H_{name[-1]}", 3: f"W_{name[-1]}"} for name in output_names(detector)}
    networks = {
        "model1.onnx": to_onnx(
            Model1(detector),
            torch.randn(1, 3, 256, 320),
            folder / "model1.onnx",
            {"image": {0: "N", 2: "H", 3: "W"}},
            maps,
            opset,
        ),
        "model2.onnx": to_onnx(
            Model2(detector),
            torch.randn(2, extractor.out_channels, *extractor.roi_layers[0].output_size),
            folder / "model2.onnx",
            {"roi_feats": {0: "B"}},
            {"cls": {0: "B"}, "reg": {0: "B"}},
            opset,
        ),
    }
    metadata = describe(detector, source)
    digest = hashlib.sha256(json.dumps(metadata).encode())
    for model in networks.values():
        digest.update(model.SerializeToString(deterministic=True))
    metadata["pair"] = digest.hexdigest()[:16]  # of the content: exporting again gives the same files
    for name, model in networks.items():
        onnx.helper.set_model_props(model, {"detector": json.dumps(metadata)})
        onnx.save(model, str(folder / name))


def largest_differences(module, session, inputs):
    """Return for each output its shape and largest difference between PyTorch and ONNX Runtime, over all inputs."""
    differences = []
    for tensor in inputs:
        with torch.no_grad():
            expected = [output.numpy() for output in module(tensor)]
        found = demo.infer(session, tensor.numpy())
        differences.append([np.abs(a - b).max() if a.shape == b.shape else np.inf for a, b in zip(expected, found)])
        shapes = [list(output.shape) for output in expected]
    return list(zip(shapes, np.max(differences, axis=0)))


def verify_outputs(detector, pair, blob, roi_feats):
    """Print a line for every output of both networks, on inputs that a picture gave; return the names of the False."""
    divisor = pair.config["preprocess"]["pad_divisor"]
    whole = torch.from_numpy(blob)
    half = whole[..., ::2, ::2].transpose(2, 3)  # another size, upright where the first one lies
    half = torch.nn.functional.pad(half, (0, -half.shape[3] % divisor, 0, -half.shape[2] % divisor))
    half = torch.cat([half, half.flip(3)]).contiguous()
    rows = largest_differences(Model1(detector), pair.model1, [half, whole])
    roi_feats = torch.from_numpy(roi_feats)
    rows += largest_differences(Model2(detector), pair.model2, [roi_feats[:7], roi_feats[:100]])
    names = [*output_names(detector), "cls", "reg"]
    for name, (shape, difference) in zip(names, rows):
        print(f"{name:8} {shape!s:22} {difference:.1e}  {difference < OUTPUT_TOLERANCE}")
    return [name for name, (_, difference) in zip(names, rows) if not difference < OUTPUT_TOLERANCE]


def reference_detections(detector, image):
    """Return MMDetection's own detections in an image, as demo.py's."""
    per_class = inference_detector(detector, image)
    boxes = np.concatenate(per_class)
    labels = np.repeat(np.arange(len(per_class)), [len(found) for found in per_class])
    return demo.Detections(boxes[:, :4], boxes[:, 4], labels)


def compare_detections(ours, reference):
    """Pair detections one to one by label and place.

    Returns the pairs' number and their largest difference in boxes (pixels) and scores.
    """
    if len(ours.boxes) == 0 or len(reference.boxes) == 0:
        return 0, 0.0, 0.0
    distances = np.abs(ours.boxes[:, None] - reference.boxes).max(axis=2)
    distances[ours.labels[:, None] != reference.labels] = np.inf
    nearest = distances.argmin(axis=1)
    paired = np.isfinite(distances.min(axis=1))
    box_difference = distances.min(axis=1)[paired].max(initial=0)
    score_difference = np.abs(ours.scores - reference.scores[nearest])[paired].max(initial=0)
    return len(set(nearest[paired])), box_difference, score_difference


def verify_detections(ours, reference):
    """Print a line for the whole pipeline against inference_detector; return whether it is True."""
    paired, box_difference, score_difference = compare_detections(ours, reference)
    equal = (
        paired == len(ours.boxes) == len(reference.boxes)
        and box_difference <= BOX_TOLERANCE
        and score_difference <= SCORE_TOLERANCE
    )
    print(
        f"detections: {len(ours.boxes)}, MMDetection: {len(reference.boxes)}, the same: {paired}, "
        f"largest difference {box_difference:.1e} px, {score_difference:.1e} in score  {equal}"
    )
    if equal and paired == 0:
        print("both found nothing: name a picture with --picture in which there is something to compare")
    return equal


def verify(detector, pair, image):
    """Compare every output of both networks, and the detections in an image; return the names of what differs."""
    stages = {}
    ours = pair(image, lambda stage, **arrays: stages.update(arrays))
    if len(stages["proposals"]) == 0:
        raise ExportError(
            "the RPN proposes nothing in the picture, so model2 cannot be compared: name another --picture"
        )
    different = verify_outputs(detector, pair, stages["blob"], stages["roi_feats"])
    equal = verify_detections(ours, reference_detections(detector, image))
    return different if equal else [*different, "detections"]


def export(config, checkpoint, out, opset=13, trust=False, picture=HERE / "asset" / "shapes.png"):
    """Export, verify and move the two files to `out`; return whether all was True."""
    detector = load_detector(config, checkpoint, trust)
    source = {
        "config": Path(config).name,
        "checkpoint": Path(checkpoint).name,
        "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        "versions": {module.__name__: module.__version__ for module in (mmdet, mmcv, torch, onnx)},
    }
    try:
        image = demo.read_picture(picture)
        demo.preprocess(image, **describe_preprocessing(detector.cfg))
    except ValueError as error:
        raise ExportError(f"{picture}: {error}") from error
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        write_pair(detector, Path(folder), source, opset)
        pair = demo.FasterRCNN(folder)
        different = verify(detector, pair, image)
        if different:
            names = ", ".join(different)
            print(
                f"export.py: ONNX Runtime and PyTorch differ in {names}: nothing was written to {out}", file=sys.stderr
            )
            return False
        for name in ("model1.onnx", "model2.onnx"):
            os.replace(Path(folder) / name, out / name)
    print(f"written: {out / 'model1.onnx'}, {out / 'model2.onnx'}")
    return True


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a file, or the name of a config in MMDetection")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="the .pth file with its weights")
    parser.add_argument("--out", metavar="DIR", default=HERE / "ckpt", type=Path, help="default: ckpt")
    parser.add_argument("--opset", metavar="N", type=int, default=13, help="of ONNX (default: 13)")
    parser.add_argument(
        "--picture",
        metavar="FILE",
        default=HERE / "asset" / "shapes.png",
        type=Path,
        help="what the detections are compared on (default: the bundled picture)",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that holds more than tensors; it can run any code",
    )
    args = parser.parse_args(arguments)
    if args.config and not args.checkpoint:
        parser.error("CONFIG and CHECKPOINT go together")
    return args


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        config = find_config(args.config or DEFAULT_CONFIG)
        checkpoint = args.checkpoint or fetch_default_checkpoint()
        return 0 if export(config, checkpoint, args.out, args.opset, args.trust_checkpoint, args.picture) else 1
    except (ExportError, demo.ModelError, OSError) as error:
        print(f"export.py: {demo.first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.unraisablehook = lambda _: None  # mmcv forgets a temporary file when a config fails, and Python would tell
    demo.run_program(main)
