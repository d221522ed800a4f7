"""demo.py and evaluate.py with a detector in one file, in place of a folder of networks."""

import json

import numpy as np
import pytest
from conftest import ROOT, SHAPES, call_program

pytest.importorskip("onnx_ir", reason="needs onnxscript: uv run --extra test pytest")

import demo  # noqa: E402
import evaluate  # noqa: E402
import explain  # noqa: E402
import whole  # noqa: E402
from compare import verify_detections  # noqa: E402
from detectors import ModelError, load  # noqa: E402
from pictures import write_file  # noqa: E402

CKPT = SHAPES.parent
PICTURE = ROOT / "asset" / "shapes.png"


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    """Return a function that returns the path of a bundled detector in one file."""
    folder = tmp_path_factory.mktemp("one_file")

    def write(name="shapes", **options):
        path = folder / f"{name}_{len(list(folder.iterdir()))}.onnx"
        write_file(path, whole.build(load(CKPT / name), **options).SerializeToString())
        return path

    return write


@pytest.mark.parametrize("name", ["shapes", "shapes_mask", "shapes_atss"])
def test_it_finds_what_the_networks_find(one_file, drawn_pictures, photographs, name):
    expected, stages = load(CKPT / name), {}
    detector = load(one_file(name))
    assert detector.classes == expected.classes
    count = 0
    for image in [*(image for image, *_ in drawn_pictures[:10]), *photographs.values()]:
        found, wanted = detector(image, lambda stage, **arrays: stages.update({stage: arrays})), expected(image)
        assert verify_detections(name, found, wanted)
        count += len(wanted.boxes)
    assert count >= 100
    assert stages["preprocess"]["blob"].shape[:2] == (1, 3)
    np.testing.assert_array_equal(stages["detector"]["boxes"], found.boxes)


def test_demo_and_evaluate_take_it(one_file, tmp_path):
    path = one_file()
    runs = []
    for model in (path, CKPT / "shapes"):
        out = tmp_path / model.stem
        run = call_program(demo.main, PICTURE, "--model", model, "--out", out, "--save-stages", tmp_path / "stages.npz")
        assert run.returncode == 0, run.stderr
        runs.append(json.loads((out / "detections.json").read_text()))
    assert [entry["category"] for entry in runs[0]] == [entry["category"] for entry in runs[1]]
    assert len(runs[0]) == 11
    first, second = ([entry["bbox"] for entry in run] for run in runs)
    np.testing.assert_allclose(first, second, atol=1e-2)
    pytest.importorskip("pycocotools")
    from test_evaluate import draw_pictures

    draw_pictures(tmp_path, 5)
    arguments = [tmp_path / "val.json", tmp_path / "val", "--out", tmp_path / "evaluated"]
    run = call_program(evaluate.main, *arguments, "--model", path, "--compare", CKPT / "shapes", "--processes", "2")
    assert run.returncode == 0, run.stderr
    differences = [float(line.split()[-1]) for line in run.stdout.splitlines()[-12:]]
    assert max(map(abs, differences)) < 1e-3


@pytest.mark.parametrize("options", [{"from_picture": True}, {"fixed": 50}])
def test_other_inputs_and_outputs_are_refused(one_file, options):
    with pytest.raises(ModelError, match="without --from-picture and --end-to-end-fixed"):
        load(one_file(**options))


def test_what_is_built_in_cannot_be_set(one_file):
    with pytest.raises(ModelError, match=r"--set head\.iou_threshold: .*built in"):
        load(one_file(), [("head.iou_threshold", "0.6")])


def test_a_network_of_an_export_is_no_detector():
    with pytest.raises(ModelError, match=r"model1\.onnx takes and gives .*name the folder"):
        load(CKPT / "shapes" / "model1.onnx")
    with pytest.raises(ModelError, match="does not exist"):
        load(CKPT / "nothing.onnx")


@pytest.mark.parametrize("program", [explain, whole])
def test_what_shows_or_writes_the_networks_wants_their_folder(one_file, program, tmp_path):
    path = one_file()
    arguments = [PICTURE, "--model", path, "--out", tmp_path] if program is explain else [path, tmp_path / "x.onnx"]
    run = call_program(program.main, *arguments)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "is a file: name the folder of an export" in run.stderr
