"""TensorRT builds an engine for a range of shapes; here is the range that a detector's settings allow.

So the engines are built once, when the networks are opened, and kept in a folder beside them.
"""

from detectors.networks import BLOCK, ModelError, short
from detectors.preprocess import new_size, padded_sides


def is_wanted(execution):
    """Return whether TensorRT is the first provider of an Execution."""
    return bool(execution.providers) and short(execution.providers[0]) == "tensorrt"


def options_for(network, settings):
    """Return onnxruntime's options of TensorRT for one of the networks of a detector with these settings."""
    name, _, shape = network.declared[0]
    if name == "image":
        shapes = picture_shapes(settings.preprocess)
    elif name == "roi_feats":
        shapes = roi_shapes(network.path.stem, shape, settings)
    else:
        shapes = []  # PointRend's points: it builds an engine for each number of them
    texts = [f"{name}:{'x'.join(map(str, sides))}" for sides in shapes]
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(network.path.parent / "tensorrt"),
        **dict(zip(("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"), texts)),
    }


def picture_shapes(settings):
    """Return the smallest, a usual and the largest shape [1, 3, H, W] that preprocess makes of a picture."""
    if settings.scale is None:
        raise ModelError("--provider tensorrt: this detector takes pictures as large as they are, and an engine is for "
                         "a range of sizes: use cuda")  # fmt: skip
    usual = new_size(640, 480, settings)[::-1]
    least, most = ((1, 1), [max(settings.scale)] * 2) if settings.keep_ratio else (usual, usual)
    return [(1, 3, *padded_sides(*size, settings)) for size in (least, usual, most)]


def roi_shapes(stage, shape, settings):
    """Return the smallest, a usual and the largest shape of what a head gets: [B, C, s, s] with the shape's C and s."""
    count = (settings.head if stage.startswith("mask") else settings.proposals).max_per_img
    channels, *sides = shape[1:]
    row = 4 * channels * sides[0] * sides[1]  # bytes
    most = min(count, max(1, BLOCK // row))
    return [(b, channels, *sides) for b in (1, most, most)]
