"""Exported detectors: load(folder) returns one; detector(image) returns what it finds."""

from pathlib import Path

from detectors import tensorrt
from detectors.cascade_rcnn import CascadeRCNN
from detectors.center_net import CenterNet
from detectors.detr import DETR
from detectors.faster_rcnn import FasterRCNN
from detectors.fcos import FCOS
from detectors.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from detectors.networks import Execution, ModelError, Network, one_line
from detectors.one_file import OneFile
from detectors.paa import PAA
from detectors.point_rend import PointRend
from detectors.retina_net import RetinaNet
from detectors.settings import FORMAT, Header, SettingsError, read, with_option
from detectors.tood import TOOD
from detectors.yolo import YOLO
from postprocess import Detections

__all__ = [
    "BUNDLED",
    "CKPT",
    "FIRST",
    "Detections",
    "Execution",
    "ModelError",
    "default_folder",
    "load",
    "load_folder",
    "one_line",
]

FAMILIES = {
    "faster_rcnn": FasterRCNN,
    "cascade_rcnn": CascadeRCNN,
    "mask_rcnn": MaskRCNN,
    "cascade_mask_rcnn": CascadeMaskRCNN,
    "point_rend": PointRend,
    "retina_net": RetinaNet,
    "paa": PAA,
    "fcos": FCOS,
    "tood": TOOD,
    "yolo": YOLO,
    "detr": DETR,
    "center_net": CenterNet,
}
FIRST = ("model1.onnx", "model.onnx")  # the files that take the picture: of two stages, and of one
ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "ckpt" / "shapes"
# Where export.py writes and programs look first: beside them or, once they are installed, in the folder one works in.
CKPT = Path("ckpt") if (ROOT / "__init__.py").exists() else ROOT / "ckpt"


def default_folder():
    """Return the folder that export.py writes to, if an export is there, else the bundled one."""
    return CKPT if any((CKPT / name).exists() for name in FIRST) else BUNDLED


def load(path, options=(), execution=Execution()):  # noqa: B008, it is immutable
    """Return the detector whose export is in a folder, or that is in one file; ModelError if it cannot run.

    options: (name, value as text) of settings that shall have other values than in the files, see settings.CHANGEABLE.
    """
    load_it = load_file if Path(path).suffix == ".onnx" else load_folder
    return load_it(path, options, execution)


def load_file(path, options=(), execution=Execution()):  # noqa: B008
    """Return the detector that is in one file, see load."""
    network = Network(path, execution=execution)
    if options:
        raise ModelError(f"--set {options[0][0]}: in {path}, the settings are built in: write it anew, with that --set")
    return OneFile(read_metadata(network)[1], network)


def load_folder(folder, options=(), execution=Execution()):  # noqa: B008
    """Return the detector whose export is in a folder, see load."""
    folder = Path(folder)
    if folder.is_file():
        raise ModelError(f"{folder} is a file: name the folder of an export, with its networks")
    opening = Execution() if tensorrt.is_wanted(execution) else execution
    first = Network(folder / first_file(folder), execution=opening)
    family, settings = read_metadata(first)
    tensors, sizes = family.tensors(settings), {}
    if set(settings.networks) != set(tensors):
        raise ModelError(f"{folder}: its networks are {settings.networks}, not {tuple(tensors)}: export again")
    # Keeping its memory makes the first network a tenth faster on the next picture. The others give theirs back: a
    # head that takes a thousand RoIs of many channels needs gigabytes.
    others = {name: Network(folder / name, False, opening) for name in tensors if name != first.path.name}
    networks = {first.path.name: first, **others}
    if any(network.metadata != first.metadata for network in networks.values()):
        raise ModelError(f"{' and '.join(networks)} in {folder} come from different exports: export again")
    for name, expected in tensors.items():
        networks[name].expect(expected, sizes)
    settings = with_options(settings, options)
    if tensorrt.is_wanted(execution):
        for network in networks.values():
            told = {**tensorrt.options_for(network, settings), **execution.options}
            network.open(execution._replace(options=told))
    return family(settings, networks)


def with_options(settings, options):
    """Return the settings with the values that were asked for: (name, value as text); ModelError if one cannot be."""
    for name, text in options:
        try:
            settings = with_option(settings, name, text)
        except SettingsError as error:
            raise ModelError(f"--set {error}") from error
    return settings


def first_file(folder):
    """Return the name of the file in a folder that takes the picture; ModelError if there are none, or two."""
    found = [name for name in FIRST if (folder / name).exists()]
    if len(found) > 1:
        raise ModelError(f"{folder} holds two exports, {' and '.join(found)}: move one to a folder of its own")
    if not found:
        single = folder / "detector.onnx"
        hint = f"for the detector in one file, name {single}" if single.exists() else "export.py writes one"
        raise ModelError(f"{folder} holds no export, neither {' nor '.join(FIRST)}: {hint}")
    return found[0]


def read_metadata(network):
    """Return the family and the settings that export.py left in a network."""
    path, text = network.path, network.metadata
    if text is None:
        raise ModelError(f"{path} was not written by export.py: it has no metadata 'detector'")
    try:
        header = read(text, Header)
        if header.format != FORMAT or header.type not in FAMILIES:
            raise ModelError(f"{path} is format {header.format}, type {header.type!r}; this version reads format "
                             f"{FORMAT}, {', '.join(FAMILIES)}: export again")  # fmt: skip
        family = FAMILIES[header.type]
        return family, read(text, family.Settings)
    except SettingsError as error:
        raise ModelError(f"{path}: its metadata is damaged: {error}: export again") from error
