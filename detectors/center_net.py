"""CenterNet (1904.07850): an object is a point, the peak of its class's heat; its size is read there."""

import numpy as np

from detectors.one_network import OneNetwork
from detectors.settings import CenterNetSettings
from postprocess import Detections, ignore, rescale, top_k


class CenterNet(OneNetwork):
    """An exported CenterNet, see OneNetwork."""

    Settings = CenterNetSettings

    def find(self, outputs, picture, record=ignore):
        """Return the Detections in what the network says of a picture."""
        return best_peaks(*outputs, picture, self.settings.head, record)

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the network, {file: {name: shape}}: see Network.expect."""
        channels = {"heatmap": len(settings.classes), "size": 2, "offset": 2}
        return {
            "model.onnx": {"image": ("N", 3, "H", "W"), **{name: ("N", c, "h", "w") for name, c in channels.items()}}
        }


def best_peaks(heatmap, size, offset, picture, settings, record=ignore):
    """Turn maps into Detections, best first, no more than settings.max_per_img.

    heatmap [classes, h, w]: scores; size [2, h, w]: width and height of the box around a cell, and offset [2, h, w]:
    how far its centre is from the cell's corner, along x and y; both in cells. CenterNet, section 4, From points to
    bounding boxes.
    """
    scores = np.where(heatmap == largest_around(heatmap), heatmap, 0).ravel()
    kept = top_k(scores, settings.max_per_img)
    kept = kept[scores[kept] > settings.score_threshold]
    labels, cell = np.divmod(kept, size[0].size)
    (height, width), (input_height, input_width) = heatmap.shape[1:], picture.blob.shape[2:]
    corners = np.stack(np.divmod(cell, width)[::-1], axis=1).astype(np.float32)
    centers = corners + offset.reshape(2, -1)[:, cell].T
    half_sizes = size.reshape(2, -1)[:, cell].T / 2
    stride = np.float32([input_width / width, input_height / height] * 2)
    resized = np.concatenate([centers - half_sizes, centers + half_sizes], axis=1) * stride
    resized = resized - np.float32([*picture.offset, *picture.offset])
    boxes = rescale(resized, picture, settings)
    record("detect", candidates=boxes, resized=resized, scores=scores[kept], labels=labels, kept=np.arange(len(kept)))
    return Detections(boxes, scores[kept], labels)


def largest_around(heatmap):
    """Return the largest of the 3 x 3 scores around each of a map [classes, h, w], whose scores are above zero."""
    padded = np.pad(heatmap, [(0, 0), (1, 1), (1, 1)])
    columns = np.maximum(np.maximum(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
    return np.maximum(np.maximum(columns[:, :, :-2], columns[:, :, 1:-1]), columns[:, :, 2:])
