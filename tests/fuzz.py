"""Fuzz what comes from outside, for two minutes.

uv run --extra export --with atheris tests/fuzz.py -max_total_time=120 -len_control=0 -max_len=300 -rss_limit_mb=8000

Each input is, in turn, a change of the metadata of the bundled model (read, and if it is accepted, used on a picture)
or the bytes of a picture, through the whole of demo.py: read, detected in, drawn and written. Only the documented
exceptions may come out. The options are libFuzzer's (the memory is its own: what it traces adds up); atheris is no
dependency of the project.
"""

import contextlib
import copy
import io
import json
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["demo", "detectors", "pictures", "postprocess"]):
    import demo
    import detectors
    from detectors.settings import write

import cv2  # noqa: E402
import numpy as np  # noqa: E402

DETECTOR = detectors.load(detectors.BUNDLED)
METADATA = json.loads(write(DETECTOR.settings))
IMAGE = cv2.imread(str(demo.PICTURE))[:160, :160]
PICTURE = cv2.imencode(".png", IMAGE)[1].tobytes()
SUFFIXES = (".png", ".jpg", ".bmp", ".webp", ".tiff", ".gif")
SEEDS = [cv2.imencode(suffix, IMAGE[::4, ::4])[1].tobytes() for suffix in SUFFIXES]
NUMBERS = (-1, 0, 1, 2, 0.5, -3.5, 1e5, 1e300, float("nan"))
VALUES = (*NUMBERS, None, True, "", "circle", "a\nb", "\u5706", "\ud800", [], [1], [0, 0, 0, 0], {}, [[]])
ERRORS = (detectors.ModelError, ValueError, OSError, MemoryError, cv2.error)  # what demo.py reports in one line


class File:
    """Stands for a network's file with this metadata."""

    path = "model1.onnx"

    def __init__(self, text):
        self.metadata = text


def change(provider):
    """Return the metadata with some values replaced, or its text with some characters replaced."""
    metadata = copy.deepcopy(METADATA)
    for _ in range(provider.ConsumeIntInRange(0, 4)):
        place = metadata
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = provider.PickValueInList(keys)
            if isinstance(place[key], (dict, list)) and place[key] and provider.ConsumeBool():
                place = place[key]
                continue
            place[key] = provider.PickValueInList(list(VALUES)) if provider.ConsumeBool() else provider.ConsumeFloat()
            break
    text = json.dumps(metadata)
    if provider.ConsumeBool():
        cut = provider.ConsumeIntInRange(0, len(text))
        text = text[:cut] + provider.ConsumeUnicodeNoSurrogates(20) + text[cut + provider.ConsumeIntInRange(0, 20) :]
    return text


def run_demo(detector, data):
    """Detect in a picture of these bytes, draw and write; what is written must be JSON."""
    silence = io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        path = Path(out) / "picture"
        path.write_bytes(data)
        args = demo.read_arguments(["--out", out, "--score-thr", "0"])
        args.labels = None  # all classes
        failures, _ = demo.run(detector, [str(path)], args)
        for results in Path(out).glob("*.json"):
            json.loads(results.read_text(), parse_constant=refuse)
        written = {entry.name for entry in Path(out).iterdir()} - {"picture"}
        assert written == (set() if failures else {"picture.png", "pictures.json", "detections.json"}), written


def refuse(constant):
    """Refuse NaN and infinity, which JSON does not have."""
    raise AssertionError(f"{constant} in the results")


def try_metadata(provider):
    """Read changed metadata and, if the networks fit it, detect with it."""
    family, settings = detectors.read_metadata(File(change(provider)))
    networks, sizes = {name: copy.copy(network) for name, network in DETECTOR.networks.items()}, {}
    for name, tensors in family.tensors(settings).items():
        networks[name].expect(tensors, sizes)
    if max(*settings.preprocess.scale, settings.preprocess.pad_divisor) > 600:
        return  # right, and slow
    run_demo(family(settings, networks), PICTURE)


def try_picture(provider):
    """Read a changed picture and detect in it."""
    data = bytearray(provider.PickValueInList(SEEDS))
    for _ in range(provider.ConsumeIntInRange(0, 12)):
        data[provider.ConsumeIntInRange(0, len(data) - 1)] = provider.ConsumeIntInRange(0, 255)
    if provider.ConsumeBool():
        del data[provider.ConsumeIntInRange(0, len(data)) :]
    run_demo(DETECTOR, data)


def try_input(data):
    """Try one input; whatever is not documented comes out and is reported."""
    provider = atheris.FuzzedDataProvider(data)
    with np.errstate(all="ignore"), contextlib.suppress(*ERRORS):
        (try_metadata if provider.ConsumeBool() else try_picture)(provider)


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_input)
    atheris.Fuzz()
