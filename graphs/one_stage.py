"""One-stage detectors as a graph; compare detectors/one_stage.py.

A family adds its `decode(graph, level, levels, priors)`, which returns the boxes [n, 4] of some priors of a level.
"""

import numpy as np

from detectors.one_stage import MARGIN, Candidates, logit
from graphs.postprocess import batched_nms, constant, nonzero, rescale, rows_where, sigmoid, size_of, top_k
from postprocess import Detections


def find_candidates(graph, decode, choose=None):
    """Return the Candidates of all levels."""
    op, family, head = graph.op, graph.family, graph.settings.head
    maps = graph.networks["model.onnx"](graph.picture.blob, graph.record)
    priors, kinds = family.priors(graph.settings), family.kinds(graph.settings)
    levels = [dict(zip(kinds, maps[level :: len(priors)])) for level in range(len(priors))]
    found = []
    for level, a in enumerate(priors):
        factor = levels[level].get(head.factor)
        prior, label, score = (choose or best_candidates)(op, levels[level]["cls"], factor, a, head)
        boxes = decode(graph, level, levels, prior)
        found.append(Candidates(boxes, score, label, prior, op.Expand(level, op.Shape(prior))))
    return Candidates(*(op.Concat(*parts, axis=0) for parts in zip(*found)))


def one_stage(graph, decode):
    """Return the Detections in the graph's picture."""
    return suppress(graph, find_candidates(graph, decode))


def scored_candidates(op, logits, factor, a, settings):
    """Return the prior, the class, the score and the product [n] of a level's candidates above the threshold.

    logits [1, a * classes, h, w]; factor [1, a, h, w], or None. The product is the score times its factor, or the root.
    """
    classes = logits.shape[1] // a
    logits = op.Reshape(logits, [a, classes, -1])  # [a, classes, cells]
    if settings.softmax:
        scores = op.Slice(op.Softmax(logits, axis=1), [0], [classes - 1], [1])
        (which, label, cell), places = nonzero(op, op.Greater(scores, settings.score_threshold), 3)
        scores = op.GatherND(scores, places)
    else:
        lowest = max(settings.score_threshold, 0) ** (2 if settings.combined == "root" else 1)
        likely = op.Greater(logits, logit(lowest - MARGIN))
        if settings.one_class:
            best = op.ArgMax(logits, axis=1, keepdims=1)
            likely = op.And(likely, op.Equal(best, constant(op, np.arange(classes)[:, None])))
        (which, label, cell), places = nonzero(op, likely, 3)
        scores = sigmoid(op, op.GatherND(logits, places))
    products, good = scores, None
    if factor is not None:
        factors = sigmoid(op, op.GatherND(op.Reshape(factor, [a, -1]), op.Gather(places, [0, 2], axis=1)))
        products = op.Sqrt(scores * factors) if settings.combined == "root" else scores * factors
        good = op.Greater(factors, settings.factor_threshold)
    ranked = scores if settings.combined == "last" else products
    above = op.Greater(ranked, settings.score_threshold)
    above = above if good is None else op.And(above, good)
    return rows_where(op, above, cell * a + which, label, ranked, products)


def best_candidates(op, logits, factor, a, settings):
    """Return the prior, the class and the score [n] of a level's best candidates, best first."""
    prior, label, ranked, products = scored_candidates(op, logits, factor, a, settings)
    best = top_k(op, ranked, settings.nms_pre if settings.nms_pre > 0 else size_of(op, ranked))
    return [op.Gather(values, best) for values in (prior, label, products)]


def sizes_of(op, levels):
    """Return the (height, width) of the maps of each level."""
    return [op.Shape(maps["cls"], start=2) for maps in levels]


def values_of(op, values, a, priors):
    """Return what a map [1, a * v, h, w] holds for some of the priors [n], of which a cell has a: [n, v]."""
    v = values.shape[1] // a
    rows = op.Transpose(op.Reshape(values, [a, v, -1]), perm=[2, 0, 1])  # [cells, a, v]
    return op.Gather(op.Reshape(rows, [-1, v]), priors)


def best_of_each_class(op, candidates, num_classes, count):
    """Return the indices of the best Candidates of each class, no more than `count` of one."""
    chosen = []
    for label in range(num_classes):
        (members,), _ = nonzero(op, op.Equal(candidates.labels, label), 1)
        chosen.append(op.Gather(members, top_k(op, op.Gather(candidates.scores, members), count)))
    return op.Concat(*chosen, axis=0)


def suppress(graph, candidates):
    """Turn the Candidates of all levels into Detections, best first, no more than head.max_per_img."""
    op, settings, num_classes = graph.op, graph.settings.head, len(graph.settings.classes)
    if settings.nms_pre_per_class is not None:
        chosen = best_of_each_class(op, candidates, num_classes, settings.nms_pre_per_class)
        candidates = Candidates(*(op.Gather(field, chosen) for field in candidates))
    resized, scores, labels, priors, levels = candidates
    boxes = rescale(op, resized, graph.picture, settings)
    kept = batched_nms(op, resized if settings.nms_resized else boxes, scores, labels, num_classes, settings)
    graph.record("detect", candidates=boxes, resized=resized, scores=scores, labels=labels, priors=priors,
                 levels=levels, kept=kept)  # fmt: skip
    return Detections(op.Gather(boxes, kept), op.Gather(scores, kept), op.Gather(labels, kept))
