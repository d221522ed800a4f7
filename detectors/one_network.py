"""Detectors with a single network, which sees the picture once and says everything."""

from detectors.preprocess import preprocess
from postprocess import ignore


class OneNetwork:
    """What they share; each adds its Settings, its `tensors`, and `find`."""

    def __init__(self, settings, networks):
        self.settings, self.classes, self.networks = settings, settings.classes, networks

    def __call__(self, image, record=ignore):
        """Return the Detections in an image [h, w, 3] uint8, BGR; `record` as in faster_rcnn.py."""
        return self.detect_in(preprocess(image, self.settings.preprocess), record)

    def detect_in(self, picture, record=ignore):
        """Return the Detections in what preprocess returned."""
        record("preprocess", **picture._asdict())
        outputs = [tensor[0] for tensor in self.networks["model.onnx"](picture.blob, record)]
        return self.find(outputs, picture, record)
