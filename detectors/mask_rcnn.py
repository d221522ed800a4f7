"""Mask R-CNN: Faster R-CNN that also says which pixels of a box belong to the object.

    detections -> pool -> mask head -> scores of 28 x 28 cells for every box -> paste -> a mask of the picture

The boxes are final when the mask head sees them: it pools their features anew, more finely, and predicts a mask for
every class, of which the label's is taken. Mask R-CNN (arXiv 1703.06870), section 3.
"""

import numpy as np

from detectors import rle
from detectors.cascade_rcnn import CascadeRCNN
from detectors.faster_rcnn import FasterRCNN, pool
from detectors.settings import CascadeMaskRCNNSettings, MaskRCNNSettings
from postprocess import sigmoid


class MaskRCNN(FasterRCNN):
    """An exported Mask R-CNN; its Detections have masks."""

    Settings = MaskRCNNSettings

    def find_objects(self, features, proposals, picture, record):
        """Return the Detections among the proposals [r, 4], with their masks."""
        found = super().find_objects(features, proposals, picture, record)
        scores = self.mask_scores(found, features, picture, record)
        masks = paste_all(scores, found.boxes, picture, self.settings.masks)
        record("paste", boxes=found.boxes, scores=scores, masks=masks)
        return found._replace(masks=masks)

    def mask_scores(self, found, features, picture, record):
        """Return the scores [d, s, s], 0 to 1, of the cells of each of the Detections' boxes."""
        settings = self.settings.masks
        rois = found.boxes * np.float32(picture.scale_factor)
        roi_feats = pool(features, rois, settings.rois, record, "align_masks")
        channel = 0 if settings.class_agnostic else found.labels
        heads = [network for name, network in self.networks.items() if name.startswith("mask")]
        scores = [sigmoid(head(roi_feats, record)[0][np.arange(len(rois)), channel]) for head in heads]
        return np.mean(scores, axis=0)  # a cascade has several heads

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the networks, {file: {name: shape}}: see Network.expect."""
        others = super().tensors(settings)
        s, channels = settings.masks.rois.output_size, 1 if settings.masks.class_agnostic else len(settings.classes)
        mask = {"roi_feats": ("B", "C", s, s), "mask": ("B", channels, "m", "m")}
        names = [name.replace("model2", "mask") for name in others if name.startswith("model2")]
        return {**others, **dict.fromkeys(names, mask)}


class CascadeMaskRCNN(MaskRCNN, CascadeRCNN):
    """An exported Cascade Mask R-CNN: each stage has a mask head, and all of them see the boxes of the last one."""

    Settings = CascadeMaskRCNNSettings


def paste_all(scores, boxes, picture, settings):
    """Return the masks [d] of boxes [d, 4] in the picture as it came in, run-length encoded one by one.

    scores [d, s, s]: of the cells of each box. As arrays, a hundred masks of a large picture would take a gigabyte.
    """
    masks = []
    for cells, box in zip(*placed(scores, boxes, picture.scale_factor, settings)):
        pasted, top, left = paste(cells, box, picture.original_size)
        masks.append(rle.encode(pasted >= np.float32(settings.threshold), picture.original_size, top, left))
    return np.array(masks, object)


def placed(scores, boxes, scale_factor, settings):
    """Return masks' cells [d, s, s] and the boxes [d, 4] over which they are stretched."""
    if settings.bordered:
        return with_border(scores, boxes)
    factor = np.float32(scale_factor)
    return scores, boxes * factor / factor  # what MMDetection pastes into: rounded twice


def paste(cells, box, size):
    """Return a mask's cells [s, s], stretched over a box [4] in a picture of `size` (height, width).

        W_y @ cells @ W_x^T        W_y [h, s], W_x [w, s]
    Returns the part [h, w] of the picture that the box covers, with a pixel more on each side, and the row and the
    column where it begins. It is RoIAlign the other way round: now many pixels take from few cells.
    """
    (x1, y1, x2, y2), (height, width) = box, size
    top, weights_y = pasting_matrix(y1, y2, len(cells), height)
    left, weights_x = pasting_matrix(x1, x2, len(cells), width)
    return weights_y @ (cells @ weights_x.T), top, left


def pasting_matrix(start, stop, num_cells, length):
    """Return the pixel before an interval, and the matrix [p, s] that makes pixels of its s cells, from there on.

    A pixel's centre lies between two cells' centres and takes from both, the more the nearer; beyond the outermost
    centres, cells count as zero. `length` is that of the whole row or column of pixels.
    """
    first = int(max(np.floor(start) - 1, 0))
    centers = np.arange(first, min(np.ceil(stop) + 1, length), dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (centers - start) / (stop - start) * 2 - 1  # -1 at the start, 1 at the stop
    place[np.isinf(place)] = 0  # an interval without length
    place = (place + 1) * np.float32(num_cells / 2) - np.float32(0.5)  # in cells, 0 at the first one's centre
    weights = 1 - np.abs(place[:, None] - np.arange(num_cells, dtype=np.float32))
    return first, np.fmax(weights, 0)  # 0 where the place is NaN: a pixel at the end of an interval without length


def with_border(scores, boxes):
    """Return masks [d, s + 2, s + 2] with a border of zeros, and their boxes [d, 4], larger by it, in whole pixels.

    So torchvision makes a mask fade at the edges of its box instead of ending there.
    """
    s = scores.shape[-1]
    centers, half_sizes = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5), (boxes[:, 2:] - boxes[:, :2])
    half_sizes = half_sizes * np.float32(0.5) * np.float32((s + 2) / s)
    first, last = np.trunc(centers - half_sizes), np.trunc(centers + half_sizes)
    return np.pad(scores, [(0, 0), (1, 1), (1, 1)]), np.concatenate([first, last + 1], axis=1)
