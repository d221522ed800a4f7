"""One-stage detectors without anchors: FCOS (1904.01355), and those that predict the same four distances.

Every cell has one point. From there, the network predicts how far it is to the left, upper, right and lower side of
the box. FoveaBox (1904.03797), FSAF (1903.00621), VarifocalNet (2008.13367), AutoAssign (2007.03496) and RepPoints
(1904.11490) train other cells, or arrive at the distances in another way. GFL (2006.04388) predicts a distribution.
"""

import numpy as np

from detectors.one_stage import OneStage, sizes_of, values_of
from detectors.settings import FCOSSettings
from postprocess import map_stride, softmax


class FCOS(OneStage):
    """An exported detector of this kind, see OneStage."""

    Settings = FCOSSettings

    def decode(self, level, levels, priors, image_size):
        """Return the boxes [n, 4] around some points of a level; levels: the maps of each.

        The values of a point are the distances to the left, upper, right and lower side, in units; with `bins`, they
        are logits of the distribution of each. FCOS, section 3.1, equation 1; GFL, section 3, equation 5.
        """
        points, sizes, (height, width) = self.settings.points, sizes_of(levels), image_size
        distances = values_of(levels[level]["reg"], 1, priors)
        if points.bins:
            distances = softmax(distances.reshape(-1, 4, points.bins)) @ np.arange(points.bins, dtype=np.float32)
        elif points.exponential:
            with np.errstate(over="ignore"):  # the box is clipped
                distances = np.exp(distances)
        distances = distances * np.float32(points.units[level])
        centers = grid_points(sizes[level], map_stride(level, sizes, points), points.offset, priors)
        boxes = np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], axis=1)
        return np.clip(boxes, 0, np.float32([width, height] * 2) - np.float32(points.last_pixel))

    @staticmethod
    def priors(settings):
        """Return how many points a cell has, level by level."""
        return [1] * len(settings.points.strides)

    @staticmethod
    def kinds(settings):
        """Return the kinds of maps, and how many channels they have for each point."""
        return {**OneStage.kinds(settings), "reg": 4 * max(settings.points.bins, 1)}


def grid_points(feature_size, stride, offset, indices):
    """Return some points [n, 2] of a level, counted by row and column of its map of (height, width) cells.

    `stride` is one number, or four if it differs along x and y.
    """
    y, x = np.divmod(indices, feature_size[1])
    stride = np.broadcast_to(np.float32(stride), 4)[:2]
    return np.stack([x, y], axis=1).astype(np.float32) * stride + np.float32(offset) * stride
