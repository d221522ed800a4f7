"""PointRend: Mask R-CNN whose masks grow like a picture that is rendered, finer only where they are uncertain.

    boxes -> coarse mask of 7 x 7 -> twice the size -> the points nearest to the outline are predicted anew -> ...

Doubled five times, 7 cells become 224, of which most lie so far inside or outside that nobody needs to look again.
PointRend (arXiv 1912.08193), sections 3.1 to 3.3.
"""

import numpy as np

from detectors.mask_rcnn import MaskRCNN
from detectors.settings import PointRendSettings
from postprocess import sigmoid


class PointRend(MaskRCNN):
    """An exported PointRend; it differs from Mask R-CNN in how a box gets the scores of its mask."""

    Settings = PointRendSettings

    def mask_scores(self, found, features, picture, record):
        """Return the scores [d, s, s], 0 to 1, of the cells of each of the Detections' boxes."""
        settings = self.settings.points
        rois, finest = found.boxes * np.float32(picture.scale_factor), surrounded(features[0])
        k, stride = self.settings.masks.rois.output_size, self.settings.masks.rois.strides[0]
        centers = np.broadcast_to(cell_centers(np.arange(k * k), k), (len(rois), k * k, 2))
        roi_feats = sample(finest, inside(rois, centers), stride)
        roi_feats = np.ascontiguousarray(roi_feats.transpose(0, 2, 1)).reshape(len(rois), len(features[0]), k, k)
        record("align_masks", rois=rois, roi_feats=roi_feats)
        coarse = self.networks["mask.onnx"](roi_feats, record)[0]

        channel = (np.arange(len(rois)), found.labels)
        logits = coarse[channel]
        for step in range(settings.steps):
            logits = enlarge(logits)
            s = logits.shape[-1]
            if step < settings.steps - 1 and settings.num_points >= 4 * s * s:
                continue  # the next step predicts all of its points anew anyway
            chosen = most_uncertain(logits, settings.num_points)
            points = cell_centers(chosen, s)
            fine = sample(finest, inside(rois, points), stride)
            point_feats = np.concatenate([fine, sample_masks(coarse, points)], axis=2)
            predicted = self.networks["point.onnx"](point_feats, record)[0].transpose(0, 2, 1)[channel]
            np.put_along_axis(logits.reshape(len(rois), s * s), chosen, predicted, axis=1)
            record(f"subdivide_{step}", points=points, logits=logits)
        return sigmoid(logits)

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the networks, {file: {name: shape}}: see Network.expect."""
        point = {"point_feats": ("B", "P", "F"), "logits": ("B", "P", len(settings.classes))}
        return {**super().tensors(settings), "point.onnx": point}


def cell_centers(cells, s):
    """Return the centres [..., 2] of cells of an s x s mask, numbered row by row: x and y, 0 to 1 across the box."""
    return (np.stack([cells % s, cells // s], axis=-1).astype(np.float32) + np.float32(0.5)) / np.float32(s)


def inside(rois, points):
    """Return points [r, p, 2], given from 0 to 1 across RoIs [r, 4], in pixels."""
    return rois[:, None, :2] + points * (rois[:, None, 2:] - rois[:, None, :2])


def surrounded(features):
    """Return a level's map [C, h, w] with its channels last, and surrounded by zeros: [h + 2, w + 2, C]."""
    return np.pad(features.transpose(1, 2, 0), [(1, 1), (1, 1), (0, 0)])


def sample(features, points, stride):
    """Return the features [r, p, C] of a map that `surrounded` gave at points [r, p, 2] in pixels.

    Each takes from the four cells around it, the more the nearer; outside the map, cells count as zero.
    """
    height, width, channels = features.shape  # with the zeros
    rows = features.reshape(-1, channels)
    place = np.clip(points / np.float32(stride) + np.float32(0.5), 0, np.float32([width - 1, height - 1]))
    low = np.minimum(place.astype(np.int64), [width - 2, height - 2])
    x, y = np.moveaxis(place - low.astype(np.float32), -1, 0)[..., None]  # of the way to the next cell
    corner = low[..., 1] * width + low[..., 0]
    upper = rows[corner] * (1 - x) + rows[corner + 1] * x
    lower = rows[corner + width] * (1 - x) + rows[corner + width + 1] * x
    return upper * (1 - y) + lower * y


def sample_masks(masks, points):
    """Return the values [r, p, C] of masks [r, C, k, k] at points [r, p, 2], each r's own, 0 to 1 across the mask."""
    r, channels, k, _ = masks.shape
    place = points * np.float32(k) - np.float32(0.5)  # in cells, 0 at the first one's centre
    weights = np.maximum(1 - np.abs(place[..., None] - np.arange(k, dtype=np.float32)), 0)  # [r, p, 2, k]
    weights = weights[:, :, 1, :, None] * weights[:, :, 0, None, :]  # of rows times those of columns
    return weights.reshape(r, points.shape[1], k * k) @ masks.reshape(r, channels, k * k).transpose(0, 2, 1)


def enlarge(masks):
    """Return masks [r, s, s] twice as large, interpolated: U @ mask @ U^T; at the edges, the nearest cell counts."""
    s = masks.shape[-1]
    place = np.clip((np.arange(2 * s, dtype=np.float32) - np.float32(0.5)) / 2, 0, s - 1)
    weights = np.maximum(1 - np.abs(place[:, None] - np.arange(s, dtype=np.float32)), 0)
    return weights @ masks @ weights.T


def most_uncertain(logits, count):
    """Return the cells [r, count] of masks [r, s, s] whose logits are nearest to zero; all, if there are no more."""
    distance = np.abs(logits).reshape(len(logits), logits.shape[1] ** 2)
    count = min(count, distance.shape[1])
    return np.argpartition(distance, count - 1, axis=1)[:, :count]
