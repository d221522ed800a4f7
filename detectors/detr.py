"""DETR (2005.12872): no anchors, no levels and no NMS; each of a hundred queries finds an object, or none."""

import numpy as np

from detectors.one_network import OneNetwork
from detectors.settings import DETRSettings
from postprocess import Detections, ignore, rescale, softmax, top_k


class DETR(OneNetwork):
    """An exported DETR, see OneNetwork."""

    Settings = DETRSettings

    def find(self, outputs, picture, record=ignore):
        """Return the Detections in what the network says of a picture."""
        return answers(*outputs, picture, self.settings.head, record)

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the network, {file: {name: shape}}: see Network.expect."""
        shapes = {"cls": ("N", "Q", len(settings.classes) + 1), "reg": ("N", "Q", 4)}
        return {"model.onnx": {"image": ("N", 3, "H", "W"), **shapes}}


def answers(cls, reg, picture, settings, record=ignore):
    """Turn what queries answer into Detections, best first, no more than settings.max_per_img.

    cls [q, classes + 1]: logits, "no object" last; reg [q, 4]: centre x and y, width and height, as parts of those of
    the picture. A query's class is the best one that is an object. DETR, sections 3.1 and 3.2.
    """
    every = softmax(cls)[:, :-1]
    labels, scores = every.argmax(axis=1), every.max(axis=1)
    height, width = picture.image_size
    resized = np.concatenate([reg[:, :2] - reg[:, 2:] / 2, reg[:, :2] + reg[:, 2:] / 2], axis=1)
    limits = np.float32([width, height] * 2)
    resized = np.clip(resized * limits, 0, limits)
    boxes = rescale(resized, picture, settings)
    kept = top_k(scores, settings.max_per_img)
    kept = kept[scores[kept] > settings.score_threshold]
    record("detect", candidates=boxes, resized=resized, scores=scores, labels=labels, kept=kept)
    return Detections(boxes[kept], scores[kept], labels[kept])
