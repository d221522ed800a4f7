"""One-stage detectors without anchors: FCOS (1904.01355), and those that predict the same four distances.

Every cell has one point. From there, the network predicts how far it is to the left, upper, right and lower side of
the box. FoveaBox (1904.03797), FSAF (1903.00621), VarifocalNet (2008.13367), AutoAssign (2007.03496) and RepPoints
(1904.11490) train other cells, or arrive at the distances in another way. GFL (2006.04388) predicts a distribution.
"""

import numpy as np

from detectors.one_stage import OneStage
from detectors.settings import FCOSSettings
from postprocess import softmax


class FCOS(OneStage):
    """An exported detector of this kind, see OneStage."""

    Settings = FCOSSettings

    def decode(self, level, sizes, priors, distances, image_size):
        """Return the boxes [n, 4] around some points of a level; sizes: of all levels' maps.

        distances [n, 4]: to the left, upper, right and lower side, in units; with `bins` [n, 4 * bins], logits of the
        distribution of each distance. FCOS, section 3.1, equation 1; GFL, section 3, equation 5.
        """
        points, (height, width) = self.settings.points, image_size
        if points.bins:
            distances = softmax(distances.reshape(-1, 4, points.bins)) @ np.arange(points.bins, dtype=np.float32)
        elif points.exponential:
            distances = np.exp(distances)
        distances = distances * np.float32(points.units[level])
        centers = grid_points(sizes[level], points.strides[level], points.offset, priors)
        boxes = np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], axis=1)
        return np.clip(boxes, 0, np.float32([width, height] * 2) - np.float32(points.last_pixel))

    @staticmethod
    def priors(settings):
        """Return how many points a cell has, level by level."""
        return [1] * len(settings.points.strides)

    @staticmethod
    def values(settings):
        """Return how many numbers the network says of a point's box."""
        return 4 * max(settings.points.bins, 1)


def grid_points(feature_size, stride, offset, indices):
    """Return some points [n, 2] of a level, counted by row and column of its map of (height, width) cells."""
    y, x = np.divmod(indices, feature_size[1])
    return np.stack([x, y], axis=1).astype(np.float32) * np.float32(stride) + np.float32(offset * stride)
