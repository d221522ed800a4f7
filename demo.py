"""Run an exported Faster R-CNN on pictures: two ONNX networks, and everything between them in NumPy.

python demo.py                      the bundled picture
python demo.py PATH ...             pictures, folders or globs

Writes the annotated pictures and detections.json to the folder --out. Of an animation the first picture is
taken. Exit status: 0 all well, 1 some pictures failed and the rest was done, 2 nothing could be done, 130
interrupted.
"""

import argparse
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Read once, when cv2 comes in. As float32, so many pixels are 1.6 GB. What goes wrong is raised, no need to log it.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from tqdm import tqdm  # noqa: E402

from postprocess import align_levels, assign_levels, base_anchors, detect, ignore, propose  # noqa: E402

HERE = Path(__file__).resolve().parent
FORMAT, TYPE = 1, "faster_rcnn"  # of the metadata that this file reads
PICTURE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

TEXT, FLAG, INTEGER, COUNT = "a text without control characters", "true or false", "a whole number", "a count"
NUMBER, POSITIVE = "a number", "a number above 0"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # breaks a line, a terminal or, the last ones, OpenCV
METADATA = {  # what has to be in it; [X] is a list of X, [X, X] of two, None anything; a key with "?" may be missing
    "format": INTEGER,
    "type": TEXT,
    "source?": None,
    "pair": TEXT,
    "classes": [TEXT],
    "preprocess": {
        "scale": [COUNT, COUNT], "mean": [NUMBER] * 3, "std": [POSITIVE] * 3, "to_rgb": FLAG, "pad_divisor": COUNT,
        "keep_ratio?": FLAG,
    },
    "anchors": {
        "strides": [COUNT], "base_sizes": [POSITIVE], "scales": [POSITIVE], "ratios": [POSITIVE],
        "center_offset": NUMBER,
    },
    "rpn": {
        "means": [NUMBER] * 4, "stds": [NUMBER] * 4, "nms_pre": INTEGER, "iou_threshold": NUMBER, "max_per_img": COUNT,
        "min_bbox_size": NUMBER,
    },
    "roi": {
        "strides": [COUNT], "output_size": COUNT, "sampling_ratio": INTEGER, "aligned": FLAG, "finest_scale": POSITIVE,
    },
    "rcnn": {
        "means": [NUMBER] * 4, "stds": [NUMBER] * 4, "class_agnostic": FLAG, "score_threshold": NUMBER,
        "iou_threshold": NUMBER, "max_per_img": COUNT, "nms_class_agnostic?": FLAG, "soft_min_score?": NUMBER,
    },
}  # fmt: skip


class ModelError(Exception):
    """The folder holds no pair of networks that this file can run; the message says why and what to do."""


class Detections(NamedTuple):
    """What was found, best first."""

    boxes: np.ndarray  # [d, 4] float32: x1, y1, x2, y2 in pixels of the picture
    scores: np.ndarray  # [d] float32, 0 to 1
    labels: np.ndarray  # [d] int64, positions in FasterRCNN.classes


class FasterRCNN:
    """An exported detector: detector(image) returns its Detections.

    folder: holds model1.onnx and model2.onnx as export.py writes them; ModelError if it does not.
    classes: the names of the classes, in the order of the labels.
    """

    def __init__(self, folder):
        self.model1, self.model2, self.config = load_pair(folder)
        self.classes = self.config["classes"]
        anchors = self.config["anchors"]
        self.base_anchors = [
            base_anchors(size, anchors["scales"], anchors["ratios"], anchors["center_offset"])
            for size in anchors["base_sizes"]
        ]

    def __call__(self, image, record=ignore):
        """Return the Detections in an image [h, w, 3] uint8, BGR as cv2.imread returns it.

        `record`, if given, is called after each stage as record(stage, **arrays) with what it computed.
        """
        return self.detect_in(*preprocess(image, **self.config["preprocess"]), record)

    def detect_in(self, blob, image_size, scale_factor, record=ignore):
        """Return the Detections in what preprocess returned; another thread may preprocess the next picture."""
        config, strides, roi = self.config, self.config["anchors"]["strides"], self.config["roi"]
        record("preprocess", blob=blob, image_size=image_size)

        maps = [m[0] for m in infer(self.model1, blob)]
        rpn_cls, rpn_reg, features = (maps[i : i + len(strides)] for i in range(0, len(maps), len(strides)))
        record("model1", rpn_cls=rpn_cls, rpn_reg=rpn_reg, features=features)

        proposals, _ = propose(rpn_cls, rpn_reg, self.base_anchors, strides, image_size, **config["rpn"], record=record)

        levels = assign_levels(proposals, len(roi["strides"]), roi["finest_scale"])
        roi_feats = align_levels(
            features, proposals, levels, roi["strides"], roi["output_size"], roi["sampling_ratio"], roi["aligned"]
        )
        record("align", levels=levels, roi_feats=roi_feats)

        cls, reg = infer(self.model2, roi_feats)
        record("model2", cls=cls, reg=reg)

        return Detections(*detect(cls, reg, proposals, image_size, scale_factor, **config["rcnn"], record=record))


def default_model():
    """Return the folder of the pair that export.py has written, else of the bundled one."""
    exported = HERE / "ckpt"
    return exported if (exported / "model1.onnx").exists() else exported / "shapes"


def load_pair(folder):
    """Return the sessions of model1.onnx and model2.onnx in a folder and the metadata they share."""
    sessions, configs = [], []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; onnxruntime would print it as well
    for name in ("model1.onnx", "model2.onnx"):
        path = Path(folder) / name
        # To keep its memory makes the next picture a tenth faster. model2 gives it back: C4 detectors' takes gigabytes.
        options.enable_cpu_mem_arena = name == "model1.onnx"
        if not path.is_file():
            raise ModelError(f"{path} is not there: export a model with export.py, or name its folder with --model")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each way to fail, below none of their own
            raise ModelError(f"{path} cannot be loaded by onnxruntime: {first_line(error)}") from error
        sessions.append(session)
        try:
            configs.append(read_metadata(path, session))
        except RecursionError as error:
            raise ModelError(f"{path}: its metadata is nested too deep to be read: export again") from error
    if configs[0]["pair"] != configs[1]["pair"]:
        raise ModelError(f"model1.onnx and model2.onnx in {folder} are of two different exports: export again")
    for session, role in zip(sessions, ("image", "roi_feats")):
        if session.get_inputs()[0].name != role:
            raise ModelError(f"model1.onnx and model2.onnx in {folder} are swapped: rename them, or export again")
    check_shapes(*sessions, configs[0], folder)
    return (*sessions, configs[0])


def check_shapes(model1, model2, config, folder):
    """Refuse two networks whose inputs and outputs are not what their metadata says."""
    anchors, roi, levels = config["anchors"], config["roi"], len(config["anchors"]["strides"])
    maps, outputs, roi_feats = model1.get_outputs(), model2.get_outputs(), model2.get_inputs()[0]
    if len(maps) != 3 * levels or len(outputs) != 2:
        raise ModelError(f"the models in {folder} do not fit their metadata, which has {levels} levels: export again")
    cls, reg = outputs
    classes, boxes = len(config["classes"]), len(anchors["scales"]) * len(anchors["ratios"])
    found = {
        "channels of image": (model1.get_inputs()[0].shape[1], (3,)),
        "levels with a base size": (len(anchors["base_sizes"]), (levels,)),
        "levels for RoIs": (len(roi["strides"]), range(1, levels + 1)),
        "objectness logits of a cell": (maps[0].shape[1], (boxes, 2 * boxes)),
        "deltas of a cell": (maps[levels].shape[1], (4 * boxes,)),
        "channels of roi_feats": (roi_feats.shape[1], (maps[-1].shape[1],)),
        "sides of roi_feats": (tuple(roi_feats.shape[2:]), ((roi["output_size"],) * 2,)),
        "class logits": (cls.shape[1], (classes + 1,)),
        "class deltas": (reg.shape[1], (4 if config["rcnn"]["class_agnostic"] else 4 * classes,)),
    }
    for name, (value, expected) in found.items():
        if value not in expected:
            raise ModelError(f"the models in {folder} do not fit their metadata: {value} {name}: export again")


def infer(session, array):
    """Return the outputs of a network for its one input; ModelError if it fails or one of them is not finite."""
    name = session.get_inputs()[0].name
    try:
        outputs = session.run(None, {name: array})
    except Exception as error:  # onnxruntime has a class for each way to fail, below none of their own
        raise ModelError(f"onnxruntime fails with {name} {list(array.shape)}: {first_line(error)}") from error
    for output, values in zip(session.get_outputs(), outputs):
        if not np.isfinite(values).all():
            raise ModelError(f"the model's output {output.name} holds NaN or infinity: its weights may be damaged")
    return outputs


def read_metadata(path, session):
    """Return the object that export.py left in a network."""
    text = session.get_modelmeta().custom_metadata_map.get("detector")
    if text is None:
        raise ModelError(f"{path} was not written by export.py: it has no metadata 'detector'")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path}: its metadata 'detector' is not JSON ({error}): export again") from error
    found = {key: config.get(key) for key in ("format", "type")} if isinstance(config, dict) else config
    if found != {"format": FORMAT, "type": TYPE}:
        raise ModelError(f"{path} is {found}; this demo.py reads format {FORMAT}, type {TYPE!r}")
    problem = find_problem("detector", config, METADATA)
    if problem:
        raise ModelError(f"{path}: its metadata is damaged: {problem}: export again")
    return config


def find_problem(name, value, expected):
    """Return what is wrong with a value of the metadata where something else is expected (see METADATA), or None."""
    if isinstance(expected, dict):
        return find_problem_in_object(name, value, expected)
    if isinstance(expected, list):
        if not isinstance(value, list) or not value or len(expected) not in (1, len(value)):
            return f"{name} is no list of {'some' if len(expected) == 1 else len(expected)}"
        kinds = expected if len(expected) > 1 else expected * len(value)
        return next(filter(None, map(find_problem, [f"{name}[]"] * len(value), value, kinds)), None)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6  # nor NaN
    fits = {
        None: True,
        TEXT: isinstance(value, str) and not CONTROL.search(value),
        FLAG: isinstance(value, bool),
        NUMBER: number,
        POSITIVE: number and value >= 1e-6,
        INTEGER: number and isinstance(value, int),
        COUNT: number and isinstance(value, int) and value > 0,
    }
    return None if fits[expected] else f"{name} is {value!r:.50}, not {expected}"


def find_problem_in_object(name, value, expected):
    """Return the first problem among the keys of an object, or None."""
    if not isinstance(value, dict):
        return f"{name} is no object"
    kinds = {key.rstrip("?"): kind for key, kind in expected.items()}
    missing = [key for key in expected if key not in value and not key.endswith("?")]
    unknown = [key for key in value if key not in kinds]
    if missing or unknown:
        return f"{name} has no {missing[0]}" if missing else f"{name} has an unknown {unknown[0]!r:.50}"
    return next(filter(None, (find_problem(f"{name}.{key}", value[key], kinds[key]) for key in value)), None)


def preprocess(image, scale, mean, std, to_rgb, pad_divisor, keep_ratio=True):
    """Resize, normalise and pad an image [h, w, 3] uint8 BGR as MMDetection's test pipeline does.

    scale: the longest a long side and a short side may get; without keep_ratio, the width and height.
    Returns the blob [1, 3, H, W] float32, the size (height, width) of the picture in it (the rest of it, right
    and below, is zero), and the factors [4] by which x, y, x, y were multiplied. ValueError if it is no image, or so
    thin that nothing would be left of it.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        raise ValueError("the image is not what cv2.imread returns for a picture: [h, w, 3] uint8")
    height, width = image.shape[:2]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5)) if keep_ratio else tuple(scale)
    if min(size) < 1:
        raise ValueError(
            f"{width} x {height} pixels: too thin, nothing is left of it when its long side is {max(scale)}"
        )
    scale_factor = np.float32([size[0] / width, size[1] / height] * 2)

    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    if to_rgb:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    image = cv2.subtract(image.astype(np.float32), np.float64(np.float32([mean])))
    image = cv2.multiply(image, 1 / np.float64(np.float32([std])))

    padded = [-(-side // pad_divisor) * pad_divisor for side in image.shape[:2]]
    blob = np.zeros((1, 3, *padded), np.float32)
    blob[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return blob, image.shape[:2], scale_factor


def first_line(error):
    """Return the message of an exception as one line."""
    return " ".join(str(error).split())


def printable(path):
    """Return a path as it can be printed on one line."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def read_picture(path):
    """Return the picture in a file as [h, w, 3] uint8 BGR, turned as its EXIF says; ValueError if it is none."""
    data = np.fromfile(path, np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    except cv2.error as error:
        if "CV_IO_MAX" not in str(error):
            raise
        limit = os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]
        raise ValueError(
            f"more than {limit} pixels: OPENCV_IO_MAX_IMAGE_PIXELS in the environment allows more"
        ) from error
    if image is None:
        raise ValueError("not a picture that OpenCV can read")
    return image


def find_pictures(paths):
    """Return the files that the paths (pictures, folders, globs) name, in order, and a line for each that has none."""
    files, problems = [], []
    for path in paths:
        if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
            found, problem = [], "this folder may not be read"
        elif os.path.isdir(path):
            found = sorted(str(p) for p in Path(path).iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
            problem = "no pictures in this folder"
        elif os.path.exists(path):
            found, problem = [path], None
        else:
            found, problem = sorted(glob.glob(path, recursive=True)), "no such file"
        files += found
        if not found:
            problems.append(f"{printable(path)}: {problem}")
    return list({os.path.realpath(file): file for file in reversed(files)}.values())[::-1], problems


def colour_of(label):
    """Return a bright BGR colour for a class; neighbours in the list of classes differ clearly in hue."""
    hue = round(label * 0.618034 % 1 * 180) % 180
    return tuple(int(c) for c in cv2.cvtColor(np.uint8([[[hue, 200, 235]]]), cv2.COLOR_HSV2BGR)[0, 0])


def drawable_names(classes):
    """Return the names of the classes as OpenCV can draw them: where its font lacks a letter, the class's number."""
    return [name if name.isascii() else f"class {number}" for number, name in enumerate(classes, 1)]


def draw(image, detections, classes):
    """Return a copy of the image [h, w, 3] with each detection's box, class and score, the best on top."""
    image, names = image.copy(), drawable_names(classes)
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / 300))
    for box, _, label in reversed(list(zip(*detections))):
        x1, y1, x2, y2 = np.clip(box, 0, [width - 1, height - 1] * 2).round().astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), colour_of(label), line)
    for box, score, label in reversed(list(zip(*detections))):
        draw_label(image, box, f"{names[label]} {score:.2f}", colour_of(label))
    return image


def draw_label(image, box, text, colour):
    """Write a text on a patch of colour at the box's upper left corner, moved and shrunk to stay in the image."""
    height, width = image.shape[:2]
    font, size = cv2.FONT_HERSHEY_SIMPLEX, np.clip(min(height, width) / 1000, 0.4, 1.5)
    text_width = cv2.getTextSize(text, font, size, 1)[0][0] + 4
    size *= min(1, width / text_width)
    thickness = max(1, round(size * 1.5))
    (text_width, text_height), baseline = cv2.getTextSize(text, font, size, thickness)
    patch_width, patch_height = text_width + 4, text_height + baseline + 2
    x = int(np.clip(box[0], 0, max(width - patch_width, 0)))
    y = int(np.clip(box[1] - patch_height, 0, max(height - patch_height, 0)))
    cv2.rectangle(image, (x, y), (x + patch_width - 1, y + patch_height - 1), colour, cv2.FILLED)
    bright = np.dot(colour, [0.114, 0.587, 0.299]) > 128
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(image, text, (x + 2, y + text_height + 1), font, size, ink, thickness, cv2.LINE_AA)


def write_file(path, data):
    """Write bytes to a file that has its name only once it is whole."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def as_coco(detections, image_id, file_name, classes, category_ids):
    """Return the detections in a picture as entries of COCO's result list.

    Not rounded: thousandths of a pixel move an average precision by 1e-4.
    """
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": category_ids[label],
            "category": classes[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, label in zip(*(field.tolist() for field in detections))
    ]


def image_id_of(path):
    """Return a file's stem, as a number where it is one, as COCO names its pictures."""
    stem = Path(path).stem
    return int(stem) if stem.isdecimal() else stem


def print_table(detections, classes):
    """Print the detections, one a line."""
    width = max([len(name) for name in classes] + [5])
    print(f"{'class':{width}}  score       x1       y1       x2       y2")
    for box, score, label in zip(*detections):
        print(f"{classes[label]:{width}}  {score:.3f} " + " ".join(f"{side:8.1f}" for side in box))


class Stopwatch:
    """Adds up the milliseconds between the stages of the pipeline; its `record` is what FasterRCNN calls."""

    def __init__(self):
        self.milliseconds, self.last = {}, None

    def start(self):
        """Begin with another picture."""
        self.last = time.perf_counter()

    def record(self, stage, **arrays):
        """Count the time since the last stage as this one's."""
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0) + (now - self.last) * 1000
        self.last = now

    def summary(self, pictures):
        """Return the mean milliseconds of each stage as one line."""
        means = {stage: total / pictures for stage, total in self.milliseconds.items()}
        return " + ".join(f"{stage} {ms:.1f}" for stage, ms in means.items()) + f" = {sum(means.values()):.1f} ms"


def free_name(path, taken):
    """Return a file name for the annotated picture that is not taken, and take it."""
    stem, number = Path(path).stem, 1
    name = f"{stem}.png"
    while name in taken:
        number += 1
        name = f"{stem}_{number}.png"
    taken.add(name)
    return name


def run(detector, files, out, score_threshold, show):
    """Detect in every file, write the annotated pictures and detections.json; return the number of failures."""
    watch, entries, names, failures = Stopwatch(), [], [], 0
    taken = {Path(path).name for path in files if Path(path).resolve().parent == out.resolve()}  # never an input
    category_ids = range(1, len(detector.classes) + 1)
    try:
        for path in tqdm(files, unit="picture", disable=len(files) == 1):
            try:
                detections, name = detect_and_draw(detector, path, out, taken, score_threshold, show, watch)
            except (ModelError, OSError, ValueError, MemoryError, cv2.error) as error:
                failures += 1
                tqdm.write(f"demo.py: {printable(path)}: {first_line(error)}", file=sys.stderr)
                continue
            names.append(name)
            entries += as_coco(detections, image_id_of(path), Path(path).name, detector.classes, category_ids)
            if len(files) == 1:
                print(f"{printable(path)}: {len(detections.boxes)} detections")
                print_table(detections, detector.classes)
    finally:  # also when interrupted
        if names:
            write_file(out / "detections.json", json.dumps(entries, indent=1).encode())
            print(watch.summary(len(names)))
            written = [out / (names[0] if len(files) == 1 else "*.png"), out / "detections.json"]
            print(f"{len(names)} annotated, {len(entries)} detections: {', '.join(map(printable, written))}")
    return failures


def detect_and_draw(detector, path, out, taken, score_threshold, show, watch):
    """Detect in the picture of a file and write it annotated; return the confident detections and its new name."""
    image = read_picture(path)
    watch.start()
    detections = detector(image, watch.record)
    confident = detections.scores >= score_threshold
    detections = Detections(*(field[confident] for field in detections))
    annotated, name = draw(image, detections, detector.classes), free_name(path, taken)
    write_file(out / name, cv2.imencode(".png", annotated)[1].tobytes())
    if show:
        cv2.imshow(printable(name), annotated)
        cv2.waitKey()
    return detections, name


def read_score(text):
    """Return a score, 0 to 1, that stands on the command line."""
    try:
        score = float(text)
    except ValueError:
        score = np.nan
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return score


def can_show():
    """Return whether a window can be opened; asked of another process, because without a display Qt aborts."""
    code = "import cv2; cv2.namedWindow('test')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        default=[str(HERE / "asset" / "shapes.png")],
        help="a picture, a folder or a glob (default: the bundled picture)",
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        default=default_model(),
        help="folder of model1.onnx and model2.onnx "
        "(default: ckpt if it holds an export, else the bundled ckpt/shapes)",
    )
    parser.add_argument("--out", metavar="DIR", default="output", help="folder for the results (default: output)")
    parser.add_argument(
        "--score-thr",
        metavar="S",
        type=read_score,
        default=0.3,
        help="lowest score that is drawn and written (default: 0.3)",
    )
    parser.add_argument("--show", action="store_true", help="show each picture in a window until a key is pressed")
    args = parser.parse_args(arguments)
    if args.show and not can_show():
        parser.error("--show needs a display and an OpenCV that opens windows")
    return args


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    files, problems = find_pictures(args.paths)
    for problem in problems:
        print(f"demo.py: {problem}", file=sys.stderr)
    if not files:
        return 2
    try:
        detector = FasterRCNN(args.model)
        print(f"model: {args.model} ({len(detector.classes)} classes)")
        Path(args.out).mkdir(parents=True, exist_ok=True)
        failures = run(detector, files, Path(args.out), args.score_thr, args.show)
    except (ModelError, OSError) as error:
        print(f"demo.py: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo.py: interrupted: what was done is written", file=sys.stderr)
        return 130
    if failures == len(files):
        return 2
    return 1 if failures or problems else 0


def run_program(main):
    """Run a program's main and exit with its status, whatever stdout is: closed, full, or short of letters."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that cannot be shown is no reason to stop
    status = main()
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again, and complain
        if status == 0:
            print(f"{Path(sys.argv[0]).name}: stdout: {first_line(error)}", file=sys.stderr)
            status = 1
    sys.exit(status)


if __name__ == "__main__":
    run_program(main)
