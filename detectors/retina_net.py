"""One-stage detectors with anchors: RetinaNet (1708.02002), and those that compute the same with other settings.

It is the RPN with an answer for every class. ATSS (1912.02424) has one anchor in a cell, and a centerness: how near
the anchor is to the middle of its object. SSD (1512.02325) has other anchors on each level, and a softmax. YOLOF
(2103.09460) has a single level, where a box's centre may not move far.
"""

import numpy as np

from detectors.one_stage import OneStage, sizes_of, values_of
from detectors.settings import RetinaNetSettings
from postprocess import decode_boxes, grid_anchors, map_stride


class RetinaNet(OneStage):
    """An exported detector of this kind, see OneStage."""

    Settings = RetinaNetSettings

    def decode(self, level, levels, priors, image_size):
        """Return the boxes [n, 4] that a level's map of deltas makes of some anchors; levels: the maps of each."""
        boxes, deltas = self.anchors_and_values(level, levels, priors)
        if self.settings.max_shift is not None:
            limits = np.float32(self.settings.max_shift) / (boxes[:, 2:] - boxes[:, :2])
            mean, std = (np.float32(values[:2]) for values in (self.settings.deltas.means, self.settings.deltas.stds))
            shifts = np.clip(deltas[:, :2], (-limits - mean) / std, (limits - mean) / std)
            deltas = np.hstack([shifts, deltas[:, 2:]])
        return decode_boxes(boxes, deltas, self.settings.deltas, image_size)

    def anchors_and_values(self, level, levels, priors):
        """Return some anchors [n, 4] of a level, and what the network says of them [n, 4]."""
        anchors, sizes = self.settings.anchors, sizes_of(levels)
        base = np.float32(anchors.boxes[level])
        boxes = grid_anchors(base, sizes[level], map_stride(level, sizes, anchors), priors)
        return boxes, values_of(levels[level]["reg"], len(base), priors)

    @staticmethod
    def priors(settings):
        """Return how many anchors a cell has, level by level."""
        return [len(boxes) for boxes in settings.anchors.boxes]
