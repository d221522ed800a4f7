"""Faster R-CNN from a picture to detections: read it from top to bottom; what it calls is in postprocess.py."""

from detectors.preprocess import preprocess
from detectors.settings import FasterRCNNSettings
from postprocess import align_levels, assign_levels, detect, ignore, propose


class FasterRCNN:
    """An exported Faster R-CNN: detector(image) returns its Detections, whose labels are positions in `classes`."""

    Settings = FasterRCNNSettings

    def __init__(self, settings, networks):
        self.settings, self.classes, self.networks = settings, settings.classes, networks

    def __call__(self, image, record=ignore):
        """Return the Detections in an image [h, w, 3] uint8, BGR as cv2.imread returns it.

        `record`, if given, is called after each stage with the stage's name and arrays: record("align", levels=...).
        """
        return self.detect_in(preprocess(image, self.settings.preprocess), record)

    def detect_in(self, picture, record=ignore):
        """Return the Detections in what preprocess returned; another thread may prepare the next picture meanwhile."""
        record("preprocess", **picture._asdict())
        features, proposals = self.find_proposals(picture, record)
        return self.find_objects(features, proposals, picture, record)

    def find_proposals(self, picture, record):
        """Return the features of every level, and the proposals [r, 4]."""
        # Where could something be? Scores and deltas for the anchors of every level.
        maps = [tensor[0] for tensor in self.networks["model1.onnx"](picture.blob, record)]  # of the only picture
        n = len(maps) // 3
        cls, reg, features = maps[:n], maps[n : 2 * n], maps[2 * n :]
        return features, propose(cls, reg, picture.image_size, self.settings.proposals, record)

    def find_objects(self, features, proposals, picture, record):
        """Return the Detections among the proposals [r, 4]."""
        # What is it, and where exactly? A score for every class, and deltas for every class.
        roi_feats = pool(features, proposals, self.settings.rois, record)
        cls, reg = self.networks["model2.onnx"](roi_feats, record)
        return detect(cls, reg, proposals, picture, self.settings.head, record)

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the networks, {file: {name: shape}}: see Network.expect."""
        head = tensors_of_head(settings, settings.head.class_agnostic)
        return {"model1.onnx": tensors_of_rpn(settings), "model2.onnx": head}


def pool(features, rois, settings, record, stage="align"):
    """Return the features [r, C, s, s] of RoIs [r, 4], each cut out of the level that fits its size."""
    levels = assign_levels(rois, len(settings.strides), settings.finest_scale)
    roi_feats = align_levels(features, rois, levels, settings)
    record(stage, levels=levels, roi_feats=roi_feats)
    return roi_feats


def tensors_of_rpn(settings):
    """Return the tensors of the first network."""
    anchors = settings.proposals.anchors
    levels, a = range(len(anchors.strides)), len(anchors.scales) * len(anchors.ratios)
    channels = {"cls": 2 * a if settings.proposals.softmax else a, "reg": 4 * a, "feat": "C"}
    maps = {f"{kind}_{i}": ("N", c, f"h_{i}", f"w_{i}") for kind, c in channels.items() for i in levels}
    return {"image": ("N", 3, "H", "W"), **maps}


def tensors_of_head(settings, class_agnostic):
    """Return the tensors of a network that gives scores and deltas."""
    classes, s = len(settings.classes), settings.rois.output_size
    deltas = 4 if class_agnostic else 4 * classes
    return {"roi_feats": ("B", "C", s, s), "cls": ("B", classes + 1), "reg": ("B", deltas)}
