"""From a picture as it came in to what the first network takes, as a graph; compare detectors/preprocess.py.

OpenCV resizes bytes in whole numbers: here are the same ones, so the bytes are the same. PyTorch resizes floats.
"""

from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto

from graphs.postprocess import as_float, constant

UNIT = 2048  # in OpenCV, the weights of the two pixels beside a place are whole numbers with this sum


class Picture(NamedTuple):
    """What preprocess returns, as values."""

    blob: Any  # [1, 3, H, W] float32
    image_size: Any  # [2] float32: height and width of the picture in it
    scale_factor: Any  # [4] float32


def preprocess(op, image, settings):
    """Return an image [h, w, 3] uint8 BGR, a value, as a Picture."""
    size = op.Shape(image, end=2)  # height and width
    new = new_size(op, size, settings)
    scale_factor = as_float(op, op.Gather(as_double(op, new) / as_double(op, size), [1, 0, 1, 0]))

    order = slice(None, None, -1 if settings.to_rgb else 1)  # of the channels; here they are still BGR
    mean, std = settings.mean[order], settings.std[order]
    if settings.canvas:
        image = normalize(op, as_float(op, in_the_middle(op, image, size, settings.canvas)), mean, std)
    elif settings.normalize_first:
        image = normalize_and_resize(op, image, size, new, mean, std)
    else:
        image = normalize(op, resize(op, image, size, new), mean, std)
    image = op.Gather(image, [*range(3)][order], axis=2)

    side = op.Shape(image, end=2)
    padded = op.Expand(op.ReduceMax(side, keepdims=1), [2]) if settings.pad_to_square else side
    padded = (padded + (settings.pad_divisor - 1)) / settings.pad_divisor * settings.pad_divisor
    pads = op.Concat([0, 0, 0], padded - side, [0], axis=0)
    image = op.Pad(image, pads, float(settings.pad_value))
    image = op.Unsqueeze(op.Transpose(image, perm=[2, 0, 1]), [0])
    return Picture(image, as_float(op, new), scale_factor)


def new_size(op, size, settings):
    """Return the height and width [2] to which a picture of `size` [2] is resized."""
    if settings.scale is None:
        return size
    if not settings.keep_ratio:
        return constant(op, np.array(settings.scale[::-1]))
    long_side, short_side = (constant(op, np.float64(side)) for side in (max(settings.scale), min(settings.scale)))
    sides = as_double(op, size)
    factor = op.Min(long_side / op.ReduceMax(sides, keepdims=0), short_side / op.ReduceMin(sides, keepdims=0))
    half = constant(op, np.float64(0 if settings.normalize_first else 0.5))
    return op.Cast(sides * factor + half, to=TensorProto.INT64)


def in_the_middle(op, image, size, bits):
    """Return an image [h, w, 3] in the middle of black; the lowest bits of its new sides are zero."""
    new = size / (bits + 1) * (bits + 1) + (bits + 1)
    before = new / 2 - size / 2
    return op.Pad(image, op.Concat(before, [0], new - size - before, [0], axis=0))


def normalize(op, image, mean, std):
    """Return an image [h, w, 3] float32, normalised; OpenCV multiplies in float64."""
    image = as_double(op, image - constant(op, np.float32(mean)))
    return as_float(op, image * constant(op, 1 / np.float64(np.float32(std))))


def resize(op, image, size, new):
    """Return an image [h, w, 3] uint8 of `size` [2] in a new size [2] and float32, with the bytes that OpenCV makes."""
    (above, below, upper, lower), (left, right, first, second) = (
        whole_weights(op, op.Gather(size, [axis]), op.Gather(new, [axis])) for axis in (0, 1)
    )
    first, second = (op.Unsqueeze(weight, [1]) for weight in (first, second))  # [W, 1]
    upper, lower = (op.Unsqueeze(weight, [1, 2]) for weight in (upper, lower))  # [H, 1, 1]
    columns = [op.Cast(op.Gather(image, pixels, axis=1), to=TensorProto.INT32) for pixels in (left, right)]
    image = (columns[0] * first + columns[1] * second) / 16
    image = op.Gather(image, above) * upper / (32 * UNIT) + op.Gather(image, below) * lower / (32 * UNIT)
    return as_float(op, (image + 2) / 4)


def whole_weights(op, length, new_length):
    """Return, for each of `new_length` new pixels of a row, the two that it lies between, and their weights."""
    # The reciprocal of a quotient is not always the other quotient.
    step = constant(op, np.float64(1)) / (as_double(op, new_length) / as_double(op, length))
    place = as_float(op, places(op, new_length, step))
    whole = op.Floor(place)
    fraction = place - whole
    first, last = op.Cast(whole, to=TensorProto.INT64), length - 1
    pixels = [op.Min(op.Max(pixel, 0), last) for pixel in (first, first + 1)]
    weights = [op.Cast(op.Round(part * float(UNIT)), to=TensorProto.INT32) for part in (1.0 - fraction, fraction)]
    return (*pixels, *weights)


def normalize_and_resize(op, image, size, new, mean, std):
    """Return an image [h, w, 3] uint8 of `size` [2] normalised and then resized in float32, as PyTorch does it."""
    mean, std = (constant(op, np.float32(np.array(values) / 255)) for values in (mean, std))
    above, below, fraction = neighbours(op, op.Gather(size, [0]), op.Gather(new, [0]))
    rows = [(as_float(op, op.Gather(image, pixels)) / 255.0 - mean) / std for pixels in (above, below)]
    image = blend(*rows, op.Unsqueeze(fraction, [1, 2]))
    left, right, fraction = neighbours(op, op.Gather(size, [1]), op.Gather(new, [1]))
    columns = [op.Gather(image, pixels, axis=1) for pixels in (left, right)]
    return blend(*columns, op.Unsqueeze(fraction, [1]))


def blend(first, second, fraction):
    """Return what lies between two values."""
    return first * (1.0 - fraction) + second * fraction


def neighbours(op, length, new_length):
    """Return the two pixels of a row that each of `new_length` new ones lies between, and its distance to the first."""
    step = as_double(op, as_float(op, length) / as_float(op, new_length))
    place = op.Max(as_float(op, places(op, new_length, step)), 0.0)
    first = op.Min(op.Cast(place, to=TensorProto.INT64), length - 1)
    return first, op.Min(first + 1, length - 1), place - as_float(op, first)


def places(op, new_length, step):
    """Return where the centres of new pixels are among the old ones, `step` of which lie between two of them."""
    half = constant(op, np.float64(0.5))
    return (as_double(op, op.Range(0, op.Squeeze(new_length), 1)) + half) * step - half


def as_double(op, values):
    """Return values as float64."""
    return op.Cast(values, to=TensorProto.DOUBLE)
