"""PAA (2007.08103): ATSS with a predicted IoU instead of centerness, and boxes that are voted on after NMS."""

import numpy as np

from detectors.one_stage import best_candidates
from detectors.retina_net import RetinaNet
from detectors.settings import PAASettings, changed
from postprocess import ignore, pairwise_iou, rescale

VOTES_FROM = 0.01  # candidates vote on the box of a detection if their IoU with it is above this
DECLINE = np.float32(0.025)  # how fast votes lose weight with 1 - IoU


class PAA(RetinaNet):
    """An exported PAA, see OneStage."""

    Settings = PAASettings

    def choose(self, logits, factor, a):
        """Return the prior, the class and the score [n] of a level's candidates: all classes of its best priors."""
        limit = self.settings.head.nms_pre if self.settings.head.nms_pre > 0 else None
        everything = changed(self.settings.head, "nms_pre", -1)
        prior, label, score = best_candidates(logits, factor, a, everything)
        first = np.sort(np.unique(prior, return_index=True)[1])  # of each prior, where its best class stands
        chosen = np.isin(prior, prior[first[:limit]])
        return prior[chosen], label[chosen], score[chosen]

    def decide(self, candidates, picture, record=ignore):
        """Return the Detections among the Candidates of all levels, whose boxes are those that candidates agree on."""
        found = super().decide(candidates, picture, record)
        boxes = rescale(candidates.boxes, picture, self.settings.head)
        found = vote(found, boxes, candidates.scores, candidates.labels)
        record("vote", boxes=found.boxes)
        return found


def vote(found, boxes, scores, labels):
    """Return Detections with other boxes: weighted means of those of all candidates of the same class.

    boxes [n, 4], scores [n] and labels [n] are of the candidates before NMS. The weight of a candidate is its score
    times exp(-(1 - IoU)^2 / 0.025). A box without area overlaps nothing and stays as it is. PAA, section 3.4.
    """
    voted = found.boxes.copy()
    for label in np.unique(found.labels):
        here, voters = np.flatnonzero(found.labels == label), np.flatnonzero(labels == label)
        overlaps = pairwise_iou(found.boxes[here], boxes[voters])
        weights = np.where(overlaps > VOTES_FROM, np.exp(-((1 - overlaps) ** 2) / DECLINE) * scores[voters], 0)
        total = weights.sum(axis=1, keepdims=True)
        voted[here] = np.divide(weights @ boxes[voters], total, out=voted[here], where=total > 0)
    return found._replace(boxes=voted)
