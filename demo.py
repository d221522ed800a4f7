"""Find objects in pictures with an exported detector: two ONNX networks, and NumPy for everything else.

python demo.py                      the bundled picture
python demo.py PATH ...             pictures, folders or globs

Writes to the folder --out: the annotated pictures, detections.json (COCO's list of results) and pictures.json (the
pictures it refers to). Of an animation, the first picture is taken. Exit status: 0 all well, 1 some pictures
failed and the rest was done, 2 nothing could be done, 130 interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # read when cv2 is imported; 1.6 GB as float32
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what goes wrong is raised, and reported by us

try:
    import cv2
    from tqdm import tqdm

    import pictures
    from detectors import BUNDLED, ModelError, default_folder, load, one_line
except ImportError as error:  # --help works all the same
    MISSING = error
else:
    MISSING = None

PICTURE = Path(__file__).resolve().parent / "asset" / "shapes.png"


class Stopwatch:
    """Adds up the milliseconds of each stage of a detector; pass its `record` to the detector."""

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

    def summary(self, count):
        """Return the mean milliseconds of each stage as one line."""
        means = {stage: total / count for stage, total in self.milliseconds.items()}
        return " + ".join(f"{stage} {ms:.1f}" for stage, ms in means.items()) + f" = {sum(means.values()):.1f} ms"


def print_table(found, classes):
    """Print the Detections, one a line."""
    width = max([len(name) for name in classes] + [5])
    print(f"{'class':{width}}  score       x1       y1       x2       y2")
    for box, score, label in zip(found.boxes, found.scores, found.labels):
        print(f"{classes[label]:{width}}  {score:.3f} " + " ".join(f"{side:8.1f}" for side in box))


def run(detector, files, args):
    """Detect in every file and write what was found; return the number of files that failed."""
    watch, images, results, taken, failures = Stopwatch(), [], [], set(), 0
    category_ids = range(1, len(detector.classes) + 1)
    try:
        for file, image in zip(tqdm(files, unit="picture", disable=len(files) == 1), pictures.coco_images(files)):
            try:
                found, annotated, image["annotated"] = detect_and_draw(detector, file, taken, watch, args)
            except (ModelError, OSError, ValueError, MemoryError, cv2.error) as error:
                failures += 1
                tqdm.write(f"demo.py: {pictures.printable(file)}: {one_line(error)}", file=sys.stderr)
                continue
            image["height"], image["width"] = annotated.shape[:2]
            images.append(image)
            results += pictures.coco_results(found, image, detector.classes, category_ids)
            if len(files) == 1:
                print(f"{pictures.printable(file)}: {len(found.boxes)} detections")
                print_table(found, detector.classes)
            if args.show:
                show(annotated)
    finally:  # also when interrupted
        if images:
            write_results(args.out, images, results, zip(category_ids, detector.classes))
            print(watch.summary(len(images)))
            drawn = args.out / (images[0]["annotated"] if len(files) == 1 else "*.png")
            written = ", ".join(map(pictures.printable, [drawn, args.out / "detections.json"]))
            print(f"{len(images)} annotated, {len(results)} detections: {written}")
    return failures


def detect_and_draw(detector, file, taken, watch, args):
    """Detect in the picture of a file and write it annotated; return the confident Detections, the image, its name."""
    image = pictures.read_picture(file)
    watch.start()
    found = detector(image, watch.record)
    found = found.where(found.scores >= args.score_thr)
    annotated, name = pictures.draw(image, found, detector.classes), pictures.free_name(file, args.out, taken)
    pictures.write_file(args.out / name, pictures.annotated_png(annotated))
    return found, annotated, name


def write_results(out, images, results, categories):
    """Write what COCO("pictures.json").loadRes("detections.json") reads."""
    categories = [{"id": category_id, "name": name} for category_id, name in categories]
    listed = {"info": {}, "images": images, "annotations": [], "categories": categories}
    for name, content in (("detections.json", results), ("pictures.json", listed)):
        pictures.write_file(out / name, json.dumps(content, indent=1).encode())


def show(image, title="demo.py: any key for the next"):
    """Show an image, always in the same window, until a key is pressed or the window is closed."""
    cv2.imshow(title, image)
    while cv2.waitKey(100) < 0 and cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) >= 1:
        pass


def can_show():
    """Return whether a window can be opened; another process tries, because without a display Qt aborts."""
    code = "import cv2; cv2.namedWindow('test')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def read_score(text):
    """Return a score given on the command line."""
    try:
        score = float(text)
    except ValueError:
        score = -1
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return score


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="a picture, a folder or a glob (default: the bundled picture)")
    add("--model", metavar="DIR", type=Path, default=None if MISSING else default_folder(),
        help="folder of an export (default: ckpt if it holds one, else the bundled ckpt/shapes)")  # fmt: skip
    add("--out", metavar="DIR", type=Path, default=Path("output"), help="folder for the results (default: output)")
    add("--score-thr", metavar="S", type=read_score, default=0.3,
        help="lowest score drawn and written (default: 0.3); the model's own threshold still applies")  # fmt: skip
    add("--set", metavar="NAME=VALUE", dest="options", action="append", default=[],
        type=None if MISSING else pictures.name_and_value,
        help="another value for a setting of the model, such as head.iou_threshold=0.6; may be repeated")  # fmt: skip
    add("--show", action="store_true", help="show each picture in a window until a key is pressed")
    args = parser.parse_args(arguments)
    if args.show and not can_show():
        parser.error("--show needs a display and an OpenCV that opens windows")
    return args


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        files, problems = pictures.find_pictures(args.paths or [str(PICTURE)])
        for problem in problems:
            print(f"demo.py: {problem}", file=sys.stderr)
        originals = [file for file in files if not pictures.is_annotated(file)]
        if len(originals) < len(files):
            print(f"demo.py: left out, annotated by an earlier run: {len(files) - len(originals)}", file=sys.stderr)
        if not originals:
            return 2
        detector = load(args.model, args.options)
        print(f"model: {args.model} ({sum(map(bool, detector.classes))} classes)")
        if args.paths and args.model.resolve() == BUNDLED:
            shapes = ", ".join(detector.classes)
            print(f"It knows drawn shapes only ({shapes}): what it finds in a photograph is nonsense.")
            print("COCO's 80 classes: uv run --extra torchvision export.py torchvision:fasterrcnn_resnet50_fpn. "
                  "Your own export: --model DIR")  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        failures = run(detector, originals, args)
    except (ModelError, OSError) as error:
        print(f"demo.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo.py: interrupted: what was done is written", file=sys.stderr)
        return 130
    finally:
        if args.show:
            cv2.destroyAllWindows()
    if failures == len(originals):
        return 2
    return 1 if failures or problems else 0


if __name__ == "__main__":
    if MISSING:
        read_arguments(None)
        hint = ": uv run demo.py installs it" if isinstance(MISSING, ModuleNotFoundError) else ""
        print(f"demo.py: {MISSING}{hint}", file=sys.stderr)
        sys.exit(2)
    pictures.run_program(main)
