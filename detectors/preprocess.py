"""Pictures as each framework feeds them to its networks."""

from typing import NamedTuple, Tuple

import cv2
import numpy as np


class Picture(NamedTuple):
    """A picture, prepared for a network."""

    blob: np.ndarray  # [1, 3, H, W] float32; the picture, padded to the right and below, or on all sides
    image_size: Tuple[int, int]  # height and width of the picture in it
    scale_factor: np.ndarray  # [4] float32, by which x, y, x, y were multiplied
    original_size: Tuple[int, int]  # height and width of the picture as it came in
    offset: Tuple[int, int] = (0, 0)  # where in blob the picture begins, x and y


def preprocess(image, settings):
    """Return an image [h, w, 3] uint8 BGR as a Picture: resized and normalised (or the other way round), and padded.

    ValueError if it is not such an image, or so thin that nothing of it would be left.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        raise ValueError("the image is not what cv2.imread returns for a picture: [h, w, 3] uint8")
    height, width = image.shape[:2]
    size = new_size(width, height, settings)
    scale_factor = np.float32([size[0] / width, size[1] / height] * 2)

    image_size, offset = size[::-1], (0, 0)
    if settings.canvas:
        image, offset = in_the_middle(image, settings.canvas)
        size = image.shape[1::-1]
    order = slice(None, None, -1 if settings.to_rgb else 1)  # of the channels; here they are still BGR
    resize = normalize_and_resize if settings.normalize_first else resize_and_normalize
    image = resize(image, size, settings.mean[order], settings.std[order])[..., order]

    blob = np.full((1, 3, *padded_sides(*image.shape[:2], settings)), settings.pad_value, np.float32)
    blob[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return Picture(blob, image_size, scale_factor, (height, width), offset)


def new_size(width, height, settings):
    """Return the width and height to which a picture is resized; ValueError if nothing of it would be left."""
    if settings.scale is None or not settings.keep_ratio:
        return tuple(settings.scale or (width, height))
    long_side, short_side = max(settings.scale), min(settings.scale)
    factor = min(long_side / max(height, width), short_side / min(height, width))
    half = 0 if settings.normalize_first else 0.5  # sides are rounded to the nearest pixel, or down
    size = int(width * factor + half), int(height * factor + half)
    if min(size) < 1:
        raise ValueError(
            f"{width} x {height} pixels: too thin: resized to a long side of {long_side}, nothing would be left"
        )
    return size


def padded_sides(height, width, settings):
    """Return the height and width of what a network gets for an image that has been resized to this size."""
    sides = [max(height, width)] * 2 if settings.pad_to_square else [height, width]
    return [-(-side // settings.pad_divisor) * settings.pad_divisor for side in sides]


def in_the_middle(image, bits):
    """Return an image [h, w, 3] in the middle of black, and where it begins, x and y.

    The new sides have all of the lowest bits set, plus one: with 31, they are the next multiples of 32.
    """
    height, width = image.shape[:2]
    new_height, new_width = (height | bits) + 1, (width | bits) + 1
    top, left = new_height // 2 - height // 2, new_width // 2 - width // 2
    canvas = np.zeros((new_height, new_width, 3), image.dtype)
    canvas[top : top + height, left : left + width] = image
    return canvas, (left, top)


def resize_and_normalize(image, size, mean, std):
    """Return an image [h, w, 3] uint8 resized to (width, height) as bytes, as OpenCV does it, and then normalised."""
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
    image = cv2.subtract(image, np.float64(np.float32([mean])))
    return cv2.multiply(image, 1 / np.float64(np.float32([std])))


def normalize_and_resize(image, size, mean, std):
    """Return an image [h, w, 3] uint8 normalised and then resized to (width, height) in float32, as PyTorch does it.

    OpenCV rounds the places of the pixels differently: its result is up to 1e-3 off, which makes other detections.
    """
    # A byte has 256 values, so normalising is a table; it is applied to those rows alone that are needed. With values
    # of 0 to 1 it is rounded as PyTorch rounds.
    values = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    table = ((values - np.float32(np.array(mean) / 255)) / np.float32(np.array(std) / 255))[None]

    above, below, fraction = neighbours(image.shape[0], size[1])
    rows = [cv2.LUT(image[y], table).reshape(len(y), -1) for y in (above, below)]  # [height, 3 w]
    rows = blend(*rows, fraction[:, None])
    left, right, fraction = neighbours(image.shape[1], size[0])
    columns = [rows.take(3 * x + np.arange(3)[:, None], axis=1) for x in (left, right)]  # [height, 3, width]
    return blend(*columns, fraction).transpose(0, 2, 1)


def neighbours(length, new_length):
    """Return the two pixels of a row that each of `new_length` new ones lies between, and its distance to the first.

    Centres are aligned, and nothing is smoothed when a picture becomes smaller.
    """
    step = np.float64(np.float32(length) / np.float32(new_length))
    place = np.maximum(np.float32(step * (np.arange(new_length) + 0.5) - 0.5), 0)
    first = np.minimum(place.astype(np.int64), length - 1)
    return first, np.minimum(first + 1, length - 1), place - first.astype(np.float32)


def blend(first, second, fraction):
    """Return what lies between two arrays, which are overwritten: they are large."""
    first *= 1 - fraction
    second *= fraction
    first += second
    return first
