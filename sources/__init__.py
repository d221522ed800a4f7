"""Where weights come from: each framework has one file, which turns a detector trained with it into a Source."""

import importlib
from typing import Any, Callable, Dict, NamedTuple


class SourceError(Exception):
    """There is nothing to export; the message says why and what to do."""


OPSET = 13  # of ONNX, unless a detector has operators that came later


class Network(NamedTuple):
    """One network of a detector, as PyTorch's exporter takes it."""

    module: Any  # a torch.nn.Module in evaluation mode
    example: Any  # an input that it takes, a torch.Tensor
    inputs: Dict[str, Dict[int, str]]  # the input's name, and the names of its dynamic axes
    outputs: Dict[str, Dict[int, str]]  # the same for each output, in order


class Source(NamedTuple):
    """What export.py needs to know of a detector."""

    networks: Dict[str, Network]  # by the names of their files
    settings: Any  # what the networks cannot know, a class of detectors/settings.py
    detect: Callable  # (picture's path, score threshold or None for the detector's own) -> the framework's Detections
    opset: int = OPSET  # of ONNX, the lowest that has all operators


TORCHVISION = "torchvision:"  # before the name of a builder


def load(config=None, checkpoint=None, trust=False, classes=None, options=None):
    """Return the Source of a detector; SourceError if it cannot be exported.

    config: a file or a name that MMDetection knows, or torchvision:BUILDER; without it, MMDetection's Faster R-CNN
    R50-FPN 1x COCO. trust: the checkpoint may hold more than tensors and plain values, and run code when it is loaded.
    classes: their names, instead of the checkpoint's. options: by the name of the option on the command line, what the
    framework lets one set: "--set" of torchvision (name, value as text), "--cfg-options" of MMDetection KEY=VALUE.
    """
    if config and config.startswith(TORCHVISION):
        name, extra, option, config = "torchvision", "torchvision", "--set", config[len(TORCHVISION) :]
    else:
        name, extra, option = "mmdetection", "export", "--cfg-options"
    foreign = [other for other, values in (options or {}).items() if values and other != option]
    if foreign:
        raise SourceError(f"{foreign[0]} is not for {name}: use {option}")
    try:
        framework = importlib.import_module(f"sources.{name}")
    except ImportError as error:
        raise SourceError(f"{error}: {name} is needed: uv run --extra {extra} export.py") from error
    return framework.load(config, checkpoint, trust, classes, (options or {}).get(option, ()))
