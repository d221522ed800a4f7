"""Find objects in pictures with an exported detector: two ONNX networks, and NumPy for everything else.

python demo.py                      the bundled picture
python demo.py PATH ...             pictures, folders, globs, videos, or camera:0

Writes to the folder --out: the annotated pictures, detections.json (COCO's list of results) and pictures.json (the
pictures it refers to, or the frames). Of an animation, the first picture is taken. Exit status: 0 all well, 1 some
pictures failed and the rest was done, 2 nothing could be done, 130 interrupted.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # read when cv2 is imported; 1.6 GB as float32
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what goes wrong is raised, and reported by us
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # so is what is wrong with a video

try:
    import cv2
    import numpy as np
    from tqdm import tqdm

    import pictures
    import videos
    from detectors import BUNDLED, ModelError, default_folder, load, one_line
    from videos import Video, VideoError
except ImportError as error:  # --help works all the same
    MISSING = error
else:
    MISSING = None

PICTURE = Path(__file__).resolve().parent / "asset" / "shapes.png"


class Stopwatch:
    """Adds up the milliseconds of each stage of a detector; pass its `record` to the detector."""

    def __init__(self):
        self.milliseconds, self.first, self.last = {}, None, None

    def start(self):
        """Begin with another picture."""
        self.first = self.last = time.perf_counter()

    def record(self, stage, **arrays):
        """Count the time since the last stage as this one's."""
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0) + (now - self.last) * 1000
        self.last = now

    def elapsed(self):
        """Return the milliseconds that the last picture took."""
        return (self.last - self.first) * 1000

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


def counts(found, classes):
    """Return how many Detections of each class there are, as text."""
    labels, numbers = np.unique(found.labels, return_counts=True)
    return ", ".join(f"{number} {classes[label]}" for label, number in zip(labels, numbers)) or "nothing"


def originals_among(files):
    """Return the files that no earlier run annotated, and say which are left out."""
    annotated = dict.fromkeys(filter(pictures.is_annotated, files))
    if annotated:
        more = f" and {len(annotated) - 1} more" if len(annotated) > 1 else ""
        first = pictures.printable(next(iter(annotated)))
        print(f"demo.py: left out, annotated by an earlier run: {first}{more}", file=sys.stderr)
    return [file for file in files if file not in annotated]


def run(detector, files, args):
    """Detect in every file and write what was found; return how many files failed, and how many pictures were done."""
    watch, images, results, taken, failures = Stopwatch(), [], [], set(), 0
    category_ids, listed = range(1, len(detector.classes) + 1), pictures.coco_images(files)
    frame_ids = itertools.count(1 + max((image["id"] or 0 for image in listed), default=0))
    try:
        for file, image in zip(tqdm(files, unit="picture", disable=len(files) == 1), listed):
            annotate = annotate_video if videos.is_video(file) else annotate_picture
            try:
                for entry, found, annotated in annotate(detector, file, taken, watch, args):
                    entry = {**image, **entry, "height": annotated.shape[0], "width": annotated.shape[1]}
                    if annotate is annotate_video:
                        entry["id"] = next(frame_ids)
                    else:
                        tell(file, found, detector.classes, watch, len(files) == 1)
                    images.append(entry)
                    results += pictures.coco_results(found, entry, detector.classes, category_ids)
                    if args.show:
                        show(annotated, annotate is annotate_picture)
            except (ModelError, VideoError, OSError, ValueError, MemoryError, cv2.error) as error:
                failures += 1
                tqdm.write(f"demo.py: {pictures.about(file, error)}", file=sys.stderr)
    finally:  # also when interrupted
        if images:
            write_results(args.out, images, results, zip(category_ids, detector.classes))
            print(watch.summary(len(images)))
            drawn = args.out / (images[0]["annotated"] if len(files) == 1 else "*")
            written = ", ".join(map(pictures.printable, [drawn, args.out / "detections.json"]))
            print(f"{len(images)} annotated, {len(results)} detections: {written}")
    return failures, len(images)


def tell(file, found, classes, watch, alone):
    """Print what was found in a picture: a table if it is the only one, else a line."""
    if alone:
        print(f"{pictures.printable(file)}: {len(found.boxes)} detections")
        print_table(found, classes)
    else:
        text = f"{counts(found, classes)} ({watch.elapsed():.0f} ms)"
        tqdm.write(f"{pictures.printable(file)}: {text}", file=sys.stdout)


def annotate_picture(detector, file, taken, watch, args):
    """Detect in the picture of a file and write it annotated; yield its entry, its Detections, the annotated image."""
    image, stages = pictures.read_picture(file), {}

    def record(stage, **arrays):
        watch.record(stage)
        if args.save_stages:
            stages.update({f"{stage}.{name}": np.asarray(array) for name, array in arrays.items()})

    watch.start()
    found = detector(image, record)
    if args.save_stages:
        pictures.save_stages(args.save_stages, stages)
    found = chosen(found, args)
    annotated, name = pictures.draw(image, found, detector.classes), pictures.free_name(file, args.out, taken)
    pictures.write_file(args.out / name, pictures.annotated_png(annotated))
    yield {"annotated": name}, found, annotated


def annotate_video(detector, file, taken, watch, args):
    """Write a video, or what a camera sees, annotated; yield for each frame what annotate_picture does for a picture.

    The next frames are read while the networks work. Interrupted, it closes the file, which plays as far as it goes.
    """
    video = Video(file)
    stem = file.replace(":", "_") if video.live else file
    of_camera = Path(stem).stem.startswith("camera_")  # what one saw is nowhere else
    name = pictures.free_name(stem, args.out, taken, ".mp4", replace=not of_camera)
    total = -(-video.length // args.every) or None
    with videos.Writer(args.out / name, video.rate / args.every) as writer:
        written = pictures.printable(args.out / name)
        print(f"{pictures.printable(file)}: {writer.rate:g} frames a second, to {written} ({videos.CODEC})")
        for frame in tqdm(video.frames(args.every), total=total, unit="frame"):
            watch.start()
            found = chosen(detector(frame.image, watch.record), args)
            annotated = pictures.draw(frame.image, found, detector.classes)
            writer.write(annotated, frame.seconds if video.live else None)
            yield {"annotated": name, "frame": frame.number, "seconds": round(frame.seconds, 3)}, found, annotated


def chosen(found, args):
    """Return those of the Detections that are confident, and of the classes that were asked for."""
    found = found.where(found.scores >= args.score_thr)
    return found if args.labels is None else found.where(np.isin(found.labels, args.labels))


def chosen_labels(names, classes):
    """Return the positions of classes, given as "name,name", in their list; ModelError if there is no such class.

    None, for all classes, stays None.
    """
    if names is None:
        return None
    names = [names] if names in classes else [name.strip() for name in names.split(",")]
    missing = [name for name in names if name not in classes or not name]
    if missing:
        raise ModelError(f"--classes: the model has no class {missing[0]!r}; it has {', '.join(filter(None, classes))}")
    return [label for label, name in enumerate(classes) if name in names]


def write_results(out, images, results, categories):
    """Write what COCO("pictures.json").loadRes("detections.json") reads."""
    categories = [{"id": category_id, "name": name} for category_id, name in categories]
    listed = {"info": {}, "images": images, "annotations": [], "categories": categories}
    for name, content in (("detections.json", results), ("pictures.json", listed)):
        pictures.write_file(out / name, json.dumps(content, indent=1).encode())


def show(image, wait):
    """Show an image, always in the same window; `wait` until a key is pressed or the window is closed."""
    title = "demo.py: any key for the next" if wait else "demo.py: Ctrl-C ends"
    cv2.imshow(title, image)
    cv2.waitKey(1)
    while wait and cv2.waitKey(100) < 0 and cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) >= 1:
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
    add("paths", nargs="*", metavar="PATH",
        help="a picture, a folder, a glob, a video or camera:0 (default: the bundled picture)")  # fmt: skip
    add("--model", metavar="EXPORT", type=Path, default=None if MISSING else default_folder(),
        help="a folder, or a detector in one file (default: ckpt if it holds an export, else ckpt/shapes)")  # fmt: skip
    add("--out", metavar="DIR", type=Path, default=Path("output"), help="folder for the results (default: output)")
    add("--score-thr", metavar="S", type=read_score, default=0.3,
        help="lowest score drawn and written (default: 0.3); the model's own threshold still applies")  # fmt: skip
    add("--set", metavar="NAME=VALUE", dest="options", action="append", default=[],
        type=None if MISSING else pictures.name_and_value,
        help="another value for a setting of the model, such as head.iou_threshold=0.6; may be repeated")  # fmt: skip
    add("--recursive", action="store_true", help="also take what is in the folders of folders")
    add(
        "--every",
        metavar="N",
        type=None if MISSING else pictures.number_of("frames"),
        default=1,
        help="take every Nth frame of a video (default: 1)",
    )
    add("--classes", metavar="NAME[,NAME]", help="draw and write these classes only")
    add("--save-stages", metavar="FILE.npz", type=Path,
        help="of a single picture: save the arrays of every stage, for those who port and compare")  # fmt: skip
    if not MISSING:
        pictures.add_execution(add)
    add("--show", action="store_true", help="show each picture in a window until a key is pressed")
    args = parser.parse_args(arguments)
    if args.show and not can_show():
        parser.error("--show needs a display and an OpenCV that opens windows")
    return args


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        files, problems = pictures.find_pictures(args.paths or [str(PICTURE)], args.recursive)
        for problem in problems:
            print(f"demo.py: {problem}", file=sys.stderr)
        originals = originals_among(files)
        if not originals:
            return 2
        if args.save_stages:
            pictures.check_save_stages(args.save_stages, originals)
        detector = load(args.model, args.options, pictures.execution_of(args))
        args.labels = chosen_labels(args.classes, detector.classes)
        print(f"model: {args.model} ({sum(map(bool, detector.classes))} classes)")
        if args.paths and args.model.resolve() == BUNDLED:
            shapes = ", ".join(detector.classes)
            print(f"It knows drawn shapes only ({shapes}): what it finds in a photograph is nonsense.")
            print("COCO's 80 classes: uv run --extra torchvision export.py torchvision:fasterrcnn_resnet50_fpn. "
                  "Your own export: --model DIR")  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        failures, done = run(detector, originals, args)
    except (ModelError, OSError) as error:
        print(f"demo.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo.py: interrupted: what was done is written", file=sys.stderr)
        return 130
    finally:
        if args.show:
            cv2.destroyAllWindows()
    if not done:
        return 2
    return 1 if failures or problems else 0


if __name__ == "__main__":
    if MISSING:
        read_arguments(None)
        hint = ": uv run demo.py installs it, or pip install ." if isinstance(MISSING, ModuleNotFoundError) else ""
        print(f"demo.py: {MISSING}{hint}", file=sys.stderr)
        sys.exit(2)
    pictures.run_program(main)
