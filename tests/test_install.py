"""pip install: the folder as a package, its commands, and what stays as it is in place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("uv"), reason="needs uv"),
]
COMMANDS = ["demo", "evaluate", "explain", "export", "whole"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the project without what it needs, which this environment has; return the environment for processes."""
    folder = tmp_path_factory.mktemp("installed")
    before = sorted(ROOT.iterdir())
    line = ["uv", "pip", "install", "--python", sys.executable, "--no-deps", "--target", folder, ROOT]
    result = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(ROOT.iterdir()) == before  # nothing is left behind
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def run(line, folder, environment):
    """Run a command line in a folder."""
    return subprocess.run(
        list(map(str, line)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_only_one_name_is_taken(installed):
    names = {path.name for path in Path(installed["PYTHONPATH"]).iterdir() if not path.name.endswith(".dist-info")}
    assert names - {".lock"} == {"faster_rcnn_onnx", "bin"}
    assert {path.name for path in (Path(installed["PYTHONPATH"]) / "bin").iterdir()} == {
        f"faster-rcnn-{name}" for name in COMMANDS
    }


def test_the_package_is_imported_beside_modules_of_the_same_names(installed, tmp_path):
    for name in ("postprocess", "detectors", "demo", "package"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    code = """
import sys
import faster_rcnn_onnx
path, modules = list(sys.path), set(sys.modules)
assert "cv2" not in modules
import cv2
detector = faster_rcnn_onnx.load(sys.argv[1])
found = detector(cv2.imread(sys.argv[2]))
assert sys.path == path
assert isinstance(found, faster_rcnn_onnx.Detections)
try:
    faster_rcnn_onnx.load("nothing")
except faster_rcnn_onnx.ModelError as error:
    print(error)
try:
    faster_rcnn_onnx.nothing
except AttributeError as error:
    print(error)
print(len(found.boxes), sys.modules["detectors"].__file__)
"""
    line = [sys.executable, "-c", code, ROOT / "ckpt" / "shapes_mask", ROOT / "asset" / "shapes.png"]
    result = run(line, tmp_path, installed)
    assert result.returncode == 0, result.stderr
    missing, attribute, last = result.stdout.splitlines()
    assert "nothing holds no export" in missing
    assert attribute == "module 'faster_rcnn_onnx' has no attribute 'nothing'"
    assert last == f"23 {Path(installed['PYTHONPATH']) / 'faster_rcnn_onnx' / 'detectors' / '__init__.py'}"


def test_the_commands_are_the_programs(installed, tmp_path):
    """The bundled model and picture are in the package; what is written goes to where one is."""
    result = run(["faster-rcnn-demo"], tmp_path, installed)
    assert result.returncode == 0, result.stderr
    assert "11 detections" in result.stdout
    assert len(json.loads((tmp_path / "output" / "detections.json").read_text())) == 11
    for name in COMMANDS:
        result = run([f"faster-rcnn-{name}", "--help"], tmp_path, installed)
        assert result.returncode == 0, result.stderr
        assert f"usage: {name}.py" in result.stdout
    result = run(["faster-rcnn-demo", "nothing.jpg"], tmp_path, installed)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_an_export_goes_where_one_is(installed, tmp_path):
    """It is found there by the other programs, too."""
    pytest.importorskip("onnx_ir", reason="needs onnxscript")
    (tmp_path / "ckpt").mkdir()
    for name in ("model1.onnx", "model2.onnx"):
        shutil.copy(ROOT / "ckpt" / "shapes" / name, tmp_path / "ckpt")
    result = run(["faster-rcnn-demo"], tmp_path, installed)
    assert result.stdout.startswith("model: ckpt "), result.stderr
    result = run(["faster-rcnn-whole", "ckpt"], tmp_path, installed)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ckpt" / "detector.onnx").exists()


def test_several_processes_of_a_command(installed, tmp_path):
    pytest.importorskip("pycocotools")
    from test_evaluate import draw_pictures

    draw_pictures(tmp_path, 4)
    model = ["--model", ROOT / "ckpt" / "shapes"]
    results = []
    for options in ([], ["--processes", "2"]):
        result = run(["faster-rcnn-evaluate", "val.json", "val", *model, *options], tmp_path, installed)
        assert result.returncode == 0, result.stderr
        results.append((tmp_path / "output" / "evaluation" / "detections.json").read_bytes())
    assert results[0] == results[1]


def test_a_copied_folder_finds_the_export_beside_it(tmp_path):
    """Without --model, from wherever it is started."""
    folder = tmp_path / "deployed"
    shutil.copytree(ROOT / "detectors", folder / "detectors")
    for name in ("demo.py", "postprocess.py", "pictures.py", "videos.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "ckpt" / "shapes_atss", folder / "ckpt")
    result = run([sys.executable, folder / "demo.py", ROOT / "asset" / "shapes.png"], tmp_path, os.environ)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"model: {folder / 'ckpt'} ")
    assert "10 detections" in result.stdout
