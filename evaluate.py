"""Measure an exported Faster R-CNN on a data set with COCO's annotations: the twelve numbers of COCO.

python evaluate.py ANNOTATIONS FOLDER                  detect in every picture that the file names, then evaluate
python evaluate.py ANNOTATIONS FOLDER --resume         go on after an interruption
python evaluate.py ANNOTATIONS FOLDER --shard 3/16     only every sixteenth picture, from the third on
python evaluate.py ANNOTATIONS FOLDER --merge          join the shards, when all are done, and evaluate

Writes detections.json, COCO's list of results, to the folder --out; until it is whole, a line a picture in a partial
file beside it. Exit status: 0 all well, 1 some pictures failed and the rest was evaluated, 2 nothing could be done,
130 interrupted.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

import demo  # first, because it sets the limits of cv2

# isort: split
import cv2
import numpy as np
from tqdm import tqdm

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError:
    COCO = None

READERS, PICTURES_AHEAD = 2, 4  # threads that read and preprocess, and how far they may be ahead of the networks


class EvaluationError(Exception):
    """Nothing can be evaluated; the message says why and what to do."""


def is_id(value):
    """Return whether a value can be an id."""
    return isinstance(value, int)


def is_text(value):
    """Return whether a value is a text."""
    return isinstance(value, str)


def is_number(value):
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and abs(value) < 1e9


def is_box(value):
    """Return whether a value is x, y, width, height."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_flag(value):
    """Return whether a value is 0 or 1."""
    return isinstance(value, int) and value in (0, 1)


FIELDS = {  # what pycocotools relies on, and fails without when all pictures are done
    "images": {"id": is_id, "file_name": is_text},
    "categories": {"id": is_id, "name": is_text},
    "annotations": {"image_id": is_id, "category_id": is_id, "bbox": is_box, "area": is_number, "iscrowd": is_flag},
}


def read_annotations(path):
    """Return the annotations of a file as pycocotools' COCO."""
    if COCO is None:
        raise EvaluationError("pycocotools is missing: pip install pycocotools, or uv run --extra evaluate evaluate.py")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            coco = COCO(str(path))
    except OSError:
        raise
    except Exception as error:  # whatever is wrong with a file, it trips over somewhere
        raise EvaluationError(f"{path} is no annotation file of COCO: {demo.first_line(error)}") from error
    for kind, expected in FIELDS.items():
        for entry in coco.dataset.get(kind, [] if kind == "annotations" else [{}]):  # the test sets of COCO have none
            wrong = [name for name, fits in expected.items() if not fits(entry.get(name))]
            if wrong:
                raise EvaluationError(f"{path} is not of COCO's format: one of its {kind} has no valid {wrong[0]}")
    if not coco.imgs:
        raise EvaluationError(f"{path} names no pictures")
    names = [category["name"] for category in coco.cats.values()]
    if len(set(names)) < len(names):
        raise EvaluationError(f"{path} has two categories of one name")
    return coco


def category_ids(coco, classes):
    """Return the category id of each class, found by its name: COCO's ids have gaps."""
    ids = {category["name"]: category["id"] for category in coco.cats.values()}
    unknown = [name for name in classes if name not in ids]
    absent = [name for name in ids if name not in classes]
    if unknown:
        raise EvaluationError(f"the annotations do not know these classes of the model: {', '.join(unknown)}")
    if absent:
        raise EvaluationError(f"the model does not know these classes of the annotations: {', '.join(absent)}")
    return [ids[name] for name in classes]


# ---------------------------------------------------------------------- the partial file


def describe_run(pair, annotations, folder):
    """Return the header of a partial file: what the results of all shards must have in common."""
    return {
        "pair": pair,
        "annotations": hashlib.sha256(annotations.read_bytes()).hexdigest(),
        "folder": Path(os.path.abspath(folder)).name,  # not where it is: another machine may have it elsewhere
    }


def read_partial(path, header):
    """Return the records in a partial file, {image_id: record}."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut while it was written
        found, *records = [json.loads(line) for line in lines] or [header]
        found, records = dict(found), {record["image_id"]: record for record in records}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged ({demo.first_line(error)}): delete it") from error
    for key, name in {"pair": "model", "annotations": "annotation file", "folder": "folder of pictures"}.items():
        if found.get(key) != header[key]:
            raise EvaluationError(f"{path} is of another {name}: name that one, or another folder for --out")
    return records


def open_partial(path, header, resume):
    """Return a partial file, open for more records, and the ids of the pictures that it has detections of."""
    if path.exists() and not resume:
        raise EvaluationError(f"{path} is there, of an earlier run: go on with --resume, or delete it")
    records = read_partial(path, header).values() if path.exists() else []
    done = [record for record in records if "detections" in record]  # what failed is tried again
    demo.write_file(path, "".join(json.dumps(line) + "\n" for line in [header, *done]).encode())
    return path.open("a"), {record["image_id"] for record in done}


def merge(paths, header, images, out, may_be_empty=False):
    """Write detections.json from the partial files of all shards; return the number of pictures that failed."""
    records = {}
    for path in paths:
        for image_id, record in read_partial(path, header).items():
            if "detections" in record or image_id not in records:  # a failure never replaces a result
                records[image_id] = record
    missing = [image["file_name"] for image in images if image["id"] not in records]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(images)} pictures are in no shard in {out}, "
            f"the first is {demo.printable(missing[0])}: "
            "run the shards that are missing, and those that were interrupted with --resume"
        )
    entries = [entry for image in images for entry in records[image["id"]].get("detections", [])]
    if not entries and not may_be_empty:
        raise EvaluationError("nothing was detected in any picture, so there is nothing to evaluate")
    demo.write_file(out / "detections.json", ("[" + ",\n".join(map(json.dumps, entries)) + "]\n").encode())
    return sum("error" in record for record in records.values())


# ---------------------------------------------------------------------- detecting


def prepare(path, settings):
    """Return a picture as the first network takes it, see demo.preprocess."""
    return demo.preprocess(demo.read_picture(path), **settings)


def prepared_pictures(images, folder, settings):
    """Yield each of COCO's images with a future of its preprocessing, done by threads while the networks work."""
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        ahead = collections.deque()
        try:
            for image in images:
                ahead.append((image, pool.submit(prepare, folder / image["file_name"], settings)))
                if len(ahead) > PICTURES_AHEAD:
                    yield ahead.popleft()
            yield from ahead
        finally:
            for _, future in ahead:
                future.cancel()


def detect_all(detector, ids, images, done, folder, partial):
    """Detect in the images that are not done, and write a line for each as it comes."""
    waiting = [image for image in images if image["id"] not in done]
    with tqdm(initial=len(images) - len(waiting), total=len(images), unit="picture") as progress:
        for image, future in prepared_pictures(waiting, folder, detector.config["preprocess"]):
            record = {"image_id": image["id"]}
            try:
                found = detector.detect_in(*future.result())
                record["detections"] = demo.as_coco(found, image["id"], image["file_name"], detector.classes, ids)
            except (demo.ModelError, OSError, ValueError, MemoryError, cv2.error) as error:
                record["error"] = demo.first_line(error)
                name = demo.printable(image["file_name"])
                tqdm.write(f"evaluate.py: {name}: {record['error']}", file=sys.stderr)
            partial.write(json.dumps(record) + "\n")
            partial.flush()
            progress.update()


# ---------------------------------------------------------------------- COCO's numbers


def evaluate(coco, path):
    """Return pycocotools' evaluation of the results in a file."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(str(path)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def class_precision(evaluation):
    """Return each class's average precision and that at IoU 0.5, {category id: (AP, AP50)}; NaN without objects."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU thresholds, recalls, classes], -1 where undefined
    precision = np.where(precision < 0, np.nan, precision)
    return {
        category: (precision[:, :, k].mean(), precision[0, :, k].mean())
        for k, category in enumerate(evaluation.params.catIds)
    }


def print_class_precision(coco, evaluation):
    """Print a line for each class."""
    width = max(len(category["name"]) for category in coco.cats.values())
    print(f"{'class':{width}}     AP   AP50")
    for category, averages in class_precision(evaluation).items():
        print(f"{coco.cats[category]['name']:{width}}  " + "  ".join(f"{average:.3f}" for average in averages))


def report(coco, path, per_class):
    """Print the twelve numbers of the results in a file and, if wanted, a line for each class."""
    if coco.anns:
        evaluation = evaluate(coco, path)
        evaluation.summarize()  # prints them
        if per_class:
            print_class_precision(coco, evaluation)
    else:
        print("the annotation file has no annotations, so there is nothing to measure")
    print(f"written: {path}")


# ---------------------------------------------------------------------- the command line


def read_shard(text):
    """Return 3/16 as (3, 16)."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not like 3/16, the third of sixteen")
    return int(match[1]), int(match[2])


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "annotations", metavar="ANNOTATIONS", type=Path, help="COCO's JSON file, instances_val2017.json"
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the pictures are that it names")
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        default=demo.default_model(),
        help="folder of model1.onnx and model2.onnx (default: as in demo.py)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("output"), help="for the results (default: output)"
    )
    parser.add_argument("--per-class", action="store_true", help="print the average precision of each class as well")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run whose partial file is in --out, if any"
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--shard", metavar="I/N", type=read_shard, default=(1, 1), help="take every N-th picture from the I-th on"
    )
    parts.add_argument("--merge", action="store_true", help="join the partial files of all shards and evaluate")
    return parser.parse_args(arguments)


def run(args):
    """Do what the command line says; return the exit status."""
    coco = read_annotations(args.annotations)
    if not args.folder.is_dir():
        raise EvaluationError(f"{args.folder} is no folder")
    images = [coco.imgs[image_id] for image_id in sorted(coco.imgs)]
    detector = demo.FasterRCNN(args.model)
    ids = category_ids(coco, detector.classes)
    print(f"model: {args.model} ({len(detector.classes)} classes), {len(images)} pictures in {args.annotations}")
    header = describe_run(detector.config["pair"], args.annotations, args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    shard, shards = args.shard
    path = args.out / f"detections.{shard}-of-{shards}.jsonl"
    if not args.merge:
        partial, done = open_partial(path, header, args.resume)
        with partial:
            detect_all(detector, ids, images[shard - 1 :: shards], done, args.folder, partial)
    if shards > 1:
        records = read_partial(path, header)
        if any(image["id"] not in records for image in images[shard - 1 :: shards]):
            raise EvaluationError(f"{path} lacks pictures: did two processes write it at once? Go on with --resume")
        failures = sum("error" in record for record in records.values())
        print(f"shard {shard}/{shards}: {path}; when all shards are done, evaluate with --merge")
    else:
        paths = sorted(args.out.glob("detections.*-of-*.jsonl")) if args.merge else [path]
        failures = merge(paths, header, images, args.out, may_be_empty=not coco.anns)
        report(coco, args.out / "detections.json", args.per_class)
        if path.exists() and not failures:  # with it, --resume tries only the failed ones again
            path.unlink()
    if failures:
        print(f"evaluate.py: {failures} pictures failed; they count as empty", file=sys.stderr)
    return 1 if failures else 0


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        return run(args)
    except (EvaluationError, demo.ModelError, OSError) as error:
        print(f"evaluate.py: {demo.first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"evaluate.py: interrupted; what is done is in {args.out}: go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    demo.run_program(main)
