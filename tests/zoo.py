"""Try the configs that MMDetection ships: each is exported with seeded weights and compared whole, or refused.

python tests/zoo.py cascade_rcnn mask_rcnn_r50_fpn_1x_coco    folders and configs, by their names
python tests/zoo.py --all                                      all of them, and the table of DETECTORS.md

Of the configs that compute the same and differ only in training, one is tried. Each is tried in a process of its own,
and its outcome is a line of output/zoo.jsonl: what has one is not tried again, so an interrupted run goes on where it
was. The outcomes: works (all that was compared is True, and there was enough to compare), refused (in one line, before
or while it is exported), failed (anything else).
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

warnings.filterwarnings("ignore")  # about deprecations and tracing, as in export.py
logging.disable(logging.WARNING)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import mmcv  # noqa: E402
import mmdet  # noqa: E402
import numpy as np  # noqa: E402
import seeded_mmdetection  # noqa: E402
import skimage.data  # noqa: E402

import export  # noqa: E402
from detectors import load, one_line  # noqa: E402
from sources import SourceError, mmdetection  # noqa: E402

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
RESULTS = ROOT / "output" / "zoo.jsonl"
TABLE = ROOT / "DETECTORS.md"
BEGIN, END = "<!-- written by tests/zoo.py -->", "<!-- end of what tests/zoo.py wrote -->"
PHOTOGRAPHS = ("coffee", "chelsea")  # of scikit-image
SCALE = (400, 240)  # their long and short sides at most
OTHER_SCALES = {
    "ddod": (960, 608),  # mmcv refuses to deform maps of less than 3 x 3 cells, also of half the size
    "yolox": (416, 416),  # a square of whole cells
}
ENOUGH, CLASSES = 20, 3  # detections, and classes among them where the model has so many
PATIENCE = 900  # seconds for one config
TRAINING = {
    "frozen_stages", "init_cfg", "norm_eval", "pretrained", "reg_decoded_bbox", "requires_grad", "train_cfg", "with_cp",
}  # fmt: skip


# ---------------------------------------------------------------------- the configs


def what_is_computed(cfg):
    """Return what a config computes at inference, as a text: its model and test pipeline without what training sees."""
    return json.dumps([without_training(part) for part in (cfg.model, cfg.get("test_cfg"), cfg.data.test.pipeline)])


def without_training(value):
    """Return a part of a config without what only training sees; of a loss, what also decides about the scores."""
    if isinstance(value, (list, tuple)):
        return [without_training(part) for part in value]
    if not isinstance(value, dict):
        return value if isinstance(value, (str, int, float, type(None))) else repr(value)
    kept = {}
    for key, part in sorted(value.items()):
        if isinstance(part, dict) and key.startswith("loss"):
            own_scores = part.get("type") == "SeesawLoss"
            kept[key] = [own_scores, part.get("use_sigmoid"), part.get("activated")]
        elif key not in TRAINING:
            kept[key] = without_training(part)
    if kept.get("type") in ("SyncBN", "MMSyncBN"):
        kept["type"] = "BN"
    return kept


def shipped():
    """Return the names of all configs that are no parts of others, each with its folder."""
    paths = [path.relative_to(CONFIGS).with_suffix("") for path in sorted(CONFIGS.rglob("*.py"))]
    return [path.as_posix() for path in paths if "_base_" not in path.parts]


def may_be_called(name):
    """Return what names a config on the command line: its folder, its own name, or both."""
    return {name, name.split("/")[0], name.split("/")[-1]}


def read_configs(names):
    """Return the configs of detectors, {what is computed: [names]}, and the names of those that need other packages."""
    groups, unreadable = defaultdict(list), []
    for name in names:
        try:
            cfg = mmcv.Config.fromfile(str(CONFIGS / f"{name}.py"))
        except ImportError:
            unreadable.append(name)
            continue
        if "model" in cfg:  # some configs have only data and schedule
            groups[what_is_computed(cfg)].append(name)
    return groups, unreadable


# ---------------------------------------------------------------------- one config


def try_apart(name):
    """Return the outcome of a config, tried in a process of its own: memory comes back, and a crash is an outcome."""
    start = time.perf_counter()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        # a fork has everything imported; importing it takes longer than most configs that are refused
        process = multiprocessing.get_context("fork").Process(target=send_outcome, args=(sender, name, folder))
        process.start()
        sender.close()
        try:
            done = receiver.poll(PATIENCE)
            row = receiver.recv() if done else {"outcome": "failed", "reason": f"not done after {PATIENCE} s"}
        except EOFError:
            process.join()
            row = {"outcome": "failed", "reason": f"the process died with exit code {process.exitcode}"}
        finally:
            process.kill()
            process.join()
    return {"config": name, **row, "seconds": round(time.perf_counter() - start, 1)}


def send_outcome(sender, name, folder):
    """Try a config and send its outcome to the process that started this one, which Ctrl-C is left to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sender.send(try_config(name, Path(folder)))


def try_config(name, folder):
    """Return the outcome of a config, and what was measured; its files are written to a folder."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return export_and_compare(CONFIGS / f"{name}.py", folder)
    except SourceError as error:
        return {"outcome": "refused", "reason": str(error).replace(f"{folder}/", "")}
    except Exception as error:
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}


def export_and_compare(path, folder):
    """Try a config on one photograph after the other until it works; return the outcome and what was measured.

    Only rounding is given a second chance: where every network's outputs are equal and the detections are not, two
    scores were as good as the same, or the weights enlarge rounding. What differed is kept in the outcome.
    """
    config, checkpoint, first = folder / "config.py", folder / "seeded.pth", {}
    cfg = on_small_pictures(path)
    cfg.dump(str(config))
    check_without_weights(config, checkpoint)
    for photograph in PHOTOGRAPHS:
        row = {**compare(cfg, photograph, config, checkpoint), "photograph": photograph, **first}
        if row["outcome"] == "works" or not row.pop("only_rounding"):
            break
        first = {"before": row["reason"]}
    return row


def compare(cfg, photograph, config, checkpoint):
    """Export a config with weights seeded in a photograph, and compare it in this; return what came of it."""
    out, picture, printed = config.parent / "out", config.parent / "picture.png", io.StringIO()
    image = np.ascontiguousarray(getattr(skimage.data, photograph)()[..., ::-1])
    cv2.imwrite(str(picture), image)
    seeded_mmdetection.write_checkpoint(cfg, checkpoint, image)
    source = mmdetection.load(config, checkpoint)
    with contextlib.redirect_stdout(printed):
        equal = export.export(source, out, None, picture)
    lines = printed.getvalue().splitlines()
    row = {"outcome": "works", "reason": "", **measured(lines)}
    if not equal:
        different = [line for line in lines if line.endswith("False")]
        only_rounding = all(line.startswith(("detections: ", "with any score: ")) for line in different)
        return {**row, "outcome": "failed", "reason": "; ".join(different), "only_rounding": only_rounding}
    detector = load(out)
    found = detector(image)
    row["classes"] = len(set(found.labels.tolist()))
    if len(found.boxes) < ENOUGH or row["classes"] < min(CLASSES, len(detector.classes)):
        reason = f"only {len(found.boxes)} detections of {row['classes']} classes to compare"
        return {**row, "outcome": "failed", "reason": reason, "only_rounding": False}
    return row


def on_small_pictures(path):
    """Return the config in a file, with pictures of SCALE, or of what its folder needs."""
    cfg = mmcv.Config.fromfile(str(path))
    for step in cfg.data.test.pipeline:
        if step.type == "MultiScaleFlipAug" and isinstance(step.get("img_scale"), tuple) and keeps_ratio(step):
            step.img_scale = OTHER_SCALES.get(path.parent.name, SCALE)
    return cfg


def keeps_ratio(augmentation):
    """Return whether a picture keeps its shape; a detector that wants one of its own gets it."""
    return any(step.get("keep_ratio") for step in augmentation.transforms if step.type == "Resize")


def check_without_weights(config, checkpoint):
    """Raise the SourceError with which a config is refused before weights are read: that needs no seeded weights."""
    try:
        mmdetection.load(config, checkpoint)
    except SourceError as error:
        if not str(error).startswith(str(checkpoint)):  # which is not there yet
            raise


def measured(lines):
    """Return the numbers in what export.py prints: detections, largest differences, smallest IoU of masks."""
    outputs = [re.search(r"\] +(\S+) of (\S+) ", line) for line in lines]
    wholes = [re.search(r": (\d+), .* difference (\S+) px, (\S+) in score(, .* masks (\S+))?", line) for line in lines]
    outputs, wholes = [match for match in outputs if match], [match for match in wholes if match]
    overlaps = [float(match[5]) for match in wholes if match[5]]
    return {
        "detections": int(wholes[0][1]),
        "outputs": len(outputs),
        "difference": max(float(match[1]) for match in outputs),
        "pixels": max(float(match[2]) for match in wholes),
        "score": max(float(match[3]) for match in wholes),
        "mask_iou": min(overlaps, default=None),
    }


# ---------------------------------------------------------------------- the results


def read_results():
    """Return the last outcome of every config that was tried: {name: row}."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {row["config"]: row for row in map(json.loads, lines)}


def try_all(groups, retry):
    """Try one config of each group, unless one has an outcome; retry: also those that did not work."""
    results = read_results()
    RESULTS.parent.mkdir(exist_ok=True)
    todo = []
    for members in groups.values():
        tried = [name for name in members if name in results]
        if not tried or (retry and results[tried[0]]["outcome"] != "works"):
            todo.append((tried or members)[0])
    for i, name in enumerate(todo, 1):
        row = try_apart(name)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{i} of {len(todo)}: {name} {row['outcome']} ({row['seconds']} s) {row['reason'][:300]}", flush=True)


def short(reason):
    """Return a reason without what it advises and without the number of a stage."""
    ends = r", which cannot|, not one of|: this cannot|, for which ONNX| cannot be exported| '%|: \[ONNXRuntimeError\]"
    reason = re.split(ends, reason)[0]
    return re.sub(r"\.\d+(?=\.| )", "", re.sub(r"^config\.py: ", "", reason))[:200]


def table(groups, unreadable):
    """Return the outcomes as Markdown: a sentence with the counts, then a table of the folders."""
    results, outcomes = read_results(), {}
    for members in groups.values():
        row = next((results[name] for name in members if name in results), {"outcome": "not tried yet", "reason": ""})
        outcomes.update(dict.fromkeys(members, row))
    counts = Counter(row["outcome"] for row in outcomes.values())
    text = f"**{counts.pop('works', 0)} of the {len(outcomes)} configs work**"
    text += "".join(f", {count} {outcome}" for outcome, count in sorted(counts.items(), reverse=True))
    text += f". {len(groups)} of them differ in what they compute."
    if unreadable:
        text += f" {len(unreadable)} more need packages that are not installed here: {count_folders(unreadable)}."
    lines = [text, "", sentence([row for row in outcomes.values() if row["outcome"] == "works"]), ""]
    lines += ["| folders | works | why the others do not |", "|---|---|---|"]
    return "\n".join(lines + table_rows(outcomes))


def sentence(working):
    """Return what was measured of the configs that work, as sentences."""
    if not working:
        return ""
    overlaps = [row["mask_iou"] for row in working if row["mask_iou"] is not None]
    text = (
        f"Each of them had {min(row['detections'] for row in working)} detections or more to compare; the largest "
        f"differences were {max(row['pixels'] for row in working):.1e} px and "
        f"{max(row['score'] for row in working):.1e} in score"
    )
    text += f"; the smallest IoU of a mask was {min(overlaps):.4f}." if overlaps else "."
    second = sum("before" in row for row in working)
    if second:
        text += (
            f" For {second} of them, rounding decided about a detection in the first photograph, so a second was taken."
        )
    return text


def table_rows(outcomes):
    """Return the rows of the table; folders of which all work, or none for the same reason, share one."""
    folders = defaultdict(list)
    for name, row in outcomes.items():
        folders[name.split("/")[0]].append((name, row))
    shared = defaultdict(list)
    for folder, tried in sorted(folders.items()):
        reasons = Counter(describe(row) for _, row in tried if row["outcome"] != "works")
        works = len(tried) - sum(reasons.values())
        alone = folder if reasons and (works or len(reasons) > 1) else ""
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        why = next(iter(reasons), "") if len(reasons) < 2 else why
        shared[not works, bool(reasons), alone, why].extend(name for name, _ in tried)
    rows = []
    for (_, refused, _, why), names in sorted(shared.items()):
        works = sum(outcomes[name]["outcome"] == "works" for name in names)
        total = f"{works} of {len(names)}" if refused else f"all {works}"
        rows.append(f"| {count_folders(names)} | {total} | {why.replace('|', '/')} |")
    return rows


def describe(row):
    """Return an outcome that is not `works` in a few words."""
    if row["outcome"] == "failed" and row["reason"].startswith("detections: "):
        return f"failed: detections differ by up to {row['pixels']:.0e} px, {row['score']:.1e} in score"
    if row["outcome"] == "failed" and "difference" in row:
        return f"failed: outputs differ by up to {row['difference']:.1e}"
    if row["outcome"] == "failed":
        return f"failed: {short(row['reason'])}"
    return short(row["reason"]) or row["outcome"]


def count_folders(names):
    """Return the folders of configs, each with its number of configs, as a text."""
    counts = Counter(name.split("/")[0] for name in names)
    return ", ".join(f"`{folder}` {count}" for folder, count in counts.items())


def write_table(text):
    """Put the table between its marks in DETECTORS.md; print it if there are none."""
    document = TABLE.read_text(encoding="utf-8")
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        print(text)
        return
    TABLE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a folder of configs, or a config")
    parser.add_argument("--all", action="store_true", help="try all configs, and write the table")
    parser.add_argument("--retry", action="store_true", help="try again what was refused or failed")
    args = parser.parse_args()
    if bool(args.names) == args.all:
        parser.error("name configs or folders, or say --all")
    names = shipped()
    unknown = set(args.names).difference(*map(may_be_called, names))
    if unknown:
        parser.error(f"MMDetection ships no config of this name: {', '.join(sorted(unknown))}")
    groups, unreadable = read_configs([name for name in names if args.all or may_be_called(name) & set(args.names)])
    try:
        try_all(groups, args.retry)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if args.all:
            write_table(table(groups, unreadable))


if __name__ == "__main__":
    main()
