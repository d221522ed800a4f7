"""PAA as a graph; compare detectors/paa.py."""

import numpy as np

from detectors.paa import DECLINE, VOTES_FROM
from graphs.one_stage import find_candidates, scored_candidates, suppress
from graphs.postprocess import constant, pairwise_iou, rescale, rows_where, size_of, top_k
from graphs.retina_net import decode


def paa(graph):
    """Return the Detections in the graph's picture, whose boxes are those that candidates agree on."""
    candidates = find_candidates(graph, decode, choose)
    found = suppress(graph, candidates)
    boxes = rescale(graph.op, candidates.boxes, graph.picture, graph.settings.head)
    found = vote(graph.op, found, boxes, candidates.scores, candidates.labels)
    graph.record("vote", boxes=found.boxes)
    return found


def choose(op, logits, factor, a, settings):
    """Return the prior, the class and the score [n] of a level's candidates: all classes of its best priors."""
    prior, label, ranked, products = scored_candidates(op, logits, factor, a, settings)
    best = top_k(op, ranked, size_of(op, ranked))
    prior, label, products = (op.Gather(values, best) for values in (prior, label, products))
    if settings.nms_pre <= 0:
        return prior, label, products
    # A prior's place among all priors is how many of them come before its own best candidate.
    count = size_of(op, prior)
    place = op.Range(0, op.Squeeze(count), 1)
    everywhere = op.Expand(count, op.Size(logits) / (logits.shape[1] // a) + constant(op, np.array([0])))
    first = op.Gather(op.ScatterElements(everywhere, prior, place, reduction="min"), prior)
    priors_so_far = op.CumSum(op.Cast(op.Equal(first, place), to=first.dtype), 0)
    chosen = op.LessOrEqual(op.Gather(priors_so_far, first), settings.nms_pre)
    return rows_where(op, chosen, prior, label, products)


def vote(op, found, boxes, scores, labels):
    """Return Detections with other boxes: weighted means of those of all candidates of the same class."""
    overlaps = pairwise_iou(op, found.boxes, boxes)  # [d, n]
    votes = op.And(op.Greater(overlaps, VOTES_FROM), op.Equal(op.Unsqueeze(found.labels, [1]), labels))
    distance = 1.0 - overlaps
    weights = op.Where(votes, op.Exp(-(distance * distance) / float(DECLINE)) * scores, 0.0)
    total = op.ReduceSum(weights, [1], keepdims=1)
    return found._replace(boxes=op.Where(op.Greater(total, 0.0), op.MatMul(weights, boxes) / total, found.boxes))
