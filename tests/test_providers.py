"""Execution providers: what they get told, what happens without them; on a GPU, that it finds the same as the CPU."""

import time

import numpy as np
import onnxruntime
import pytest
from boxes import assert_equal_detections
from conftest import SHAPES, TABLES

import whole
from compare import largest_differences, pair_detections
from detectors import Execution, ModelError, load, tensorrt
from detectors.preprocess import preprocess
from detectors.settings import changed

CKPT = SHAPES.parent
BUNDLED = ("shapes", "shapes_mask", "shapes_atss")
CUDA = Execution(("cuda",))


# ------------------------------------------------------------------ what they get told


class Session:
    """Stands in for onnxruntime's session: it runs on the CPU, says that it does not, and remembers its options."""

    started = []

    def __init__(self, path, options, providers, enable_fallback):
        self.session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.providers = providers
        Session.started.append(self)

    def get_providers(self):
        """Return the names of the providers that were asked for."""
        return [name for name, _ in self.providers]

    def __getattr__(self, name):
        return getattr(self.session, name)


InferenceSession = onnxruntime.InferenceSession


@pytest.fixture
def pretended(monkeypatch):
    """Pretend that onnxruntime has NVIDIA's providers; return what the list of started sessions becomes."""
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(Session, "started", [])
    return Session.started


def test_cuda_computes_with_all_bits_unless_told_otherwise(pretended):
    load(SHAPES, execution=CUDA)
    load(SHAPES, execution=Execution(("cpu", "CUDA"), {"use_tf32": "1", "device_id": "1"}))  # the CPU comes last
    usual, told = pretended[0].providers, pretended[-1].providers
    assert usual == [
        ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
        ("CPUExecutionProvider", {}),
    ]
    assert told[0][1] == {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC", "device_id": "1"}


def test_tensorrt_gets_the_shapes_that_the_settings_allow(pretended):
    """The bundled Mask R-CNN: 512 x 384 at most, in multiples of 32; 1000 proposals, 100 detections."""
    folder = CKPT / "shapes_mask"
    load(folder, execution=Execution(("tensorrt", "cuda"), {"trt_fp16_enable": "True"}))
    options = [dict(session.providers)["TensorrtExecutionProvider"] for session in pretended[-3:]]
    assert all(each.pop("trt_engine_cache_path") == str(folder / "tensorrt") for each in options)
    usual = {"trt_engine_cache_enable": "True", "trt_fp16_enable": "True"}
    names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
    assert options == [
        {**usual, **dict(zip(names, shapes))}
        for shapes in (
            ("image:1x3x32x32", "image:1x3x384x512", "image:1x3x512x512"),
            ("roi_feats:1x64x7x7", "roi_feats:1000x64x7x7", "roi_feats:1000x64x7x7"),
            ("roi_feats:1x64x14x14", "roi_feats:100x64x14x14", "roi_feats:100x64x14x14"),
        )
    ]
    assert [name for name, _ in pretended[-1].providers] == [
        "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {"scale": (512, 384)},
        {"scale": (384, 512), "pad_divisor": 1},
        {"scale": (300, 300), "keep_ratio": False},
        {"scale": (301, 200), "keep_ratio": False, "pad_divisor": 64},
        {"scale": (333, 333), "normalize_first": True, "pad_to_square": True},
    ],
    ids=str,
)
def test_every_picture_is_within_the_shapes(values):
    settings = load(SHAPES).settings.preprocess
    for name, value in values.items():
        settings = changed(settings, name, value)
    least, usual, most = np.array(tensorrt.picture_shapes(settings))
    rng, shapes = np.random.default_rng(0), []
    for height, width in [(480, 640), *rng.integers(20, 700, (60, 2))]:
        shapes.append(preprocess(np.zeros((height, width, 3), np.uint8), settings).blob.shape)
    assert (least <= shapes).all()
    assert (shapes <= most).all()
    assert shapes[0] == tuple(usual)
    assert tuple(np.max(shapes, axis=0)) == tuple(most)  # and they are no larger than they have to be


def test_pictures_of_any_size_are_none_for_tensorrt(pretended):
    settings = load(SHAPES).settings.preprocess
    any_size = changed(settings, "scale", None)
    for each in (any_size, changed(any_size, "canvas", 31)):
        with pytest.raises(ModelError, match="pictures as large as they are"):
            tensorrt.picture_shapes(each)


def test_more_rois_than_a_network_takes_at_once(pretended):
    """A thousand of 1024 x 14 x 14 are 800 MB; they come in blocks of 64 MiB."""
    settings = load(SHAPES).settings
    assert tensorrt.roi_shapes("model2", ["B", 1024, 14, 14], settings)[2] == (
        2**26 // (4 * 1024 * 14 * 14),
        1024,
        14,
        14,
    )


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_what_is_missing_is_said(name, capfd):
    """Where onnxruntime-gpu is installed, and no GPU is there; elsewhere, that it is not installed."""
    if name == "cuda" and on_a_gpu():
        pytest.skip("there is a GPU")
    installed = any(name in each.lower() for each in onnxruntime.get_available_providers())
    missing = {"cuda": r"libcublasLt\.so|is there such a device", "tensorrt": "install TensorRT libraries"}
    with pytest.raises(ModelError, match=missing[name] if installed else f"--provider {name}: .*onnxruntime-gpu"):
        load(SHAPES, execution=Execution((name,)))
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------ on a GPU


def on_a_gpu():
    """Return whether detectors can run with CUDA here."""
    try:
        load(SHAPES, execution=CUDA)
    except ModelError:
        return False
    return True


gpu = pytest.mark.skipif(not on_a_gpu(), reason="needs onnxruntime-gpu and an NVIDIA GPU")
TITLE = "On a GPU, against the CPU: largest differences, and milliseconds a picture"


def milliseconds(detector, image):
    """Return the median time of a detector for an image."""
    times = []
    for _ in range(12):
        start = time.perf_counter()
        detector(image)
        times.append((time.perf_counter() - start) * 1000)
    return f"{np.median(times[2:]):.1f} ms"


def compare_and_tabulate(name, detector, expected, images, least):
    """Check that a detector finds what the expected one finds (0.1 px, 1e-4 in score), and add a row to the table."""
    pairs = [(detector(image), expected(image)) for image in images]
    for found, wanted in pairs:
        assert_equal_detections(found, wanted, 0.1)
    assert sum(len(wanted.boxes) for _, wanted in pairs) >= least
    pairs = [pair_detections(*pair) for pair in pairs]
    pixels, scores = np.max([largest_differences(*pair) for pair in pairs], axis=0)
    times = milliseconds(detector, images[0]), milliseconds(expected, images[0])
    TABLES[TITLE].append([name, f"{pixels:.1e} px", f"{scores:.1e} in score", f"GPU {times[0]}", f"CPU {times[1]}"])


def pictures_of(drawn_pictures, photographs):
    """Return images in which there is something to find."""
    return [*(image for image, *_ in drawn_pictures[:20]), *photographs.values()]


@gpu
@pytest.mark.parametrize("name", BUNDLED)
def test_a_gpu_finds_the_same(name, drawn_pictures, photographs):
    detector, expected = load(CKPT / name, execution=CUDA), load(CKPT / name)
    for network in detector.networks.values():
        assert network.session.get_providers()[0] == "CUDAExecutionProvider"
    compare_and_tabulate(name, detector, expected, pictures_of(drawn_pictures, photographs), 100)


@gpu
@pytest.mark.parametrize("name", BUNDLED)
def test_a_gpu_finds_the_same_in_one_file(name, drawn_pictures, photographs, tmp_path):
    expected = load(CKPT / name)
    assert whole.write_whole(expected, tmp_path / "detector.onnx", drawn_pictures[0][0])
    detector = load(tmp_path / "detector.onnx", execution=CUDA)
    compare_and_tabulate(f"{name} in one file", detector, expected, pictures_of(drawn_pictures, photographs), 100)
