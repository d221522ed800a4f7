"""Measure an exported detector on a data set with COCO's annotations: COCO's twelve numbers, of boxes and of masks.

python evaluate.py ANNOTATIONS FOLDER                  detect in every picture that the file names, then evaluate
python evaluate.py ANNOTATIONS FOLDER --resume         go on after an interruption
python evaluate.py ANNOTATIONS FOLDER --processes 4    share the pictures among four processes
python evaluate.py ANNOTATIONS FOLDER --shard 3/16     only every sixteenth picture, from the third on
python evaluate.py ANNOTATIONS FOLDER --merge          join the shards when all are done, and evaluate
python evaluate.py ANNOTATIONS FOLDER --compare EXPORT another one beside --model, such as its networks in 8 bits

Writes detections.json, COCO's list of results, to the folder --out; until it is complete, a partial file beside it
has a line for each picture. Exit status: 0 all well, 1 some pictures failed and the rest was evaluated, 2 nothing
could be done, 130 interrupted.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Literal, NamedTuple, Optional, Tuple

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # read when cv2 is imported; 1.6 GB as float32
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what goes wrong is raised, and reported by us

import cv2  # noqa: E402
import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402
from typing_extensions import Annotated  # noqa: E402

from detectors import ModelError, default_folder, load, one_line  # noqa: E402
from detectors.networks import CPU, find_providers  # noqa: E402
from detectors.preprocess import preprocess  # noqa: E402
from detectors.settings import write  # noqa: E402
from pictures import (  # noqa: E402
    add_execution,
    coco_results,
    execution_of,
    name_and_value,
    number_of,
    printable,
    read_picture,
    run_program,
    write_file,
)

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from pycocotools.mask import area as mask_area
except ImportError:
    COCO = None

KINDS = {"bbox": "boxes", "segm": "masks"}
READERS, PICTURES_AHEAD = 2, 4  # threads that read and preprocess, and how far they may be ahead of the networks


class EvaluationError(Exception):
    """Nothing can be evaluated; the message says why and what to do."""


Finite = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]


class Images(msgspec.Struct):
    """Of an annotation file, the pictures alone, with all that it says of them."""

    images: List[Dict[str, Any]]


class Image(msgspec.Struct):
    """A picture in an annotation file."""

    id: int
    file_name: str


class Category(msgspec.Struct):
    """A class of objects."""

    id: int
    name: str


class Annotation(msgspec.Struct):
    """An object in a picture."""

    image_id: int
    category_id: int
    bbox: Tuple[Finite, Finite, Finite, Finite]  # x, y, width, height
    area: Finite
    iscrowd: Literal[0, 1]
    segmentation: Any = None  # polygons, or a run-length encoding; needed for masks only


class Annotations(msgspec.Struct):
    """What pycocotools needs in an annotation file; without it, it would fail only after the last picture."""

    images: Annotated[List[Image], msgspec.Meta(min_length=1)]
    categories: Annotated[List[Category], msgspec.Meta(min_length=1)]
    annotations: List[Annotation] = []  # COCO's test sets have none


def read_annotations(path):
    """Return the annotations of a file as pycocotools' COCO."""
    if COCO is None:
        raise EvaluationError("pycocotools is missing: pip install pycocotools, or uv run --extra evaluate evaluate.py")
    content = path.read_bytes()
    try:
        checked = msgspec.json.decode(content, type=Annotations)
        coco = COCO()
        coco.dataset = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EvaluationError(f"{path} is not a COCO annotation file: {one_line(error)}") from error
    for number, annotation in enumerate(coco.dataset.setdefault("annotations", []), 1):
        annotation["id"] = number  # pycocotools takes an id of 0 for no match, and loses annotations of equal ids
    if len({category.name for category in checked.categories}) < len(checked.categories):
        raise EvaluationError(f"{path} has two categories of the same name")
    if len({category.id for category in checked.categories}) < len(checked.categories):
        raise EvaluationError(f"{path} has two categories of the same id")
    if len({image.id for image in checked.images}) < len(checked.images):
        raise EvaluationError(f"{path} has two images of the same id")
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        coco.createIndex()
    return coco


def read_images(path):
    """Return the images of an annotation file that read_annotations has checked, by their ids."""
    images = msgspec.json.decode(path.read_bytes(), type=Images).images
    return sorted(images, key=lambda image: image["id"])


def kinds_of(coco, settings):
    """Return what can be evaluated: boxes, and masks if detector and annotations have them.

    EvaluationError if an annotation has no mask that pycocotools can read; it would fail only after the last picture.
    """
    if not hasattr(settings, "masks") or not coco.anns:
        return ["bbox"]
    if not any(annotation.get("segmentation") for annotation in coco.anns.values()):
        print("the annotations have no masks: only boxes are evaluated")
        return ["bbox"]
    for annotation in coco.anns.values():
        try:
            mask_area(coco.annToRLE(annotation))
        except Exception as error:  # whatever it stumbles over
            raise EvaluationError(
                f"an annotation of image {annotation['image_id']} has no mask that pycocotools can read "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
    return ["bbox", "segm"]


def category_ids(coco, classes):
    """Return the category id of each class that has a name, by its label: COCO's ids have gaps."""
    ids = {category["name"]: category["id"] for category in coco.cats.values()}
    named = {label: name for label, name in enumerate(classes) if name}  # the others were not trained
    unknown = [name for name in named.values() if name not in ids]
    if unknown:
        raise EvaluationError(f"the annotations do not know these classes of the model: {', '.join(unknown)}: "
                              "add them to the categories, which need no boxes")  # fmt: skip
    return {label: ids[name] for label, name in named.items()}


# ---------------------------------------------------------------------- the partial file


class Mask(msgspec.Struct):
    """A mask of a picture, see detectors/rle.py."""

    size: Tuple[int, int]
    counts: str


class Entry(msgspec.Struct):
    """A detection, as COCO's list of results has it."""

    image_id: int
    category_id: int
    bbox: Tuple[float, float, float, float]
    score: float
    segmentation: Optional[Mask] = None


class Record(msgspec.Struct):
    """What a line of a partial file says of a picture: its detections, or why there are none."""

    image_id: int
    detections: Optional[List[Entry]] = None
    error: Optional[str] = None

    def __post_init__(self):
        """Check what no single field can."""
        if (self.detections is None) == (self.error is None):
            raise ValueError("a picture with neither detections nor an error, or with both")


def describe_run(settings, args):
    """Return the header of a partial file: what the results of all shards must have in common."""
    execution = execution_of(args)
    providers = [name for name in find_providers(execution.providers) if name != CPU]
    options = [f"{name}={value}" for name, value in sorted(execution.options.items()) if name != "device_id"]
    return {
        "pair": settings.pair,
        "settings": hashlib.sha256(write(settings).encode()).hexdigest(),  # --set changes them
        "annotations": hashlib.sha256(args.annotations.read_bytes()).hexdigest(),
        "folder": Path(os.path.abspath(args.folder)).name,  # not where it is: another machine may have it elsewhere
        "providers": providers + options,
    }


def read_partial(path, header):
    """Return the records in a partial file, {image_id: record}."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut off while being written
        found, *records = [json.loads(line) for line in lines] or [header]
        found, records = dict(found), {msgspec.convert(record, Record).image_id: record for record in records}
    except (ValueError, TypeError, RecursionError, msgspec.ValidationError) as error:
        raise EvaluationError(f"{path} is damaged ({one_line(error)}): delete it") from error
    names = {
        "pair": "model",
        "settings": "--set",
        "annotations": "annotation file",
        "folder": "folder of pictures",
        "providers": "--provider or --provider-option",
    }
    for key, name in names.items():
        if found.get(key) != header[key]:
            raise EvaluationError(f"{path} belongs to another {name}: name that one, or another folder for --out")
    return records


def open_partial(path, header):
    """Return a partial file, open for more records, and the ids of the pictures that it has detections of."""
    records = read_partial(path, header).values() if path.exists() else []
    done = [record for record in records if "detections" in record]  # what failed is tried again
    write_file(path, "".join(json.dumps(line) + "\n" for line in [header, *done]).encode())
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
            f"the first is {printable(missing[0])}: "
            "run the shards that are missing, and those that were interrupted with --resume"
        )
    entries = [entry for image in images for entry in records[image["id"]].get("detections", [])]
    if not entries and not may_be_empty:
        raise EvaluationError("nothing was detected in any picture, so there is nothing to evaluate")
    write_file(out / "detections.json", ("[" + ",\n".join(map(json.dumps, entries)) + "]\n").encode())
    return sum("error" in record for record in records.values())


# ---------------------------------------------------------------------- detecting


def prepare(path, settings):
    """Return the picture in a file as the first network takes it."""
    return preprocess(read_picture(path), settings)


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


def detect_all(work, images, partial, advance):
    """Detect in images, and write a line for each as it comes; then call `advance`, with what is wrong with it."""
    detector = work.detector
    for image, future in prepared_pictures(images, work.folder, detector.settings.preprocess):
        record = {"image_id": image["id"]}
        try:
            found = detector.detect_in(future.result())
            found = found.where(np.isin(found.labels, list(work.ids)))
            record["detections"] = coco_results(found, image, detector.classes, work.ids)
        except (ModelError, OSError, ValueError, MemoryError, cv2.error) as error:
            record["error"] = one_line(error)
        partial.write(json.dumps(record) + "\n")
        partial.flush()
        advance(f"evaluate.py: {printable(image['file_name'])}: {record['error']}" if "error" in record else None)


def detect_shard(work, shard, path):
    """Detect in those images of a shard that its partial file does not have, and show the progress."""
    images = work.images[shard[0] - 1 :: shard[1]]
    partial, done = open_partial(path, work.header)
    with partial, tqdm(initial=len(done), total=len(images), unit="picture") as progress:

        def advance(problem):
            if problem:
                tqdm.write(problem, file=sys.stderr)
            progress.update()

        detect_all(work, [image for image in images if image["id"] not in done], partial, advance)


# ---------------------------------------------------------------------- in several processes


def detect_in_processes(args, model, work, paths):
    """Detect in the images of all shards, each in a process of its own, and show the progress of all of them.

    EvaluationError if one of the processes ends without having done its part.
    """
    context, n, total = multiprocessing.get_context("spawn"), len(paths), len(work.images)
    records = [record for path in paths if path.exists() for record in read_partial(path, work.header).values()]
    done = sum("detections" in record for record in records)
    counts = context.RawArray("q", n)  # how many pictures each has done; only its own process writes one
    shared = argparse.Namespace(**{**vars(args), "threads": args.threads or max(1, count_cores() // n)})
    work = work._replace(detector=None, images=None)  # which each process reads for itself
    children = [
        context.Process(target=detect_shard_alone, args=(shared, model, work, (i, n), path, counts), daemon=True)
        for i, path in enumerate(paths, 1)
    ]
    try:
        start_without_interrupts(children)
        show_progress(children, counts, done, total)
    finally:
        for child in children:
            if child.pid:
                child.terminate()
                child.join()
    failed = [f"{i} of {n}" for i, child in enumerate(children, 1) if child.exitcode]
    if failed:
        raise EvaluationError(f"process {', '.join(failed)} ended too early: go on with --resume")


def count_cores():
    """Return how many of the CPU's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_without_interrupts(children):
    """Start processes that Ctrl-C does not reach: their parent ends them, or each would complain.

    Pressed meanwhile, it counts when all have been started: KeyboardInterrupt.
    """
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    blocks = hasattr(signal, "pthread_sigmask")  # which the processes inherit; Windows has nothing like it
    if blocks:
        multiprocessing.resource_tracker.ensure_running()  # or it would be started with them, and end the blocking
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for child in children:
            child.start()
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def show_progress(children, counts, done, total):
    """Show how many pictures are done until all processes have ended."""
    with tqdm(initial=done, total=total, unit="picture") as progress:
        waiting = [child.sentinel for child in children]
        while waiting:
            ended = multiprocessing.connection.wait(waiting, timeout=0.2)
            waiting = [sentinel for sentinel in waiting if sentinel not in ended]
            progress.update(done + sum(counts) - progress.n)


def detect_shard_alone(args, model, work, shard, path, counts):
    """Do one process's part; it ends with its parent, however that ends."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    cv2.setNumThreads(args.threads)
    i, n = shard

    def advance(problem):
        if problem:
            print(f"\n{problem}", file=sys.stderr, flush=True)  # below the progress, which another process shows
        counts[i - 1] += 1

    try:
        partial, done = open_partial(path, work.header)
        images = [image for image in read_images(args.annotations)[i - 1 :: n] if image["id"] not in done]
        with partial:
            work = work._replace(detector=load(model, args.options, execution_of(args)))
            detect_all(work, images, partial, advance)
    except (EvaluationError, ModelError, OSError) as error:
        print(f"\nevaluate.py: process {i}: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


def end_with_parent():
    """Wait until the parent process has ended, then end this one."""
    multiprocessing.parent_process().join()
    os._exit(2)


# ---------------------------------------------------------------------- COCO's numbers


def evaluate(coco, results, kind, ids):
    """Return pycocotools' evaluation of COCO's list of results, for the categories with these ids.

    kind: "bbox" or "segm". Of masks pycocotools must not see the boxes: it would take their areas for the masks'.
    """
    if kind == "segm":
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.params.catIds = ids
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
    precision = class_precision(evaluation)
    width = max(len(coco.cats[category]["name"]) for category in [*precision])
    print(f"{'class':{width}}     AP   AP50")
    for category, averages in precision.items():
        print(f"{coco.cats[category]['name']:{width}}  " + "  ".join(f"{average:.3f}" for average in averages))


NUMBERS = (  # COCO's, in their order; AR 10: the recall of ten detections a picture
    "AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
    "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large",
)  # fmt: skip


def print_comparison(kind, first, second):
    """Print COCO's twelve numbers [12] of two exports, and by how much the second differs."""
    print(f"{KINDS[kind]:9}  --model  --compare  difference")
    for name, ours, theirs in zip(NUMBERS, first, second):
        print(f"{name:9}  {ours:7.4f}  {theirs:9.4f}  {theirs - ours:+10.4f}")


def report(coco, path, kinds, ids, per_class):
    """Print the twelve numbers of the results in a file for each kind and, if wanted, a line for each class.

    Returns them, {kind: [12]}.
    """
    numbers = {}
    if coco.getAnnIds(catIds=ids):
        results = msgspec.json.decode(path.read_bytes())
        for kind in kinds:
            if len(kinds) > 1:
                print(f"{KINDS[kind]}:")
            evaluation = evaluate(coco, results, kind, ids)
            evaluation.summarize()  # prints them
            numbers[kind] = evaluation.stats
            if per_class:
                print_class_precision(coco, evaluation)
    else:
        print("the annotation file has no annotations of the model's classes, so there is nothing to measure")
    print(f"written: {path}")
    return numbers


# ---------------------------------------------------------------------- the command line


def read_shard(text):
    """Return 3/16 as (3, 16)."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not a part such as 3/16, the third of sixteen")
    return int(match[1]), int(match[2])


def read_arguments(arguments):
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS", type=Path, help="a COCO annotation file, such as instances_val2017.json")
    add("folder", metavar="FOLDER", type=Path, help="the folder of its pictures")
    add(
        "--model",
        metavar="PATH",
        type=Path,
        default=default_folder(),
        help="an export, as for demo.py (default: the same)",
    )
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("output/evaluation"),
        help="folder for the results (default: output/evaluation)",
    )
    add("--set", metavar="NAME=VALUE", dest="options", action="append", default=[], type=name_and_value,
        help="another value for a setting of the model, such as head.iou_threshold=0.6; may be repeated")  # fmt: skip
    add_execution(add)
    add("--compare", metavar="EXPORT", type=Path,
        help="another export: evaluate it, too, and print both; its results: --out/compared")  # fmt: skip
    add("--per-class", action="store_true", help="print the average precision of each class, too")
    add("--resume", action="store_true", help="go on with the run whose partial file is in --out, if there is one")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--shard", metavar="I/N", type=read_shard, default=(1, 1), help="take every N-th picture from the I-th on"
    )
    parts.add_argument("--merge", action="store_true", help="join the partial files of all shards and evaluate")
    parts.add_argument(
        "--processes",
        metavar="N",
        type=number_of("processes", 1024),
        default=1,
        help="share the pictures among so many processes (default: 1), and the CPU's cores among them",
    )
    return parser.parse_args(arguments)


def partial_paths(args, out):
    """Return the partial files that a run writes to a folder: one for each process, or that of its shard."""
    shards = [args.shard] if args.processes == 1 else [(i + 1, args.processes) for i in range(args.processes)]
    return [out / "detections.{}-of-{}.jsonl".format(*shard) for shard in shards]


def exports_of(args):
    """Return the folders of the exports to evaluate, each with the folder for its results."""
    compared = [(args.compare, args.out / "compared")] if args.compare else []
    return [(args.model, args.out), *compared]


class Work(NamedTuple):
    """What detecting needs."""

    detector: Any
    ids: Dict[int, int]  # see category_ids
    images: List[dict]  # COCO's, by their ids
    folder: Path  # of the pictures
    header: dict  # see describe_run


def prepare_work(args, coco, model):
    """Return the Work with the export in a folder."""
    detector = load(model, args.options, execution_of(args))
    images = [coco.imgs[image_id] for image_id in sorted(coco.imgs)]
    ids = category_ids(coco, detector.classes)
    return Work(detector, ids, images, args.folder, describe_run(detector.settings, args))


def evaluate_model(args, coco, model, out):
    """Detect with the export in a folder and evaluate; return how many pictures failed, and the numbers, {kind: [12]}.

    Of a shard there are none: {}.
    """
    work = prepare_work(args, coco, model)
    ids, images, kinds = [*work.ids.values()], work.images, kinds_of(coco, work.detector.settings)
    print(f"model: {model} ({len(ids)} classes), {len(images)} pictures in {args.annotations}")
    if len(coco.cats) > len(ids):
        print(f"{len(coco.cats) - len(ids)} categories that the model does not know are left out")
    out.mkdir(parents=True, exist_ok=True)
    paths = partial_paths(args, out)
    if args.merge:
        paths = sorted(out.glob("detections.*-of-*.jsonl"))
    elif args.processes > 1:
        work = work._replace(detector=None)  # its memory is needed
        detect_in_processes(args, model, work, paths)
    else:
        detect_shard(work, args.shard, paths[0])
    if args.shard[1] > 1:
        return check_shard(work, args.shard, paths[0]), {}
    failures = merge(paths, work.header, images, out, may_be_empty=not coco.getAnnIds(catIds=ids))
    return failures, report(coco, out / "detections.json", kinds, ids, args.per_class)


def check_shard(work, shard, path):
    """Say that a shard is done; return how many of its pictures failed. EvaluationError if it lacks some."""
    records = read_partial(path, work.header)
    if any(image["id"] not in records for image in work.images[shard[0] - 1 :: shard[1]]):
        raise EvaluationError(f"{path} lacks pictures: did two processes write it at once? Go on with --resume")
    print(f"shard {shard[0]}/{shard[1]}: {path}; when all shards are done, evaluate with --merge")
    return sum("error" in record for record in records.values())


def check_partials(args, out):
    """Refuse partial files of an earlier run that this one would not go on with: EvaluationError."""
    paths = partial_paths(args, out)
    left = [path for path in paths if path.exists()]
    if left and not args.resume:
        raise EvaluationError(f"{left[0]} is left from an earlier run: go on with --resume, or delete it")
    others = sorted(out.glob("detections.*-of-*.jsonl")) if args.resume and args.shard[1] == 1 and not left else []
    if others:
        parts = others[0].stem.rpartition("-")[2]
        how = "without --processes" if parts == "1" else f"--processes {parts}, or --shard and --merge"
        raise EvaluationError(f"{others[0]} is of a run in {parts} parts: go on with that, {how}; or delete it")


def check_pictures(coco, folder):
    """Refuse a folder that holds none of the pictures: EvaluationError."""
    names = [image["file_name"] for image in coco.imgs.values()]
    if not any(os.path.exists(folder / name) for name in names):  # of a name that is too long, Path's would fail
        raise EvaluationError(f"{folder} has none of the {len(names)} pictures, such as {printable(names[0])}")


def run(args):
    """Do what the command line says; return the exit status."""
    coco = read_annotations(args.annotations)
    if not args.folder.is_dir():
        raise EvaluationError(f"{args.folder} is not a folder")
    if not args.merge:
        check_pictures(coco, args.folder)
        for _, out in exports_of(args):
            check_partials(args, out)
    if args.compare:  # what is wrong with it is said before the first one runs for hours
        category_ids(coco, load(args.compare, args.options, execution_of(args)).classes)
    failures, numbers = evaluate_model(args, coco, args.model, args.out)
    if args.compare:
        more, others = evaluate_model(args, coco, *exports_of(args)[1])
        failures = max(failures, more)
        for kind in [kind for kind in numbers if kind in others]:
            print_comparison(kind, numbers[kind], others[kind])
    if failures:
        print(f"evaluate.py: {failures} pictures failed; they count as empty", file=sys.stderr)
        return 1
    if args.shard == (1, 1):  # with partial files, --resume tries only the failed ones again
        for _, out in exports_of(args):
            for path in partial_paths(args, out):
                path.unlink(missing_ok=True)
    return 0


def main(arguments=None):
    """Run the command line; return the exit status."""
    args = read_arguments(arguments)
    try:
        return run(args)
    except (EvaluationError, ModelError, OSError) as error:
        print(f"evaluate.py: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"evaluate.py: interrupted; what is done is in {args.out}: go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_program(main)
