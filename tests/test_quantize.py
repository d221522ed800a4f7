"""quantize.py: 8 bits and half precision, and how it measures what they cost."""

import json
import platform
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SHAPES, call_program, draw_shapes

onnx = pytest.importorskip("onnx")

import dataset  # noqa: E402

import evaluate  # noqa: E402
import quantize  # noqa: E402
from detectors import Detections, load, rle  # noqa: E402
from sources import SourceError  # noqa: E402

ATSS = SHAPES.parent / "shapes_atss"


def copy_export(source, folder):
    """Copy an export to a folder, without what else is there."""
    folder.mkdir()
    for path in source.glob("*.onnx"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("drawn") / "pictures", range(40))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, drawn):
    """Return a folder with the bundled export and its int8."""
    folder = copy_export(SHAPES, tmp_path_factory.mktemp("shapes") / "export")
    assert quantize.write_int8(folder, *quantize.divide(drawn, 24))
    return folder


# ------------------------------------------------------------------ 8 bits


def weights(path):
    """Return the bytes of the weights of a network, by their kinds."""
    model = onnx.load(str(path))
    sizes = {}
    for tensor in model.graph.initializer:
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + onnx.numpy_helper.to_array(tensor).nbytes
    return sizes


@pytest.mark.slow
def test_the_files_of_8_bits(shapes):
    for name in ("model1.onnx", "model2.onnx"):
        before, after = weights(shapes / name), weights(shapes / "int8" / name)
        assert after[onnx.TensorProto.INT8] > 0.24 * before[onnx.TensorProto.FLOAT]  # all but a few are in 8 bits
        assert (shapes / "int8" / name).stat().st_size < 0.3 * (shapes / name).stat().st_size
    usual, detector = load(shapes), load(shapes / "int8")
    assert detector.settings.pair != usual.settings.pair
    bits = 7 if quantize.saturates() else 8
    assert detector.settings.source["int8"] == {"pictures": 24, "weights": bits}
    assert detector.settings.head == usual.settings.head
    largest = max(
        np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max()
        for name in ("model1.onnx", "model2.onnx")
        for tensor in onnx.load(str(shapes / "int8" / name)).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    )
    assert largest == 2 ** (bits - 1) - (bits == 8)  # 64 or 127
    for name in ("model1.onnx", "model2.onnx"):
        assert [entry.domain for entry in onnx.load(str(shapes / "int8" / name)).opset_import] == [""]
    assert list(detector.networks) == list(usual.networks)
    assert not list(shapes.glob(".int8*"))


@pytest.mark.slow
def test_networks_of_two_sets_do_not_mix(shapes, tmp_path):
    folder = copy_export(shapes / "int8", tmp_path / "mixed")
    shutil.copy(shapes / "model2.onnx", folder)
    with pytest.raises(Exception, match="come from different exports"):
        load(folder)


@pytest.mark.slow
def test_no_accuracy_is_lost(shapes, tmp_path):
    """On the 300 pictures that nothing was trained on: COCO's numbers, side by side."""
    dataset.write_split(tmp_path, "val")
    arguments = [tmp_path / "val.json", tmp_path / "val", "--out", tmp_path / "out"]
    result = call_program(evaluate.main, *arguments, "--model", shapes, "--compare", shapes / "int8")
    assert result.returncode == 0, result.stderr
    table = result.stdout.split("boxes      --model")[1].splitlines()[1:]
    numbers = {line[:9].strip(): [float(number) for number in line[9:].split()] for line in table}
    assert len(numbers) == 12
    assert numbers["AP"][0] == pytest.approx(0.820, abs=5e-4)
    assert numbers["AP"][1] > numbers["AP"][0] - 0.003
    for before, after, difference in numbers.values():
        assert difference == pytest.approx(after - before, abs=1.1e-4)
    assert any(difference for _, _, difference in numbers.values())  # they are not the same detector twice
    for folder in (tmp_path / "out", tmp_path / "out" / "compared"):
        assert json.loads((folder / "detections.json").read_text())
        assert not list(folder.glob("*.jsonl"))


@pytest.mark.slow
def test_a_one_stage_detector(drawn, tmp_path):
    folder = copy_export(ATSS, tmp_path / "export")
    assert quantize.write_int8(folder, *quantize.divide(drawn, 24))
    alike = quantize.likeness(load(folder), load(folder / "int8"), drawn[:10])
    assert min(alike.shares) > 0.95
    assert alike.counts[0] > 50


def test_what_differs_too_much_is_put_aside(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quantize, "SHARE", 1.01)
    folder = copy_export(ATSS, tmp_path / "export")
    assert not quantize.write_int8(folder, drawn[:2], drawn[2:3])
    assert capsys.readouterr().out.splitlines()[0].endswith("False")
    assert sorted(path.name for path in folder.iterdir()) == ["int8-rejected", "model.onnx"]
    assert load(folder / "int8-rejected")
    monkeypatch.setattr(quantize, "SHARE", 0.5)
    (folder / "int8").mkdir()
    (folder / "int8" / "model1.onnx").write_text("of another detector")
    assert quantize.write_int8(folder, drawn[:2], drawn[2:3])
    assert sorted(path.name for path in folder.iterdir()) == ["int8", "model.onnx"]
    assert load(folder / "int8")


def test_pictures_in_which_nothing_is_found(tmp_path):
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((300, 400, 3), np.uint8))
    folder = copy_export(SHAPES, tmp_path / "export")
    with pytest.raises(SourceError, match=r"finds nothing above 0.3 in .*, \.\.\., so it says nothing"):
        quantize.write_int8(folder, *quantize.divide(sorted(tmp_path.glob("*.png")), 8))
    assert sorted(path.name for path in folder.iterdir()) == ["model1.onnx", "model2.onnx"]


@pytest.mark.parametrize("measuring", [False, True])
def test_pictures_that_cannot_be_used(tmp_path, drawn, measuring):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((1, 5000, 3), np.uint8))
    folder = copy_export(ATSS, tmp_path / "export")
    for name in ("broken.png", "thin.png"):
        pictures = [drawn[:1], [tmp_path / name]]
        with pytest.raises(SourceError, match=name):
            quantize.write_int8(folder, *(pictures if measuring else pictures[::-1]))
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_pictures_that_cannot_measure(tmp_path, drawn):
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((300, 400, 3), np.uint8))
    with pytest.raises(SourceError, match="so int8 cannot be compared"):
        quantize.write_int8(copy_export(ATSS, tmp_path / "export"), drawn[:2], [tmp_path / "black.png"])


def test_saturation_is_what_the_processor_says():
    info = Path("/proc/cpuinfo")
    if not info.exists() or platform.machine() != "x86_64":
        pytest.skip("only Linux says it, for x86")
    flags = set(info.read_text().split("flags")[1].split("\n")[0].split())
    assert quantize.saturates() == (not flags & {"avx512_vnni", "avx_vnni"})


def test_what_stays_float32():
    arrays = {
        "big": np.ones((64, 64)),
        "small": np.ones((8, 8)),
        "1x1": np.ones((9, 9, 1, 1)),
        "3x3": np.ones((9, 9, 3, 3)),
    }
    nodes = [
        onnx.helper.make_node("Add", ["x", "small"], ["a"], name="a constant is added"),
        onnx.helper.make_node("Add", ["x", "a"], ["b"], name="two maps are added"),
        onnx.helper.make_node("MatMul", ["x", "small"], ["c"], name="a small product"),
        onnx.helper.make_node("MatMul", ["x", "big"], ["d"], name="a large product"),
        onnx.helper.make_node("MatMul", ["x", "b"], ["e"], name="a product of two maps"),
        onnx.helper.make_node("Conv", ["x", "1x1"], ["f"], name="within"),
        onnx.helper.make_node("Conv", ["x", "1x1"], ["cls"], name="scores"),
        onnx.helper.make_node("Conv", ["x", "3x3"], ["feat"], name="features"),
        onnx.helper.make_node("Gemm", ["x", "small"], ["reg"], name="deltas"),
        onnx.helper.make_node("Sigmoid", ["x"], ["s"], name="sigmoid"),
        onnx.helper.make_node("Mul", ["x", "s"], ["g"], name="swish"),
        onnx.helper.make_node("Mul", ["x", "x"], ["h"], name="a square"),
        onnx.helper.make_node("Conv", ["x", "1x1"], ["i"], name="heat"),
        onnx.helper.make_node("Sigmoid", ["i"], ["heatmap"], name="scores of heat"),
        onnx.helper.make_node("MatMul", ["x", "big"], ["j"], name="boxes"),
        onnx.helper.make_node("Add", ["j", "small"], ["k"], name="their bias"),
        onnx.helper.make_node("Sigmoid", ["k"], ["box"], name="within the picture"),
    ]
    constants = [onnx.numpy_helper.from_array(np.float32(array), name) for name, array in arrays.items()]
    outputs = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in ("cls", "feat", "reg", "heatmap", "box")
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [], outputs, constants)
    assert {*quantize.stay_float32(onnx.helper.make_model(graph))} == {
        "a constant is added", "a small product", "a product of two maps", "scores", "deltas", "a square",
        "heat", "scores of heat", "boxes", "their bias", "within the picture",
    }  # fmt: skip


def test_each_layer_has_a_bias_of_its_own():
    nodes = [onnx.helper.make_node("Conv", ["x", "w", "b"], [f"y{i}"]) for i in range(3)]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], [onnx.numpy_helper.from_array(np.ones(2, np.float32), "b")])
    model = onnx.helper.make_model(graph)
    quantize.give_own_biases(model)
    names = [node.input[2] for node in model.graph.node]
    assert len(set(names)) == 3
    assert sorted(names) == sorted(tensor.name for tensor in model.graph.initializer)
    for tensor in model.graph.initializer:
        assert onnx.numpy_helper.to_array(tensor).tolist() == [1, 1]


def test_inputs_are_kept_evenly(drawn, tmp_path, monkeypatch):
    """Of a thousand RoIs some, the first and one near the last among them, and of every network some."""
    detector, taken = load(SHAPES), {}
    monkeypatch.setattr(quantize, "KEPT", 2**18)
    files = quantize.record_inputs(detector, drawn[:3], tmp_path)
    assert [len(files[name]) for name in ("model1.onnx", "model2.onnx")] == [3, 3]
    detector(cv2.imread(str(drawn[0])), lambda stage, **arrays: taken.update({stage: arrays}))
    np.testing.assert_array_equal(np.load(files["model1.onnx"][0]), taken["model1"]["image"])
    kept, whole = np.load(files["model2.onnx"][0]), taken["model2"]["roi_feats"]
    assert kept.nbytes <= 2**18 < whole.nbytes
    step = -(-len(whole) // (2**18 // whole[0].nbytes))
    np.testing.assert_array_equal(kept, whole[::step])


# ------------------------------------------------------------------ half precision


def test_half_precision(tmp_path, capsys):
    folder = copy_export(SHAPES, tmp_path / "export")
    assert quantize.write_fp16(folder, SHAPES.parents[1] / "asset" / "shapes.png")
    assert capsys.readouterr().out.splitlines()[0].endswith("True")
    for name in ("model1.onnx", "model2.onnx"):
        sizes = weights(folder / "fp16" / name)
        assert sizes[onnx.TensorProto.FLOAT16] > 100 * sizes.get(onnx.TensorProto.FLOAT, 0)
    half = load(folder / "fp16")
    assert half.settings.source["fp16"] is True
    alike = quantize.likeness(load(folder), half, [SHAPES.parents[1] / "asset" / "shapes.png"], score=0)
    assert 0 < alike.worst < 1e-2


def test_numbers_too_large_for_half_precision(tmp_path, capsys):
    """A CPU would not notice: it computes in float32."""
    folder = copy_export(ATSS, tmp_path / "export")
    model = onnx.load(str(folder / "model.onnx"))
    first, second = [node for node in model.graph.node if node.op_type == "Conv"][:2]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for names, factor in ((first.input[1:], 3e4), (second.input[1:2], 1 / 3e4)):
        for name in names:
            values = onnx.numpy_helper.to_array(tensors[name]) * np.float32(factor)
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, str(folder / "model.onnx"))
    assert not quantize.write_fp16(folder, SHAPES.parents[1] / "asset" / "shapes.png")
    assert "too large for half precision" in capsys.readouterr().out
    assert (folder / "fp16-rejected" / "model.onnx").exists()


@pytest.mark.parametrize("step", [lambda path: 1 / 0, lambda path: onnx.load(str(path)).graph])
def test_a_library_that_fails(tmp_path, monkeypatch, step):
    """Whatever it raises, the network is named: while it is converted, or when it is tried."""
    folder = copy_export(ATSS, tmp_path / "export")
    monkeypatch.setattr(quantize, "to_fp16", step)
    with pytest.raises(SourceError, match=r"model\.onnx cannot be converted: \w+: "):
        quantize.write_fp16(folder, SHAPES.parents[1] / "asset" / "shapes.png")
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_sets_of_older_networks_are_removed(tmp_path):
    for kind in ("int8", "fp16-rejected", "mine"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "model.onnx").write_text("of older networks")
    (tmp_path / "fp16-rejected" / "note.txt").write_text("somebody's")
    quantize.remove_sets(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert files == {"fp16-rejected", "fp16-rejected/note.txt", "mine", "mine/model.onnx"}


def test_half_precision_that_is_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "HALF_SCORE", 0.0)
    folder = copy_export(ATSS, tmp_path / "export")
    assert not quantize.write_fp16(folder, SHAPES.parents[1] / "asset" / "shapes.png")
    assert (folder / "fp16-rejected" / "model.onnx").exists()
    assert not (folder / "fp16").exists()


# ------------------------------------------------------------------ the measure


def detections(*rows, masks=None):
    """Return Detections of rows: x1, y1, x2, y2, score, label."""
    rows = np.float64(rows).reshape(-1, 6)
    return Detections(np.float32(rows[:, :4]), np.float32(rows[:, 4]), rows[:, 5].astype(int), masks)


def test_twins_are_of_one_label_one_to_one_and_overlap():
    first = detections((0, 0, 10, 10, 0.9, 1), (0, 0, 10, 10, 0.8, 1), (50, 0, 60, 10, 0.7, 2), (80, 0, 90, 10, 0.6, 0))
    second = detections(
        (0, 0, 10, 9, 0.9, 1),  # 0.9 of it
        (50, 0, 60, 10, 0.9, 3),  # another label
        (80, 0, 90, 7.9, 0.5, 0),  # 0.79
        (0, 0, 10, 8.1, 0.4, 1),  # 0.81
    )
    here, there, iou = quantize.twins(first, second)
    assert here.tolist() == [0, 1]
    assert there.tolist() == [0, 3]
    np.testing.assert_allclose(iou, [0.9, 0.81], atol=1e-6)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_twins_of_nothing(empty):
    box = detections((0, 0, 10, 10, 0.9, 1))
    sides = [detections(), detections()] if empty == 2 else [detections(), box][:: 1 if empty else -1]
    assert [len(part) for part in quantize.twins(*sides)] == [0, 0, 0]


def test_boxes_without_area_have_no_twins():
    flat = detections((5, 5, 5, 5, 0.9, 1))
    assert len(quantize.twins(flat, flat)[0]) == 0


def test_likeness(drawn):
    """Of two detectors that say the same of every picture."""
    square = np.zeros((20, 20), bool)
    square[:10, :10] = True
    wider = np.zeros((20, 20), bool)
    wider[:10, :8] = True
    masks = [np.array([rle.encode(mask, (20, 20))], object) for mask in (square, wider)]
    first = detections((0, 0, 10, 10, 0.9, 1), masks=masks[0])
    second = detections((0, 0, 10, 9, 0.7, 1), masks=masks[1])
    alike = quantize.likeness(lambda image, record: first, lambda image, record: second, drawn[:2])
    assert alike.counts == (2, 2)
    assert alike.shares == (1, 1)
    assert alike.iou == pytest.approx(0.9)
    assert alike.score == alike.worst == pytest.approx(0.2)
    assert alike.mask_iou == pytest.approx(0.8)
    assert "mean IoU of masks 0.800" in quantize.describe(alike, "int8", drawn[:2])


def test_a_twin_may_have_a_score_below_the_limit(drawn):
    """Else a detection at the limit would count as lost."""
    first = detections((0, 0, 10, 10, 0.31, 1), (30, 0, 40, 10, 0.31, 1))
    second = detections((0, 0, 10, 10, 0.29, 1), (60, 0, 70, 10, 0.8, 1))
    alike = quantize.likeness(lambda image, record: first, lambda image, record: second, drawn[:1])
    assert alike.counts == (2, 1)
    assert alike.shares == (0.5, 0)


def test_pictures_are_divided():
    pictures = [f"{i}.png" for i in range(200)]
    calibrating, measuring = quantize.divide(pictures, 48)
    assert len(calibrating) == len(set(calibrating)) == 48
    assert len(measuring) == len(set(measuring)) == 100
    assert not {*calibrating} & {*measuring}
    numbers = [int(name[:-4]) for name in calibrating]
    assert {4, 5} >= set(np.diff(numbers))  # evenly spread
    calibrating, measuring = quantize.divide(pictures[:10], 48)
    assert len(calibrating) == 8
    assert len(measuring) == 2
    with pytest.raises(SourceError, match="at least 10 pictures, .* found: 9"):
        quantize.divide(pictures[:9], 48)
