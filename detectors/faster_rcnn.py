"""Faster R-CNN from a picture to detections: read it from top to bottom; what it calls is in postprocess.py."""

from detectors.preprocess import preprocess
from detectors.settings import FasterRCNNSettings
from postprocess import align_levels, assign_levels, detect, ignore, propose


class FasterRCNN:
    """An exported Faster R-CNN: detector(image) returns its Detections, whose labels are positions in `classes`."""

    Settings = FasterRCNNSettings

    def __init__(self, settings, networks):
        self.settings, self.classes = settings, settings.classes
        self.networks = networks
        self.model1, self.model2 = networks["model1.onnx"], networks["model2.onnx"]

    def __call__(self, image, record=ignore):
        """Return the Detections in an image [h, w, 3] uint8, BGR as cv2.imread returns it.

        `record`, if given, is called after each stage with the stage's name and arrays: record("align", levels=...).
        """
        return self.detect_in(preprocess(image, self.settings.preprocess), record)

    def detect_in(self, picture, record=ignore):
        """Return the Detections in what preprocess returned; another thread may prepare the next picture meanwhile."""
        settings = self.settings
        record("preprocess", **picture._asdict())

        # Where could something be? Scores and deltas for the anchors of every level, and the features.
        maps = [tensor[0] for tensor in self.model1(picture.blob, record)]
        n = len(maps) // 3
        cls, reg, features = maps[:n], maps[n : 2 * n], maps[2 * n :]
        proposals = propose(cls, reg, picture.image_size, settings.proposals, record)

        # Each proposal's features, cut out of the level that fits its size.
        levels = assign_levels(proposals, len(settings.rois.strides), settings.rois.finest_scale)
        roi_feats = align_levels(features, proposals, levels, settings.rois)
        record("align", levels=levels, roi_feats=roi_feats)

        # What is it, and where exactly? A score for every class, and deltas for every class.
        cls, reg = self.model2(roi_feats, record)
        return detect(cls, reg, proposals, picture, settings.head, record)

    @staticmethod
    def tensors(settings):
        """Return the tensors of the two networks, {file: {name: shape}}: see Network.expect."""
        anchors, classes = settings.proposals.anchors, len(settings.classes)
        levels, a = range(len(anchors.strides)), len(anchors.scales) * len(anchors.ratios)
        channels = {"cls": 2 * a if settings.proposals.softmax else a, "reg": 4 * a, "feat": "C"}
        maps = {f"{kind}_{i}": ("N", c, f"h_{i}", f"w_{i}") for kind, c in channels.items() for i in levels}
        roi_feats = ("B", "C", settings.rois.output_size, settings.rois.output_size)
        deltas = 4 if settings.head.class_agnostic else 4 * classes
        return {
            "model1.onnx": {"image": ("N", 3, "H", "W"), **maps},
            "model2.onnx": {"roi_feats": roi_feats, "cls": ("B", classes + 1), "reg": ("B", deltas)},
        }
