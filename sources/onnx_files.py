"""The ONNX files of an export: standard operators only, and the detector's settings in each of them."""

import hashlib

import onnx

from detectors.settings import changed, write
from sources import SourceError


def check_standard(model):
    """Refuse an onnx.ModelProto that is not valid, or has operators that are not of the standard: SourceError."""
    onnx.checker.check_model(model)
    foreign = {node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise SourceError(f"these operators are not standard ONNX: {', '.join(sorted(foreign))}")


def save_networks(models, settings, folder):
    """Save {file name: onnx.ModelProto} to a folder, each with the settings in its metadata and the id of them all."""
    settings = changed(settings, "networks", tuple(models))
    digest = hashlib.sha256(write(changed(settings, "pair", "")).encode())
    for model in models.values():
        del model.metadata_props[:]
        digest.update(model.SerializeToString(deterministic=True))
    settings = changed(settings, "pair", digest.hexdigest()[:16])  # the same content has the same id
    for name, model in models.items():
        onnx.helper.set_model_props(model, {"detector": write(settings)})
        onnx.save(model, str(folder / name))
