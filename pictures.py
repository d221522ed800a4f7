"""What the programs share: find, read and draw pictures, write files, and end with an exit status."""

import argparse
import glob
import io
import os
import secrets
import signal
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np

import videos
from detectors import Execution, ModelError, one_line, rle
from detectors.networks import short

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # of what is taken from a folder

# ---------------------------------------------------------------------- find and read


def printable(path):
    """Return a path in a form that prints on one line."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def about(path, error):
    """Return what is wrong with a file as one line that begins with its name."""
    name, text = printable(path), one_line(error)
    return text if text.startswith(name) else f"{name}: {text}"


def is_annotated(path):
    """Return whether a file is a picture or a video that was annotated here."""
    if not os.path.isfile(path):  # opening a pipe would wait forever
        return False
    try:
        with open(path, "rb") as file:
            if videos.MARK in file.read(100):
                return True
            file.seek(max(0, os.path.getsize(path) - 100))
            return videos.is_video(path) and file.read().endswith(videos.MARK)
    except OSError:
        return False


def pictures_in(folder, recursive=False):
    """Return the pictures in a folder, sorted; what is not a regular file, such as a pipe, is left out."""
    paths = Path(folder).rglob("*") if recursive else Path(folder).iterdir()
    named = sorted(str(path) for path in paths if path.suffix.lower() in SUFFIXES)
    return [path for path in named if os.path.isfile(path) or not os.path.exists(path)]


def unreadable_folders(folder):
    """Return a line for each folder in a folder, at any depth, that may not be read."""
    lines = []
    for _ in os.walk(folder, onerror=lambda error: lines.append(about(error.filename, error))):
        pass
    return lines


def find_pictures(paths, recursive=False):
    """Return the files that the paths (pictures, folders, globs) name, in order, and a line for each that has none.

    With `recursive`, also what is in the folders of folders.
    """
    files, problems = [], []
    for path in paths:
        for match in [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]:
            if os.path.isfile(match) or videos.is_camera(match):
                files.append(match)
                continue
            found = []
            if not os.path.isdir(match):
                problem = "not a regular file" if os.path.exists(match) else "no such file"
            elif not os.access(match, os.R_OK | os.X_OK):
                problem = "this folder may not be read"
            else:
                found, problem = pictures_in(match, recursive), "no pictures in this folder"
                if recursive:  # rglob passes over them
                    problems += unreadable_folders(match)
            files += found
            if not found:
                problems.append(f"{printable(match)}: {problem}")
    once = {}
    for file in files:
        once.setdefault(os.path.realpath(file), file)
    return list(once.values()), problems


def read_picture(path):
    """Return the picture in a file as [h, w, 3] uint8 BGR, turned as its EXIF says; ValueError if there is none."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe, say: reading it would wait forever
        raise ValueError("not a regular file")
    data = np.fromfile(path, np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    except cv2.error as error:
        if "CV_IO_MAX" not in str(error):
            raise
        limit = os.environ.get("OPENCV_IO_MAX_IMAGE_PIXELS", "OpenCV's limit of")
        reason = f"more than {limit} pixels: OPENCV_IO_MAX_IMAGE_PIXELS in the environment allows more"
        raise ValueError(reason) from error
    if image is None:
        raise ValueError("not a picture that OpenCV can read")
    return image


# ---------------------------------------------------------------------- as COCO names and lists them


def coco_images(files):
    """Return an entry of COCO's list of images for each file: an id (None of a video) and a file name of its own.

    The id is the number that the file is named after, as in COCO's own data, if that makes all ids different; else
    they count from 1. The file name is the path from the folder that holds all files.
    """
    stems = [Path(file).stem for file in files if not videos.is_video(file)]
    ids = [int(stem) if stem.isdecimal() and len(stem) < 19 else None for stem in stems]  # 64 bits hold 18 digits
    if None in ids or len(set(ids)) < len(ids):
        ids = range(1, len(files) + 1)
    ids, named = iter(ids), [file for file in files if not videos.is_camera(file)]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in named]) if named else ""
    return [
        {
            "id": None if videos.is_video(file) else next(ids),
            "file_name": file if videos.is_camera(file) else os.path.relpath(os.path.abspath(file), root),
        }
        for file in files
    ]


def coco_results(found, image, classes, category_ids):
    """Return the Detections in one of COCO's images as entries of its list of results.

    Not rounded: thousandths of a pixel move an average precision by 1e-4.
    """
    results = [
        {
            "image_id": image["id"],
            "file_name": image["file_name"],
            "category_id": category_ids[label],
            "category": classes[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for (x1, y1, x2, y2), score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist())
    ]
    if found.masks is not None:
        for result, mask in zip(results, found.masks):
            result["segmentation"] = mask
    return results


# ---------------------------------------------------------------------- draw


def colour_of(label):
    """Return a bright BGR colour for a class; neighbours in the list of classes differ clearly in hue."""
    hue = round(label * 0.618034 % 1 * 180) % 180
    return tuple(int(c) for c in cv2.cvtColor(np.uint8([[[hue, 200, 235]]]), cv2.COLOR_HSV2BGR)[0, 0])


def drawable_names(classes):
    """Return the classes' names as OpenCV can draw them: its font is ASCII, others become the class's number."""
    return [name if name and name.isascii() else f"class {number}" for number, name in enumerate(classes, 1)]


def draw(image, found, classes):
    """Return a copy of the image [h, w, 3] with each of the Detections, the best on top: mask, box, class, score."""
    image, names = image.copy(), drawable_names(classes)
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / 300))
    detections = list(zip(found.boxes, found.scores, found.labels))[::-1]
    if found.masks is not None:
        for mask, label in zip(found.masks[::-1], found.labels[::-1]):
            draw_mask(image, rle.decode(mask), colour_of(label), line)
    for box, _, label in detections:
        x1, y1, x2, y2 = np.clip(box, 0, [width - 1, height - 1] * 2).round().astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), colour_of(label), line)
    for box, score, label in detections:
        draw_label(image, box, f"{names[label]} {score:.2f}", colour_of(label))
    return image


def draw_mask(image, mask, colour, line):
    """Tint the pixels of a mask [h, w] in an image, and draw the outline of each of its parts and holes."""
    image[mask] = image[mask] // 2 + np.uint8(colour) // 2
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, outlines, -1, colour, line)


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


# ---------------------------------------------------------------------- write


def annotated_png(image):
    """Return an image as the bytes of a PNG that carries our mark."""
    png = cv2.imencode(".png", image)[1].tobytes()
    chunk = b"tEXt" + videos.MARK
    chunk = struct.pack(">I", len(videos.MARK)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + chunk + png[33:]  # behind the signature and the header


def free_name(file, out, taken, suffix=".png", replace=True):
    """Return a name for the annotated version of a file in the folder `out`, and add it to those that are taken.

    Nothing is overwritten there but, with `replace`, what earlier runs annotated.
    """
    stem, number = Path(file).stem, 1
    name = f"{stem}{suffix}"
    while name in taken or (os.path.lexists(out / name) and not (replace and is_annotated(out / name))):
        number += 1
        name = f"{stem}_{number}{suffix}"
    taken.add(name)
    return name


def write_file(path, data):
    """Write bytes to a file that has its name only once it is whole."""
    partial = path.parent / f".{secrets.token_hex(8)}.partial"
    try:
        with partial.open("xb") as file:
            file.write(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_save_stages(path, files):
    """Refuse a file for the stages that cannot be: ModelError. One that is there is replaced."""
    if len(files) > 1 or videos.is_video(files[0]):
        raise ModelError(f"--save-stages: name one picture, not {'a video' if len(files) == 1 else len(files)}")
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise ModelError(f"--save-stages {printable(path)}: name an .npz file in a folder that is there")


def save_stages(path, stages):
    """Save the arrays of every stage to an .npz file, "stage.name" each; masks as [d, h, w] of booleans."""
    arrays = dict(stages)
    if "paste.masks" in arrays:
        size = arrays["preprocess.original_size"]
        arrays["paste.masks"] = np.array([rle.decode(mask) for mask in arrays["paste.masks"]], bool).reshape(-1, *size)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getvalue())
    print(f"{len(arrays)} arrays: {printable(path)}")


# ---------------------------------------------------------------------- start and end of a program


def name_and_value(text):
    """Return the two parts of NAME=VALUE on a command line."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip(), value.strip()


def number_of(things, most=10**6):
    """Return a function that reads a number of things, 1 or more, from a command line."""

    def read(text):
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number of {things}, 1 to {most}")
        return int(text)

    return read


def add_execution(add):
    """Add the options that say on what a detector runs to those of a program; see execution_of."""
    add("--provider", metavar="NAME[,NAME]", dest="providers",
        help="run on another execution provider of onnxruntime, such as CUDA; the CPU does what it cannot")  # fmt: skip
    add("--provider-option", metavar="KEY=VALUE", dest="provider_options", action="append", default=[],
        type=name_and_value, help="an option of the first provider, such as device_id=1; may be repeated")  # fmt: skip
    add(
        "--threads",
        metavar="N",
        type=number_of("threads", 1024),
        default=0,
        help="of the CPU (default: as many as it has cores)",
    )


def execution_of(args):
    """Return the Execution that the options of add_execution ask for."""
    names = () if args.providers is None else tuple(name.strip() for name in args.providers.split(","))
    if args.provider_options and (not names or short(names[0]) == "cpu"):
        raise ModelError("--provider-option: name the --provider that it is for; the CPU has no options")
    return Execution(names, dict(args.provider_options), args.threads)


def run_program(main):
    """Run a program's main and exit with its status, even if stdout is closed, full, or cannot encode a name.

    The signal that `kill`, `timeout` and `docker stop` send interrupts it as Ctrl-C does: KeyboardInterrupt.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; else the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # a name that cannot be shown is shown escaped
    status = main()
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again, and complain
        if status == 0:
            print(f"{Path(sys.argv[0]).name}: stdout: {error}", file=sys.stderr)
            status = 1
    sys.exit(status)
