"""A detector in one file, as whole.py writes it: what the networks of a folder leave to NumPy is in it, too.

There is nothing to read here; it is for speed. On a GPU only what was found comes back from the device.
"""

import numpy as np

from detectors.mask_rcnn import paste_all
from detectors.networks import ModelError
from detectors.preprocess import preprocess
from postprocess import Detections, ignore

INPUTS = ["image", "image_size", "scale_factor"]
OUTPUTS = ["boxes", "scores", "labels"]


class OneFile:
    """A detector in one file: detector(image) returns its Detections, whose labels are positions in `classes`."""

    def __init__(self, settings, network):
        names = [name for name, _, _ in network.declared]
        masks = ["masks"] if hasattr(settings, "masks") else []
        if names != INPUTS + OUTPUTS + masks:
            raise ModelError(f"{network.path} takes and gives {', '.join(names)}: name the folder of an export, or a "
                             "file that whole.py wrote without --from-picture and --end-to-end-fixed")  # fmt: skip
        self.settings, self.classes, self.network = settings, settings.classes, network

    def __call__(self, image, record=ignore):
        """Return the Detections in an image [h, w, 3] uint8, BGR; `record` as in faster_rcnn.py."""
        return self.detect_in(preprocess(image, self.settings.preprocess), record)

    def detect_in(self, picture, record=ignore):
        """Return the Detections in what preprocess returned."""
        record("preprocess", **picture._asdict())
        inputs = (picture.blob, np.float32(picture.image_size), picture.scale_factor)
        found = Detections(*self.network.compute(dict(zip(INPUTS, inputs))))
        record("detector", **{name: array for name, array in found._asdict().items() if array is not None})
        if found.masks is None:
            return found
        masks = paste_all(found.masks, found.boxes, picture, self.settings.masks)
        record("paste", boxes=found.boxes, scores=found.masks, masks=masks)
        return found._replace(masks=masks)
