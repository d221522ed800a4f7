"""TOOD (2108.07755): an FCOS that reads each side of a box where it is known best.

The cell that knows best what an object is need not be the one that knows best where its left side is. So a second map
says, for every cell and every side, from which place near it that side is to be read.
"""

import numpy as np

from detectors.fcos import FCOS, grid_points
from detectors.one_stage import sizes_of, values_of
from detectors.settings import TOODSettings


class TOOD(FCOS):
    """An exported TOOD, see OneStage."""

    Settings = TOODSettings

    def decode(self, level, levels, priors, image_size):
        """Return the boxes [n, 4] of some points of a level; they may leave the picture. levels: the maps of each.

        Sides that are read at different places may be in the wrong order; then the cell's own count. TOOD, section
        3.1, equation 5.
        """
        points, size, maps = self.settings.points, sizes_of(levels)[level], levels[level]
        every = grid_points(size, 1, points.offset, np.arange(size[0] * size[1]))  # in cells, as all here
        reg = maps["reg"].reshape(4, -1).T
        sides = np.concatenate([every - reg[:, :2], every + reg[:, 2:]], axis=1)  # [cells, 4]
        offsets = values_of(maps["offset"], 1, priors).reshape(-1, 4, 2)[..., ::-1]  # y comes before x
        places = every[priors][:, None] - np.float32(points.offset) + offsets
        boxes = np.stack([read(sides[:, i].reshape(size), places[:, i]) for i in range(4)], axis=1)
        swapped = (boxes[:, :2] > boxes[:, 2:]).any(axis=1)
        return np.where(swapped[:, None], sides[priors], boxes) * np.float32(points.strides[level])

    @staticmethod
    def kinds(settings):
        """Return the kinds of maps, and how many channels they have for each point."""
        cls, reg, *factor = FCOS.kinds(settings).items()
        return dict([cls, reg, *factor, ("offset", 8)])


def read(values, places):
    """Return what a map [h, w] holds at places [n, 2], x and y in cells, between its cells; outside, it is zero."""
    height, width = values.shape
    padded = np.pad(values, 1)
    place = np.clip(places + 1, 0, np.float32([width + 1, height + 1]))
    x, y = np.minimum(place.astype(np.int64), [width, height]).T
    right, below = (place - np.stack([x, y], axis=1)).astype(np.float32).T
    upper = padded[y, x] * (1 - right) + padded[y, x + 1] * right
    lower = padded[y + 1, x] * (1 - right) + padded[y + 1, x + 1] * right
    return upper * (1 - below) + lower * below
