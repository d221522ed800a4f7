"""Pictures as each framework feeds them to its networks."""

from typing import NamedTuple, Tuple

import cv2
import numpy as np


class Picture(NamedTuple):
    """A picture, prepared for a network."""

    blob: np.ndarray  # [1, 3, H, W] float32, zeros to the right of the picture and below it
    image_size: Tuple[int, int]  # height and width of the picture in it
    scale_factor: np.ndarray  # [4] float32, by which x, y, x, y were multiplied


def preprocess(image, settings):
    """Return an image [h, w, 3] uint8 BGR as a Picture: resized, normalised and padded as MMDetection's test pipeline.

    ValueError if it is not such an image, or so thin that nothing of it would be left.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        raise ValueError("the image is not what cv2.imread returns for a picture: [h, w, 3] uint8")
    height, width = image.shape[:2]
    long_side, short_side = max(settings.scale), min(settings.scale)
    factor = min(long_side / max(height, width), short_side / min(height, width))
    size = (int(width * factor + 0.5), int(height * factor + 0.5)) if settings.keep_ratio else tuple(settings.scale)
    if min(size) < 1:
        raise ValueError(
            f"{width} x {height} pixels: too thin: resized to a long side of {long_side}, nothing would be left"
        )
    scale_factor = np.float32([size[0] / width, size[1] / height] * 2)

    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    if settings.to_rgb:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    image = cv2.subtract(image.astype(np.float32), np.float64(np.float32([settings.mean])))
    image = cv2.multiply(image, 1 / np.float64(np.float32([settings.std])))

    padded = [-(-side // settings.pad_divisor) * settings.pad_divisor for side in image.shape[:2]]
    blob = np.zeros((1, 3, *padded), np.float32)
    blob[0, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return Picture(blob, image.shape[:2], scale_factor)
