"""One-stage detectors with anchors: RetinaNet (1708.02002), and those that compute the same with other settings.

It is the RPN with an answer for every class. ATSS (1912.02424) has one anchor in a cell, and a centerness: how near
the anchor is to the middle of its object. SSD (1512.02325) has other anchors on each level, and a softmax. YOLOF
(2103.09460) has a single level, where a box's centre may not move far.
"""

import numpy as np

from detectors.one_stage import OneStage
from detectors.settings import RetinaNetSettings
from postprocess import decode_boxes, grid_anchors, map_stride


class RetinaNet(OneStage):
    """An exported detector of this kind, see OneStage."""

    Settings = RetinaNetSettings

    def decode(self, level, sizes, priors, deltas, image_size):
        """Return the boxes [n, 4] that deltas [n, 4] make of some anchors of a level; sizes: of all levels' maps."""
        anchors = self.settings.anchors
        stride = map_stride(level, sizes, anchors)
        boxes = grid_anchors(np.float32(anchors.boxes[level]), sizes[level], stride, priors)
        if self.settings.max_shift is not None:
            limits = np.float32(self.settings.max_shift) / (boxes[:, 2:] - boxes[:, :2])
            deltas = np.hstack([np.clip(deltas[:, :2], -limits, limits), deltas[:, 2:]])
        return decode_boxes(boxes, deltas, self.settings.deltas, image_size)

    @staticmethod
    def priors(settings):
        """Return how many anchors a cell has, level by level."""
        return [len(boxes) for boxes in settings.anchors.boxes]

    @staticmethod
    def values(settings):
        """Return how many numbers the network says of an anchor's box."""
        return 4
