"""Fuzz what comes from outside, for two minutes.

uv run --extra export --with atheris tests/fuzz.py -max_total_time=120 -len_control=0 -max_len=300 -rss_limit_mb=8000

Each input is, in turn, a change of the metadata of the bundled model (read, and if it is accepted, used on a picture)
or the bytes of a picture, through the whole of demo.py: read, detected in, drawn and written. Only the documented
exceptions may come out. The options are libFuzzer's (the memory is its own: what it traces adds up); atheris is no
dependency of the project.
"""

import contextlib
import copy
import json
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["demo", "postprocess"]):
    import demo

import cv2  # noqa: E402
import numpy as np  # noqa: E402

DETECTOR = demo.FasterRCNN(ROOT / "ckpt" / "shapes")
METADATA = DETECTOR.config
IMAGE = cv2.imread(str(ROOT / "asset" / "shapes.png"))[:160, :160]
PICTURE = cv2.imencode(".png", IMAGE)[1].tobytes()
SUFFIXES = (".png", ".jpg", ".bmp", ".webp", ".tiff", ".gif")
SEEDS = [cv2.imencode(suffix, IMAGE[::4, ::4])[1].tobytes() for suffix in SUFFIXES]
NUMBERS = (-1, 0, 1, 2, 0.5, -3.5, 1e5, 1e300, float("nan"))
VALUES = (*NUMBERS, None, True, "", "circle", "a\nb", "\u5706", "\ud800", [], [1], [0, 0, 0, 0], {}, [[]])
ERRORS = (demo.ModelError, ValueError, OSError, MemoryError, cv2.error)  # what demo.py reports in one line


class Session:
    """Stands for a network with this metadata."""

    def __init__(self, text):
        self.custom_metadata_map = {"detector": text}

    def get_modelmeta(self):
        """Return what holds the metadata."""
        return self


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
    """Detect in a picture of these bytes, draw and write."""
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "picture"
        path.write_bytes(data)
        demo.detect_and_draw(detector, path, Path(out), set(), 0, False, demo.Stopwatch())


def try_metadata(provider):
    """Read changed metadata and detect with it."""
    config = demo.read_metadata("model1.onnx", Session(change(provider)))
    demo.check_shapes(DETECTOR.model1, DETECTOR.model2, config, "folder")
    if max(config["preprocess"]["scale"]) > 600 or config["preprocess"]["pad_divisor"] > 600:
        return  # right, and slow
    demo.load_pair = lambda folder: (DETECTOR.model1, DETECTOR.model2, config)
    run_demo(demo.FasterRCNN("changed"), PICTURE)


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
