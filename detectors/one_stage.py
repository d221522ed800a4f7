"""One-stage detectors: a single network, which answers for every cell of its maps.

    maps -> best_candidates and the family's decode, level by level -> suppress

Faster R-CNN asks twice: where something is, then what it is. A one-stage detector asks both at once, in the places
where the RPN asks, and NMS is all that follows. What a cell predicts from is its *prior*: an anchor, or a point. The
families differ in their priors and in `decode`, which makes boxes of them.
"""

from typing import NamedTuple

import numpy as np

from detectors.one_network import OneNetwork
from postprocess import Detections, batched_nms, ignore, rescale, sigmoid, softmax, top_k

MARGIN = 1e-6  # of scores: so near the threshold, rounding may decide, and scores are compared


class Candidates(NamedTuple):
    """What may be detected."""

    boxes: np.ndarray  # [n, 4] float32, in pixels of the resized picture
    scores: np.ndarray  # [n] float32
    labels: np.ndarray  # [n] int64
    priors: np.ndarray  # [n] int64, counted by row, column and prior of the cell
    levels: np.ndarray  # [n] int64


class OneStage(OneNetwork):
    """What the families with priors share; each adds its Settings, `decode`, and how many priors a cell has."""

    def find(self, maps, picture, record=ignore):
        """Return the Detections in what the network says of a picture: maps, kind by kind and level by level."""
        priors, kinds = self.priors(self.settings), self.kinds(self.settings)
        levels = [dict(zip(kinds, maps[level :: len(priors)])) for level in range(len(priors))]
        found = []
        for level, a in enumerate(priors):
            factor = levels[level].get(self.settings.head.factor)
            prior, label, score = self.choose(levels[level]["cls"], factor, a)
            boxes = self.decode(level, levels, prior, picture.image_size)
            found.append(Candidates(boxes, score, label, prior, np.full(len(prior), level)))
        return self.decide(Candidates(*map(np.concatenate, zip(*found))), picture, record)

    def choose(self, logits, factor, a):
        """Return the prior, the class and the score [n] of a level's candidates: see best_candidates."""
        return best_candidates(logits, factor, a, self.settings.head)

    def decide(self, candidates, picture, record=ignore):
        """Return the Detections among the Candidates of all levels."""
        return suppress(candidates, picture, self.settings.head, record)

    @classmethod
    def tensors(cls, settings):
        """Return the tensors of the network, {file: {name: shape}}: see Network.expect."""
        maps = {
            f"{kind}_{i}": ("N", a * channels, f"h_{i}", f"w_{i}")
            for kind, channels in cls.kinds(settings).items()
            for i, a in enumerate(cls.priors(settings))
        }
        return {"model.onnx": {"image": ("N", 3, "H", "W"), **maps}}

    @staticmethod
    def kinds(settings):
        """Return the kinds of maps, and how many channels they have for each prior of a cell."""
        factor = {settings.head.factor: 1} if settings.head.factor else {}
        return {"cls": len(settings.classes) + settings.head.softmax, "reg": 4, **factor}


def best_candidates(logits, factor, a, settings):
    """Return the prior, the class and the score [n] of a level's best candidates, best first.

    logits [a * classes, h, w], of a priors in each cell; with a softmax, the background is one class more, the last.
    factor: the logits [a, h, w] of what all scores of a prior are multiplied by, or None. A candidate is a class of a
    prior with a score above settings.score_threshold. Priors are counted by row, column, prior of the cell.
    RetinaNet (1708.02002), section 4.1.
    """
    logits = logits.reshape(a, len(logits) // a, -1)  # [a, classes, cells]
    if settings.softmax:
        scores = softmax(logits.transpose(2, 0, 1))[..., :-1].transpose(1, 2, 0)
        which, label, cell = np.nonzero(scores > settings.score_threshold)
        scores = scores[which, label, cell]
    else:
        # Of a million logits few are above the threshold's; only they need an exponential. A factor is 1 at most.
        lowest = max(settings.score_threshold, 0) ** (2 if settings.combined == "root" else 1)
        likely = logits > logit(lowest - MARGIN)
        if settings.one_class:
            likely &= np.arange(logits.shape[1])[:, None] == logits.argmax(axis=1)[:, None]
        which, label, cell = np.nonzero(likely)
        scores = sigmoid(logits[which, label, cell])
    factors = np.ones_like(scores) if factor is None else sigmoid(factor.reshape(a, -1)[which, cell])
    products = np.sqrt(scores * factors) if settings.combined == "root" else scores * factors
    ranked = scores if settings.combined == "last" else products
    above = np.flatnonzero((ranked > settings.score_threshold) & (factors > settings.factor_threshold))
    best = above[top_k(ranked[above], settings.nms_pre if settings.nms_pre > 0 else len(above))]
    return (cell * a + which)[best], label[best], products[best]


def logit(score):
    """Return the number whose sigmoid is a score; -inf for 0 and less, inf for 1 and more."""
    score = np.clip(score, 0, 1)
    with np.errstate(divide="ignore"):
        return float(np.log(score) - np.log1p(-score))  # a NumPy float64 would make float64 of what it is compared with


def sizes_of(levels):
    """Return the (height, width) of the maps of each level."""
    return [maps["cls"].shape[1:] for maps in levels]


def values_of(values, a, priors):
    """Return what a map [a * v, h, w] holds for some of the priors [n], of which a cell has a: [n, v]."""
    cell, which = np.divmod(priors, a)
    return values.reshape(a, len(values) // a, -1)[which, :, cell]


def best_of_each_class(candidates, count):
    """Return the indices of the best Candidates of each class, no more than `count` of one."""
    chosen = [np.zeros(0, np.int64)]
    for label in np.unique(candidates.labels):
        members = np.flatnonzero(candidates.labels == label)
        chosen.append(members[top_k(candidates.scores[members], count)])
    return np.concatenate(chosen)


def suppress(candidates, picture, settings, record=ignore):
    """Turn the Candidates of all levels into Detections, best first, no more than settings.max_per_img.

    Their boxes are rescaled to pixels of the picture as it came in; then NMS decides class by class.
    """
    if settings.nms_pre_per_class is not None:
        chosen = best_of_each_class(candidates, settings.nms_pre_per_class)
        candidates = Candidates(*(field[chosen] for field in candidates))
    resized, scores, labels, priors, levels = candidates
    boxes = rescale(resized, picture, settings)
    kept, new_scores = batched_nms(resized if settings.nms_resized else boxes, scores, labels, settings)
    record("detect", candidates=boxes, resized=resized, scores=scores, labels=labels, priors=priors, levels=levels,
           kept=kept)  # fmt: skip
    kept, new_scores = kept[: settings.max_per_img], new_scores[: settings.max_per_img]
    return Detections(boxes[kept], new_scores, labels[kept])
