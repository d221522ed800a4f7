"""Checkpoints of PyTorch: fetched, loaded without running what may be in them, fitted into a model."""

import inspect
import pickle
import re
import socket
from http.client import HTTPException
from pathlib import Path

import torch

from detectors import one_line
from sources import SourceError

NO_WEIGHTS = ("classes", "meta")  # what may stand among the weights
STALL = 60  # seconds without a byte after which a download is given up


def fetch(url, path):
    """Download a checkpoint to a path, unless it is there; the hash in its name is checked."""
    if path.exists():
        return
    print(f"downloading {url}")
    hash_prefix = path.stem.rsplit("-", 1)[1]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL)  # torch.hub sets none, and would wait forever
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network or disk; a wrong hash; no HTTP
        raise SourceError(
            f"the download failed ({one_line(error)}): try again, or get {url} by other means and put it at {path}"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


def load_checkpoint(path, trust):
    """Return the content of a checkpoint; unless it is trusted, only tensors and plain values are let in."""
    if not Path(path).is_file():
        raise SourceError(f"{path}: no such file")
    options = {"map_location": "cpu"}
    if "weights_only" in inspect.signature(torch.load).parameters:
        options["weights_only"] = not trust
    elif not trust:
        raise SourceError(
            f"PyTorch {torch.__version__} cannot load a checkpoint without running code that may be in it: use 1.13 or "
            "newer, or, if you trust where the checkpoint comes from, add --trust-checkpoint"
        )
    try:
        checkpoint = torch.load(path, **options)
    except pickle.UnpicklingError as error:
        if trust:
            raise SourceError(f"{path} is not a checkpoint of PyTorch: {one_line(error)}") from error
        raise SourceError(
            f"{path} is not a checkpoint, or holds more than tensors and plain values, and could run code when loaded: "
            "if you trust where it comes from, add --trust-checkpoint"
        ) from error
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise SourceError(f"{path} is not a checkpoint of PyTorch: {one_line(error)}") from error
    if isinstance(checkpoint, torch.nn.Module):
        raise SourceError(f"{path} holds a whole model: save its state_dict() instead")
    state = weights_in(checkpoint)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise SourceError(f"{path} holds no state dict")
    return checkpoint


def weights_in(checkpoint):
    """Return the state dict in a checkpoint, {name: tensor}, or what stands in its place: training wraps it or not."""
    for key in ("state_dict", "model", "model_state_dict"):  # of MMDetection, torchvision, PyTorch's tutorials
        checkpoint = checkpoint.get(key, checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(checkpoint, dict):
        return checkpoint
    wrapped = re.compile(r"^(module|model)\.")  # by DataParallel, by Lightning
    return {wrapped.sub("", name) if isinstance(name, str) else name: value for name, value in checkpoint.items()}


def is_plain(value):
    """Return whether a value of a checkpoint is a tensor of real numbers, each of them there."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_complex() or value.is_meta)


def renamed(state, old_names):
    """Return a state dict with the names of today; old_names: {regular expression: what replaces it}."""
    for old, new in old_names.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


def load_weights(model, state, path):
    """Load the state dict of a checkpoint into a model; refuse it if any is missing, left over or of another shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in state.items() if name not in NO_WEIGHTS}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # unused, and absent in old files
    problems = [f"{name} is missing" for name in expected if name not in found and name not in counters]
    problems += [f"{name} is left over" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    for name in [name for name in found if name in expected]:
        if not is_plain(state[name]):
            problems.append(f"{name} is not a plain tensor of real numbers")
        elif not state[name].isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SourceError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict({name: state[name] for name in found}, strict=False)
