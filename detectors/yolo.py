"""YOLO: one-stage detectors that say where in, or around, a cell a box has its centre.

A box's score is that of its class times its objectness: how sure the network is that there is anything at all.
YOLOv3 (1804.02767) has three anchors in a cell. YOLOX (2107.08430) has none: its boxes start as squares of one stride.
"""

import numpy as np

from detectors.networks import ModelError
from detectors.retina_net import RetinaNet
from detectors.settings import YOLOSettings
from postprocess import sigmoid


class YOLO(RetinaNet):
    """An exported YOLO, see OneStage."""

    Settings = YOLOSettings

    def decode(self, level, levels, priors, image_size):
        """Return the boxes [n, 4] of some anchors of a level; they may leave the picture. levels: the maps of each.

        The four values are how the centre moves along x and y, in strides, and the logarithms of the factors of width
        and height. YOLOv3, section 2.1; YOLOX, section 2.1. ModelError if a box is
        infinitely large.
        """
        boxes, values = self.anchors_and_values(level, levels, priors)
        stride = np.float32(self.settings.anchors.strides[level])
        shifts = sigmoid(values[:, :2]) - np.float32(0.5) if self.settings.within_cell else values[:, :2]
        centers = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5) + shifts * stride
        with np.errstate(over="ignore"):
            half_sizes = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5) * np.exp(values[:, 2:])
        if not np.isfinite(half_sizes).all():
            raise ModelError("a box is infinitely large: the weights may be damaged")
        return np.concatenate([centers - half_sizes, centers + half_sizes], axis=1)
