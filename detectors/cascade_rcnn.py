"""Cascade R-CNN: Faster R-CNN whose second half runs several times, each time on better boxes.

    proposals -> pool -> head 0 -> refine -> pool -> head 1 -> refine -> pool -> head 2 -> detect

Each head was trained on the boxes that the one before it leaves, with a stricter idea of what a hit is. Boxes are moved
between the stages; the scores of all heads are averaged at the end.
Cascade R-CNN (arXiv 1712.00726), sections 4.1 and 4.2.
"""

import numpy as np

from detectors.faster_rcnn import FasterRCNN, pool, tensors_of_head, tensors_of_rpn
from detectors.settings import CascadeRCNNSettings
from postprocess import decode_boxes, detect


class CascadeRCNN(FasterRCNN):
    """An exported Cascade R-CNN; it differs from Faster R-CNN in what happens to the proposals."""

    Settings = CascadeRCNNSettings

    def find_objects(self, features, proposals, picture, record):
        """Return the Detections among the proposals [r, 4], after moving them from stage to stage."""
        settings, rois, logits = self.settings, proposals, []
        for stage, refinement in enumerate([*settings.refinements, None]):
            roi_feats = pool(features, rois, settings.rois, record, f"align_{stage}")
            cls, reg = self.networks[f"model2_{stage}.onnx"](roi_feats, record)
            logits.append(cls)
            if refinement:
                rois = refine(cls, reg, rois, picture.image_size, refinement)
                record(f"refine_{stage}", rois=rois)
        # The mean of the logits, not of the scores: the softmax follows in detect.
        return detect(sum(logits) / np.float32(len(logits)), reg, rois, picture, settings.head, record)

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the networks, {file: {name: shape}}: see Network.expect."""
        heads = [tensors_of_head(settings, stage.class_agnostic) for stage in [*settings.refinements, settings.head]]
        return {
            "model1.onnx": tensors_of_rpn(settings),
            **{f"model2_{stage}.onnx": head for stage, head in enumerate(heads)},
        }


def refine(cls, reg, rois, image_size, settings):
    """Return RoIs [r, 4], each moved by the deltas of its best class and clipped to image_size (height, width).

    cls [r, classes + 1]: a head's logits, the background last; reg [r, 4 classes], or [r, 4] if class-agnostic: its
    deltas.
    """
    best = 0 if settings.class_agnostic else cls[:, :-1].argmax(axis=1)
    deltas = reg.reshape(len(reg), reg.shape[1] // 4, 4)[np.arange(len(reg)), best]
    return decode_boxes(rois, deltas, settings, image_size)
