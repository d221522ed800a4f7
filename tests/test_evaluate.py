"""evaluate.py: its numbers against MMDetection's, its partial files, and its command line as a process."""

import json
import multiprocessing.context
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from conftest import ROOT, SHAPES, call_program, default_sigint

import evaluate
from detectors import ModelError, load, rle
from detectors.faster_rcnn import FasterRCNN
from detectors.settings import Preprocess

pytest.importorskip("pycocotools", reason="needs pycocotools: uv run --extra test pytest")

IDS = [2, 5, 9, 44, 71, 90]  # of the categories: with gaps, as COCO's


def run_evaluate(*arguments):
    """Run evaluate.py with the bundled model."""
    return call_program(evaluate.main, *arguments, "--model", SHAPES)


def command(*arguments):
    """Return the command line of evaluate.py with the bundled model."""
    return [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments), "--model", str(SHAPES)]


def assert_refused(result, *words):
    """Check for exit status 2 and one line on stderr with these words in it."""
    assert result.returncode == 2
    assert result.stderr.startswith("evaluate.py: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert str(word) in result.stderr


def draw_pictures(folder, count):
    """Write the first held-out pictures to val in a folder, and their annotations to val.json; return the folder."""
    import dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.SPLITS, "val", dataset.SPLITS["val"][:count])
        dataset.write_split(folder, "val")
    content = json.loads((folder / "val.json").read_text())
    for entry in content["annotations"]:
        entry["category_id"] = IDS[entry["category_id"] - 1]
    for category in content["categories"]:
        category["id"] = IDS[category["id"] - 1]
    (folder / "val.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Return a folder with 12 held-out pictures in val and their annotations in val.json."""
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 12)


@pytest.fixture(scope="session")
def many_pictures(tmp_path_factory):
    """Return a folder with all 300 of them."""
    return draw_pictures(tmp_path_factory.mktemp("many_pictures"), 300)


def write_few(pictures, folder):
    """Write the annotations of the pictures to a folder; return the arguments for them, results below it."""
    shutil.copy(pictures / "val.json", folder / "few.json")
    return [folder / "few.json", pictures / "val", "--out", folder / "out"]


@pytest.fixture
def few(pictures, tmp_path):
    """Return the arguments for the 12 pictures, and the folder for the results."""
    return write_few(pictures, tmp_path), tmp_path / "out"


@pytest.fixture(scope="session")
def whole(pictures, tmp_path_factory):
    """Return the output of a run without interruption over the 12 pictures: its stdout and detections.json."""
    folder = tmp_path_factory.mktemp("whole")
    line = command(*write_few(pictures, folder))
    result = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (folder / "out").iterdir()] == ["detections.json"]
    return result.stdout, (folder / "out" / "detections.json").read_bytes()


# ------------------------------------------------------------------ the numbers


def mmdetection_evaluation(detector, pictures, monkeypatch, kinds=("bbox",)):
    """Return a COCOeval of each kind that CocoDataset.evaluate makes of single_gpu_test's results.

    Its report has three decimals.
    """
    import mmcv
    import mmdet.datasets.coco
    import torch
    from mmdet.apis import single_gpu_test
    from mmdet.datasets import build_dataloader, build_dataset
    from mmdet.utils import build_dp

    made = []

    class Recorded(mmdet.datasets.coco.COCOeval):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(mmdet.datasets.coco, "COCOeval", Recorded)
    cfg = mmcv.Config.fromfile(str(SHAPES / "config.py")).data.test
    cfg.update(ann_file=str(pictures / "val.json"), img_prefix=str(pictures / "val"), test_mode=True)
    data = build_dataset(cfg)
    loader = build_dataloader(data, samples_per_gpu=1, workers_per_gpu=0, dist=False, shuffle=False)
    with torch.no_grad():
        results = single_gpu_test(build_dp(detector, "cpu"), loader)
    data.evaluate(results, metric=list(kinds), proposal_nums=(1, 10, 100), classwise=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("shapes", 1e-4), ("shapes_atss", 1.5e-4)],  # one small shape at one of ten thresholds of IoU is 1.02e-4
)
def test_the_twelve_numbers_are_mmdetections(
    mmdetection, name, tolerance, many_pictures, tmp_path, monkeypatch, capsys
):
    folder = SHAPES.parent / name
    arguments = [many_pictures / "val.json", many_pictures / "val", "--out", tmp_path, "--model", folder]
    assert evaluate.main(list(map(str, arguments))) == 0
    printed = numbers_in(capsys.readouterr().out)
    results = json.loads((tmp_path / "detections.json").read_text())
    ours = evaluate.evaluate(evaluate.read_annotations(many_pictures / "val.json"), results, "bbox", IDS)
    ours.summarize()
    detector = mmdetection.load_detector(folder / "config.py", folder / f"{name}.pth")
    (expected,) = mmdetection_evaluation(detector, many_pictures, monkeypatch)
    assert len(ours.stats) == len(expected.stats) == 12
    np.testing.assert_allclose(ours.stats, expected.stats, atol=tolerance)
    np.testing.assert_allclose(printed, expected.stats, atol=6e-4)
    assert 0.7 < expected.stats[0] < 0.9
    averages = np.array(list(evaluate.class_precision(ours).values()))
    precision = expected.eval["precision"][:, :, :, 0, -1]
    np.testing.assert_allclose(averages[:, 0], precision.mean(axis=(0, 1)), atol=tolerance)
    np.testing.assert_allclose(averages[:, 1], precision[0].mean(axis=0), atol=tolerance)


def numbers_in(text):
    """Return COCO's numbers in what evaluate.py printed, in their order."""
    return [float(line.split()[-1]) for line in text.splitlines() if " @[ " in line]


def test_two_exports_side_by_side(few, whole):
    arguments, out = few
    result = run_evaluate(*arguments, "--compare", SHAPES.parent / "shapes_atss")
    assert result.returncode == 0, result.stderr
    printed = numbers_in(result.stdout)
    assert printed[:12] == numbers_in(whole[0])
    rows = np.float64([line.rsplit(None, 3)[1:] for line in result.stdout.splitlines()[-12:]])
    np.testing.assert_allclose(rows[:, 0], printed[:12], atol=6e-4)
    np.testing.assert_allclose(rows[:, 1], printed[12:], atol=6e-4)
    np.testing.assert_allclose(rows[:, 2], rows[:, 1] - rows[:, 0], atol=1.1e-4)
    assert np.abs(rows[:, 2]).max() > 1e-3
    assert (out / "detections.json").read_bytes() == whole[1] != (out / "compared" / "detections.json").read_bytes()


def test_an_interrupted_comparison_goes_on_where_it_was(few, monkeypatch):
    """What the first export found is not found again."""
    arguments, out = [*few[0], "--compare", SHAPES.parent / "shapes_atss"], few[1]
    detect_all, runs = evaluate.detect_all, []

    def interrupted(work, images, *others):
        runs.append(len(images))
        if len(runs) == 2:
            raise KeyboardInterrupt
        detect_all(work, images, *others)

    monkeypatch.setattr(evaluate, "detect_all", interrupted)
    assert run_evaluate(*arguments).returncode == 130
    result = run_evaluate(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert runs == [12, 12, 0, 12]
    assert not list(out.rglob("*.jsonl"))


def test_a_comparison_with_nothing_is_refused_at_once(few, tmp_path):
    assert_refused(run_evaluate(*few[0], "--compare", tmp_path / "nothing"), "nothing holds no export")
    assert not few[1].exists()


def test_a_class_without_objects_has_no_precision(pictures, whole, tmp_path):
    content = json.loads((pictures / "val.json").read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] != IDS[2]]
    (tmp_path / "val.json").write_text(json.dumps(content))
    coco = evaluate.read_annotations(tmp_path / "val.json")
    evaluation = evaluate.evaluate(coco, json.loads(whole[1]), "bbox", IDS)
    averages = evaluate.class_precision(evaluation)
    assert [category for category, (average, _) in averages.items() if np.isnan(average)] == [IDS[2]]


@pytest.mark.slow
def test_the_numbers_of_masks_are_mmdetections(mmdetection, many_pictures, tmp_path, monkeypatch, capsys):
    folder, kinds = SHAPES.parent / "shapes_mask", ("bbox", "segm")
    arguments = [many_pictures / "val.json", many_pictures / "val", "--out", tmp_path, "--model", folder]
    assert evaluate.main(list(map(str, arguments))) == 0
    printed = numbers_in(capsys.readouterr().out)
    detector = mmdetection.load_detector(folder / "config.py", folder / "shapes_mask.pth")
    expected = mmdetection_evaluation(detector, many_pictures, monkeypatch, kinds)
    results = json.loads((tmp_path / "detections.json").read_text())
    coco = evaluate.read_annotations(many_pictures / "val.json")
    for kind, theirs in zip(kinds, expected):
        ours = evaluate.evaluate(coco, results, kind, IDS)
        ours.summarize()
        np.testing.assert_allclose(ours.stats, theirs.stats, atol=1e-4)
    np.testing.assert_allclose(printed, [number for theirs in expected for number in theirs.stats], atol=6e-4)
    assert 0.7 < expected[1].stats[0] < 0.9


def with_masks(settings):
    """Return whether evaluate.py takes settings for those of a detector with masks."""
    return type("Settings", (), {"masks": settings})


def test_masks_are_evaluated_where_there_are_masks(pictures, capsys):
    coco = evaluate.read_annotations(pictures / "val.json")
    assert evaluate.kinds_of(coco, with_masks(True)) == ["bbox", "segm"]
    assert evaluate.kinds_of(coco, object()) == ["bbox"]
    assert capsys.readouterr().out == ""
    broken = next(iter(coco.anns.values()))
    broken["segmentation"] = {"size": [3, 3], "counts": {}}
    with pytest.raises(evaluate.EvaluationError, match=f"image {broken['image_id']} has no mask"):
        evaluate.kinds_of(coco, with_masks(True))
    for annotation in coco.anns.values():
        annotation["segmentation"] = []
    assert evaluate.kinds_of(coco, with_masks(True)) == ["bbox"]
    assert "no masks: only boxes" in capsys.readouterr().out


def test_perfect_masks_have_a_precision_of_one(pictures):
    """Those of the annotations themselves; with boxes that are all wrong, which masks do not care about."""
    coco = evaluate.read_annotations(pictures / "val.json")
    results = [
        {**{key: entry[key] for key in ("image_id", "category_id", "segmentation")}, "bbox": [0, 0, 5, 5], "score": 0.9}
        for entry in coco.anns.values()
    ]
    for kind, precision in (("segm", 1.0), ("bbox", 0.0)):
        evaluation = evaluate.evaluate(coco, results, kind, IDS)
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(precision)


def test_a_mask_is_as_large_as_its_pixels_and_not_as_its_box(tmp_path):
    """A small wrong mask in a large box counts among the small ones."""
    object_mask, wrong_mask = np.zeros((2, 200, 200), bool)
    object_mask[10:30, 10:30] = wrong_mask[100:102, :] = True
    content = {
        "images": [{"id": 1, "file_name": "x", "height": 200, "width": 200}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{
            "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0,
            "segmentation": rle.encode(object_mask, (200, 200)),
        }],
    }  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(content))
    coco = evaluate.read_annotations(tmp_path / "val.json")
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 200, 200], "score": score,
         "segmentation": rle.encode(mask, (200, 200))}
        for mask, score in ((wrong_mask, 0.9), (object_mask, 0.8))
    ]  # fmt: skip
    evaluation = evaluate.evaluate(coco, results, "segm", [1])
    evaluation.summarize()
    assert evaluation.stats[3] == pytest.approx(0.5)  # AP of small objects


def test_the_results_are_coco_s(few, whole):
    """Of the pictures and categories in the annotation file, and every class under its own id."""
    content = json.loads(few[0][0].read_text())
    entries = json.loads(whole[1])
    assert {entry["image_id"] for entry in entries} <= {image["id"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert {entry["category_id"] for entry in entries} == set(IDS)
    assert all(names[entry["category_id"]] == entry["category"] for entry in entries)
    assert min(entry["score"] for entry in entries) < 0.1  # the model's own threshold, not what demo.py draws


def test_precision_of_each_class_is_printed(few):
    result = run_evaluate(*few[0], "--per-class")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    names = ["circle", "triangle", "square", "star", "cross", "crescent"]
    table = lines[[line.split()[0] for line in lines].index("class") + 1 :][:6]
    assert [line.split()[0] for line in table] == names
    assert all(0.5 < float(line.split()[1]) <= float(line.split()[2]) <= 1 for line in table)


# ------------------------------------------------------------------ interruption, shards


def start_and_stop(arguments, out, lines, how, shard="1-of-1", stop=subprocess.Popen.send_signal):
    """Start a run, stop it by a signal when a partial file has so many lines, and return its status and stderr."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command(*arguments), preexec_fn=default_sigint, **pipes)
    path, deadline = out / f"detections.{shard}.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    stop(process, how)
    _, stderr = process.communicate(timeout=60)  # which it gets when the last of its processes has ended
    return process.returncode, stderr


@pytest.mark.parametrize("moments", [[1], [2, 7], [10], [3, 4, 5, 6]])
def test_killed_and_resumed_equals_uninterrupted(few, whole, moments):
    arguments, out = few
    for lines in moments:
        status, _ = start_and_stop([*arguments, "--resume"], out, lines, signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert not (out / "detections.json").exists()
    result = run_evaluate(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert (out / "detections.json").read_bytes() == whole[1]
    assert result.stdout.splitlines()[1:13] == whole[0].splitlines()[1:13]
    assert [path.name for path in out.iterdir()] == ["detections.json"]


def test_a_line_that_was_cut_is_done_again(few, whole):
    arguments, out = few
    start_and_stop(arguments, out, 6, signal.SIGKILL)
    path = out / "detections.1-of-1.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 40])
    assert run_evaluate(*arguments, "--resume").returncode == 0
    assert (out / "detections.json").read_bytes() == whole[1]


def test_interrupted_by_ctrl_c(few, whole):
    arguments, out = few
    status, stderr = start_and_stop(arguments, out, 5, signal.SIGINT)
    assert status == 130
    assert "Traceback" not in stderr
    assert "--resume" in stderr.splitlines()[-1]
    assert_refused(run_evaluate(*arguments), "--resume")  # without, nothing is lost
    result = run_evaluate(*arguments, "--resume")
    assert result.returncode == 0
    assert " 0/12" not in result.stderr  # it did not start over
    assert (out / "detections.json").read_bytes() == whole[1]


def test_shards_merged_equal_the_whole(few, whole):
    arguments, out = few
    for shard in ("2/3", "1/3"):
        result = run_evaluate(*arguments, "--shard", shard)
        assert result.returncode == 0, result.stderr
        assert "--merge" in result.stdout
    assert_refused(run_evaluate(*arguments, "--merge"), "4 of 12 pictures are in no shard")
    assert not (out / "detections.json").exists()
    assert run_evaluate(*arguments, "--shard", "3/3", "--resume").returncode == 0
    result = run_evaluate(*arguments, "--merge")
    assert result.returncode == 0, result.stderr
    assert (out / "detections.json").read_bytes() == whole[1]
    assert result.stdout.splitlines()[1:13] == whole[0].splitlines()[1:13]


def test_pictures_of_two_folders_are_not_mixed(few, whole, pictures, tmp_path):
    """The same names in a folder of another name are other pictures; in one of the same name elsewhere, the same."""
    arguments, out = few
    assert run_evaluate(*arguments, "--shard", "1/2").returncode == 0
    shutil.copytree(pictures / "val", tmp_path / "foggy")
    arguments[1] = tmp_path / "foggy"
    for options in (["--shard", "1/2", "--resume"], ["--merge"]):
        assert_refused(run_evaluate(*arguments, *options), "folder of pictures", "--out")
    (tmp_path / "linked").mkdir()
    arguments[1] = tmp_path / "linked" / "val"
    arguments[1].symlink_to(tmp_path / "foggy")  # somebody wants it so
    assert run_evaluate(*arguments, "--shard", "2/2").returncode == 0
    assert run_evaluate(*arguments, "--merge").returncode == 0
    assert (out / "detections.json").read_bytes() == whole[1]


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_shards_that_do_not_exist(few, shard):
    result = run_evaluate(*few[0], "--shard", shard)
    assert result.returncode == 2
    assert shard in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [2, 5])
def test_several_processes_equal_one(few, whole, number):
    arguments, out = few
    result = subprocess.run(command(*arguments, "--processes", number), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (out / "detections.json").read_bytes() == whole[1]
    assert result.stdout.splitlines()[1:13] == whole[0].splitlines()[1:13]
    assert result.stderr.splitlines()[-1].count("12/12") == 1  # one progress bar, of all of them
    assert [path.name for path in out.iterdir()] == ["detections.json"]


def send_to_second(process, how):
    """Send a signal to that process of evaluate.py which does the second shard."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if any("2-of-3" in os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()):
            return os.kill(int(pid), how)
    raise AssertionError("it has ended already")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("stop", "how", "status", "words"),
    [
        (subprocess.Popen.send_signal, signal.SIGINT, 130, "interrupted"),
        (lambda process, how: os.killpg(process.pid, how), signal.SIGINT, 130, "interrupted"),  # as a terminal does it
        (subprocess.Popen.send_signal, signal.SIGTERM, 130, "interrupted"),
        (subprocess.Popen.send_signal, signal.SIGKILL, -signal.SIGKILL, None),
        (send_to_second, signal.SIGKILL, 2, "process 2 of 3 ended too early"),
    ],
    ids=["interrupted", "all interrupted", "terminated", "killed", "a process killed"],
)
def test_several_processes_stopped_and_resumed(few, whole, stop, how, status, words):
    arguments, out = [*few[0], "--processes", "3"], few[1]
    result, stderr = start_and_stop(arguments, out, 1, how, "2-of-3", stop)  # the header is written
    assert result == status, stderr
    assert "Traceback" not in stderr
    if words:
        assert words in stderr.splitlines()[-1]
        assert "--resume" in stderr.splitlines()[-1]
    assert not (out / "detections.json").exists()
    lines = [path.read_text().count("\n") for path in out.iterdir()]
    assert sum(lines) - len(lines) < 12  # the processes did not go on
    assert_refused(run_evaluate(*arguments), "--resume")
    assert_refused(run_evaluate(*few[0], "--resume"), "--processes 3", "--shard")
    result = run_evaluate(*arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert (out / "detections.json").read_bytes() == whole[1]
    assert [path.name for path in out.iterdir()] == ["detections.json"]


@pytest.mark.parametrize("delay", [0, 0.3, 0.6])
def test_interrupted_while_processes_start(few, monkeypatch, delay):
    """It waits until all have started, and then ends all of them."""
    arguments, started = [*few[0], "--processes", "4"], []
    start = multiprocessing.context.SpawnProcess.start

    def start_slowly(self):
        start(self)
        started.append(self)
        if len(started) == 2:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start_slowly)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run_evaluate(*arguments)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.returncode == 130
    assert len(started) == 4
    assert not any(child.is_alive() for child in started)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.parametrize("options", [["--set", "head.iou_threshold=0.6"], ["--provider", "azure"]], ids=str)
def test_another_run_is_not_resumed(few, options, monkeypatch):
    """It is refused before any process starts."""
    names = ["AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    arguments = [*few[0], "--processes", "2"]
    assert run_evaluate(*few[0], "--shard", "2/2").returncode == 0
    assert run_evaluate(*few[0], "--shard", "2/2", "--resume", "--provider", "cpu").returncode == 0  # is no other
    result = run_evaluate(*arguments, "--resume", *options)
    assert_refused(result, "2-of-2.jsonl belongs to another", options[0])
    (few[1] / "detections.1-of-2.jsonl").write_text("{\n")
    assert_refused(run_evaluate(*arguments, "--resume"), "1-of-2.jsonl is damaged")


def test_what_changes_numbers_is_another_run(few, monkeypatch):
    """Which of several GPUs it is does not; nor does the CPU, which does the rest anyway."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    settings = load(SHAPES).settings
    options = (
        [],
        ["--provider", "cuda"],
        ["--provider", "cuda,cpu", "--provider-option", "device_id=1"],
        ["--provider", "cuda", "--provider-option", "use_tf32=1"],
    )
    lines = [evaluate.read_arguments([*map(str, few[0]), *each]) for each in options]
    cpu, cuda, other_gpu, tf32 = (evaluate.describe_run(settings, args) for args in lines)
    assert cuda == other_gpu
    assert cuda not in (cpu, tf32)


def test_what_fails_in_one_of_several_processes(few, pictures, tmp_path):
    arguments, out = [*few[0], "--processes", "2"], few[1]
    images = json.loads(arguments[0].read_text())["images"]
    arguments[1] = tmp_path / "pictures"
    shutil.copytree(pictures / "val", arguments[1])
    (arguments[1] / images[3]["file_name"]).unlink()
    result = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "1 pictures failed" in result.stderr
    assert any(line.startswith(f"evaluate.py: {images[3]['file_name']}: ") for line in result.stderr.splitlines())
    assert (out / "detections.json").exists()
    shutil.copy(pictures / "val" / images[3]["file_name"], arguments[1])
    assert run_evaluate(*arguments, "--resume").returncode == 0


@pytest.mark.parametrize("options", [["--processes", "0"], ["--processes", "two"], ["--processes", "2", "--merge"]])
def test_processes_that_make_no_sense(few, options):
    result = run_evaluate(*few[0], *options)
    assert result.returncode == 2
    assert "--processes" in result.stderr.splitlines()[-1] or "--merge" in result.stderr.splitlines()[-1]
    assert not few[1].exists()


# ------------------------------------------------------------------ bad input


def test_a_broken_picture_is_skipped_and_tried_again(few, whole, pictures, tmp_path):
    arguments, out = few
    folder = tmp_path / "pictures"
    folder.mkdir()
    images = json.loads(arguments[0].read_text())["images"]
    for image in images:
        (folder / image["file_name"]).symlink_to(pictures / "val" / image["file_name"])
    (folder / images[3]["file_name"]).unlink()
    (folder / images[7]["file_name"]).unlink()
    (folder / images[7]["file_name"]).write_text("no picture")
    arguments[1] = folder
    for shard in ("1/2", "2/2"):
        run_evaluate(*arguments, "--shard", shard)
    result = run_evaluate(*arguments, "--merge")
    assert result.returncode == 1
    assert "2 pictures failed" in result.stderr
    assert result.stdout.count(" @[ ") == 12
    (folder / images[7]["file_name"]).unlink()
    for number in (3, 7):
        (folder / images[number]["file_name"]).symlink_to(pictures / "val" / images[number]["file_name"])
    result = run_evaluate(*arguments, "--shard", "2/2", "--resume")
    assert result.returncode == 0, result.stderr
    assert run_evaluate(*arguments, "--merge").returncode == 0
    assert (out / "detections.json").read_bytes() == whole[1]


def test_a_repaired_picture_is_all_that_resume_does(few, whole, pictures, tmp_path, monkeypatch, capsys):
    arguments, out = few
    folder, images = tmp_path / "pictures", json.loads(arguments[0].read_text())["images"]
    folder.mkdir()
    for image in images[1:]:
        (folder / image["file_name"]).symlink_to(pictures / "val" / image["file_name"])
    command_line = [str(arguments[0]), str(folder), "--out", str(out), "--model", str(SHAPES)]
    assert evaluate.main(command_line) == 1
    (folder / images[0]["file_name"]).symlink_to(pictures / "val" / images[0]["file_name"])
    tried, prepare = [], evaluate.prepare
    monkeypatch.setattr(evaluate, "prepare", lambda path, settings: tried.append(path.name) or prepare(path, settings))
    assert evaluate.main([*command_line, "--resume"]) == 0
    assert tried == [images[0]["file_name"]]
    assert (out / "detections.json").read_bytes() == whole[1]


def test_a_failure_never_replaces_a_result(few, whole):
    arguments, out = few
    assert run_evaluate(*arguments, "--shard", "1/1", "--resume").returncode == 0
    (out / "detections.json").unlink()
    for shard in ("1/2", "2/2"):
        assert run_evaluate(*arguments, "--shard", shard).returncode == 0
    header, first, *_ = (out / "detections.1-of-2.jsonl").read_text().splitlines()
    failed = {"image_id": json.loads(first)["image_id"], "error": "unreadable"}
    (out / "detections.9-of-9.jsonl").write_text(f"{header}\n{json.dumps(failed)}\n")
    assert run_evaluate(*arguments, "--merge").returncode == 0
    assert (out / "detections.json").read_bytes() == whole[1]


def test_a_picture_on_which_the_model_fails_is_skipped(few, monkeypatch, capsys):
    detect_in = FasterRCNN.detect_in
    calls = []

    def fail_once(self, *prepared):
        calls.append(1)
        if len(calls) == 5:
            raise ModelError("NaN")
        return detect_in(self, *prepared)

    monkeypatch.setattr(FasterRCNN, "detect_in", fail_once)
    assert evaluate.main([*map(str, few[0]), "--model", str(SHAPES)]) == 1
    assert len(calls) == 12
    assert "1 pictures failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("annotations", lambda entry: entry.pop("iscrowd"), "iscrowd"),
        ("annotations", lambda entry: entry.update(area="large"), "area"),
        ("annotations", lambda entry: entry.pop("bbox"), "bbox"),
        ("annotations", lambda entry: entry.update(bbox=[]), "bbox"),
        ("annotations", lambda entry: entry.update(bbox=["a", 1, 2, 3]), "bbox"),
        ("annotations", lambda entry: entry.update(bbox=[None] * 4), "bbox"),
        ("annotations", lambda entry: entry.update(bbox=[float("nan")] * 4), "malformed"),  # no JSON has a NaN
        ("annotations", lambda entry: entry.update(bbox=[1e300] * 4), "bbox"),
        ("annotations", lambda entry: entry.update(iscrowd=10**30), "iscrowd"),
        ("categories", lambda entry: entry.pop("name"), "name"),
        ("categories", lambda entry: entry.update(name="star"), "two categories"),
        ("images", lambda entry: entry.update(id=1_000_001), "two images"),
        ("images", lambda entry: entry.update(file_name=7), "file_name"),
        ("images", lambda entry: entry.update(id="one"), "id"),
    ],
)
def test_annotations_that_lack_something(few, kind, change, word):
    arguments, out = few
    content = json.loads(arguments[0].read_text())
    change(content[kind][0])
    arguments[0].write_text(json.dumps(content))
    assert_refused(run_evaluate(*arguments), word)
    assert not out.exists()


def test_a_name_that_is_too_long_is_a_picture_that_cannot_be_read(few):
    arguments, _ = few
    content = json.loads(arguments[0].read_text())
    content["images"][0]["file_name"] = "x" * 300 + ".png"
    arguments[0].write_text(json.dumps(content))
    result = run_evaluate(*arguments)
    assert result.returncode == 1
    assert "File name too long" in result.stderr
    assert "1 pictures failed" in result.stderr


def test_categories_of_the_same_id(few):
    arguments, _ = few
    content = json.loads(arguments[0].read_text())
    content["categories"][0]["id"] = content["categories"][1]["id"]
    arguments[0].write_text(json.dumps(content))
    assert_refused(run_evaluate(*arguments), "two categories of the same id")


def test_broken_pictures_are_named(few, tmp_path):
    """One that is not there is, too; a folder that has none of them is another one."""
    arguments, out = few
    (tmp_path / "broken").mkdir()
    arguments[1] = tmp_path / "broken"
    assert_refused(run_evaluate(*arguments), f"{tmp_path / 'broken'} has none of the 12 pictures, such as 1000000.png")
    assert not out.exists()
    (tmp_path / "broken" / "1000001.png").write_text("no picture")
    result = run_evaluate(*arguments)
    assert result.returncode == 2
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("evaluate.py: ")]
    assert len(lines) == 13
    assert lines[0].startswith("evaluate.py: 1000000.png: ")
    assert lines[0].endswith("1000000.png: No such file or directory")
    assert lines[1].startswith("evaluate.py: 1000001.png: not a picture")
    assert "nothing was detected" in lines[-1]


@pytest.mark.parametrize("number", [lambda i: i, lambda i: 5, lambda i: f"no. {i}", None])
def test_ids_of_annotations_do_not_matter(few, whole, number):
    """Not if they count from 0, are equal, are texts, or are missing: pycocotools would lose a match of id 0."""
    arguments, _ = few
    content = json.loads(arguments[0].read_text())
    for i, entry in enumerate(content["annotations"]):
        entry.pop("id")
        if number:
            entry["id"] = number(i)
    arguments[0].write_text(json.dumps(content))
    result = run_evaluate(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1:13] == whole[0].splitlines()[1:13]


@pytest.mark.parametrize("change", [lambda content: content.pop("annotations"), lambda c: c["annotations"].clear()])
def test_without_annotations_only_the_results_are_written(few, whole, change):
    """As for COCO's test sets, whose annotations only its server has."""
    arguments, out = few
    content = json.loads(arguments[0].read_text())
    change(content)
    arguments[0].write_text(json.dumps(content))
    result = run_evaluate(*arguments, "--per-class")
    assert result.returncode == 0, result.stderr
    assert "nothing to measure" in result.stdout
    assert " @[ " not in result.stdout
    assert (out / "detections.json").read_bytes() == whole[1]


def test_nothing_found_without_annotations_is_an_empty_list(tmp_path):
    (tmp_path / "blank").mkdir()
    cv2.imwrite(str(tmp_path / "blank" / "1.png"), np.full((60, 80, 3), 127, np.uint8))
    names = ["circle", "triangle", "square", "star", "cross", "crescent"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    content = {"images": [{"id": 1, "file_name": "1.png"}], "categories": categories}
    (tmp_path / "test.json").write_text(json.dumps(content))
    result = run_evaluate(tmp_path / "test.json", tmp_path / "blank", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []


def test_a_class_that_the_annotations_do_not_know(few):
    arguments, out = few
    content = json.loads(arguments[0].read_text())
    content["categories"][3]["name"] = "planet"
    arguments[0].write_text(json.dumps(content))
    assert_refused(run_evaluate(*arguments), "star")
    assert not out.exists()


def test_categories_that_the_model_does_not_know_are_left_out(few, whole):
    """As MMDetection does, and as COCO's annotations need for a model of persons only."""
    arguments, out = few
    content = json.loads(arguments[0].read_text())
    content["categories"] += [{"id": 91, "name": "planet"}, {"id": 92, "name": "comet"}]
    box = {"image_id": content["images"][0]["id"], "bbox": [1, 1, 50, 50], "area": 2500, "iscrowd": 0}
    content["annotations"] += [{**box, "id": 10**6 + i, "category_id": 91 + i % 2} for i in range(40)]
    arguments[0].write_text(json.dumps(content))
    result = run_evaluate(*arguments, "--per-class")
    assert result.returncode == 0, result.stderr
    assert "2 categories that the model does not know are left out" in result.stdout
    assert "planet" not in result.stdout
    numbers, expected = ([line for line in text.splitlines() if " @[ " in line] for text in (result.stdout, whole[0]))
    assert numbers == expected
    assert len(numbers) == 12


def test_annotations_of_unknown_categories_alone_are_nothing_to_measure(few):
    arguments, _ = few
    content = json.loads(arguments[0].read_text())
    content["categories"].append({"id": 91, "name": "planet"})
    for entry in content["annotations"]:
        entry["category_id"] = 91
    arguments[0].write_text(json.dumps(content))
    result = run_evaluate(*arguments)
    assert result.returncode == 0, result.stderr
    assert "nothing to measure" in result.stdout


@pytest.mark.parametrize(
    "content", [None, "", "{", "[1, 2]", "{}", '{"images": [], "annotations": [], "categories": []}']
)
def test_files_that_are_no_annotations(few, content):
    arguments, _ = few
    arguments[0].unlink()
    if content is not None:
        arguments[0].write_text(content)
    assert_refused(run_evaluate(*arguments), arguments[0])


def test_a_folder_that_is_not_there(few, tmp_path):
    few[0][1] = tmp_path / "nowhere"
    assert_refused(run_evaluate(*few[0]), tmp_path / "nowhere")


def test_a_partial_file_of_another_run_is_not_mixed(few):
    arguments, out = few
    out.mkdir()
    partial = out / "detections.1-of-1.jsonl"
    for content, word in (
        ('{"pair": "another", "annotations": ""}\n', "another model"),
        ("[1\n{}\n", "damaged"),
        ("[1]\n", "damaged"),
        ("\udcff\n", "damaged"),
        ("[" * 100_000 + "\n", "damaged"),
        ('{}\n{"image_id": 1000000, "detections": 7}\n', "damaged"),
        ('{}\n{"image_id": 1000000, "detections": [3]}\n', "damaged"),
        ('{}\n{"image_id": 1000000, "detections": [{"a": 1}]}\n', "damaged"),
        ('{}\n{"image_id": 1000000}\n', "damaged"),
    ):
        partial.write_bytes(content.encode(errors="surrogateescape"))
        assert_refused(run_evaluate(*arguments, "--resume"), word)
        assert partial.read_bytes() == content.encode(errors="surrogateescape")


def test_pycocotools_missing_is_said(few, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COCO", None)
    assert evaluate.main([*map(str, few[0]), "--model", str(SHAPES)]) == 2
    assert "pip install pycocotools" in capsys.readouterr().err


def test_reading_stays_a_few_pictures_ahead(tmp_path):
    """However slow the networks are, memory holds a bounded number of prepared pictures."""
    cv2.imwrite(str(tmp_path / "picture.png"), np.full((40, 60, 3), 90, np.uint8))
    images = [{"file_name": "picture.png", "id": i} for i in range(50)]
    settings = Preprocess(scale=(60, 40), mean=(0, 0, 0), std=(1, 1, 1), to_rgb=True, pad_divisor=32)
    asked = []

    def counted():
        for image in images:
            asked.append(image)
            yield image

    for number, (image, future) in enumerate(evaluate.prepared_pictures(counted(), tmp_path, settings)):
        assert image["id"] == number
        assert future.result().blob.shape == (1, 3, 64, 64)
        assert len(asked) - number <= evaluate.PICTURES_AHEAD + 1
