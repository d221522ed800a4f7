"""Draw a detector at work on your picture: nine PNGs, from the arrays that the detector itself computes.

python explain.py PICTURE      into the folder output/: 1_input.png to 9_result.png, and index.html with all of them

A cascade adds a page, and so do masks and PointRend's points. One-stage detectors have six, CenterNet four, DETR three.

Exit status: 0 all well, 2 nothing could be done, 130 interrupted.
"""

import argparse
import base64
import html
import io
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))  # read when cv2 is imported; 1.6 GB as float32
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what goes wrong is raised, and reported by us

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from detectors import ModelError, default_folder, load_folder, one_line, rle  # noqa: E402
from explain_one_stage import (  # noqa: E402
    draw_candidates,
    draw_heat,
    draw_peaks,
    draw_priors,
    draw_queries,
    draw_scores,
    maps_of_one_stage,
)
from explain_relatives import draw_cascade, draw_masks, draw_points  # noqa: E402
from figures import (  # noqa: E402
    DPI,
    PALETTE,
    WIDTH,
    Page,
    draw_bars,
    draw_before_and_after,
    draw_boxes,
    draw_maps,
    draw_some_anchors,
    draw_zoom,
    empty_page,
    level_names,
    level_panels,
    listed,
    mpl,
    new_figure,
    nothing,
    numbered,
    panel_height,
    show,
)
from pictures import draw, drawable_names, is_annotated, printable, read_picture, run_program, write_file  # noqa: E402
from postprocess import (  # noqa: E402
    NMS_SPLIT,
    interpolation_matrices,
    level_anchors,
    moved_apart,
    objectness,
    pairwise_iou,
    sample_points,
    softmax,
    to_cells,
)
from videos import SIGN  # noqa: E402

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
except ImportError:
    FigureCanvasAgg = None

SHOWN_SCORE = 0.3


class Pipeline:
    """A detector, a picture and the arrays of every stage: self.propose["candidates"] and so on.

    What a cascade does several times is in lists: `aligned`, `heads` and the `rois` that each head sees, one entry for
    each head; `mask_heads`, empty where there are no masks. RoI number i of every head comes from proposal number i.
    Of a one-stage detector there are only `strides`, `anchors` and `scores`, a map for each level. `decided_by` names
    the function that returned the detections.
    """

    def __init__(self, detector, image):
        self.detector, self.image, self.settings = detector, image, detector.settings
        self.detections = detector(image, self.record)
        self.returned = self.detect["kept"][: len(self.detections.boxes)]  # the candidates that became detections
        sure = self.detections.scores >= SHOWN_SCORE
        self.shown = np.flatnonzero(sure if sure.any() else ~sure)  # the detections that pages choose from

        names = drawable_names(detector.classes)
        self.classes = [name.replace("$", r"\$") for name in names]  # between two, matplotlib reads TeX

        settings = self.settings.preprocess
        pixels = self.preprocess["blob"][0].transpose(1, 2, 0) * np.float32(settings.std) + np.float32(settings.mean)
        self.seen = np.clip(pixels, 0, 255).round().astype(np.uint8)[..., :: 1 if settings.to_rgb else -1]
        height, width = self.preprocess["image_size"]
        left, top = self.preprocess["offset"]
        self.resized = self.seen[top : top + height, left : left + width]
        self.decided_by = "postprocess.detect"
        if hasattr(self, "propose"):
            self.follow_two_stages()
        elif hasattr(detector, "priors"):
            self.strides, self.anchors, self.scores = maps_of_one_stage(self)
            self.decided_by = "detectors.one_stage.suppress"
        else:
            self.decided_by = f"detectors.{'center_net.best_peaks' if 'heatmap' in self.model else 'detr.answers'}"

    def follow_two_stages(self):
        """Find what is drawn of a two-stage detector."""
        self.aligned, self.heads, self.mask_heads = map(self.stages, ("align", "model2", "mask"))
        self.rois = [self.propose["proposals"], *(stage["rois"] for stage in self.stages("refine"))]
        self.logits = sum(head["cls"] for head in self.heads) / np.float32(len(self.heads))  # what detect got
        self.strides = self.settings.proposals.anchors.strides
        self.cls, self.reg, self.features = (
            [self.model1[f"{kind}_{level}"][0] for level in range(len(self.strides))] for kind in ("cls", "reg", "feat")
        )

        sizes, self.anchors = [logits.shape[1:] for logits in self.cls], []  # of every level, [h, w, a, 4]
        for level, (height, width) in enumerate(sizes):
            anchors = level_anchors(level, sizes, self.settings.proposals.anchors)
            self.anchors.append(anchors.reshape(height, width, -1, 4))

    def record(self, stage, **arrays):
        """Keep the arrays of a stage under its name."""
        setattr(self, stage, arrays)

    def stages(self, name):
        """Return what was recorded under a name, or by a cascade under name_0, name_1 and so on."""
        return [arrays for stage, arrays in vars(self).items() if re.fullmatch(rf"{name}(_\d+)?", stage)]

    def moving_most(self, boxes, count):
        """Return the candidates that became confident detections, those first that moved most from their RoI's box.

        boxes [r, 4]: the RoIs, or what they were before.
        """
        chosen = self.returned[self.shown]
        before, after = boxes[self.detect["rois"][chosen]], self.detect["resized"][chosen]
        return chosen[np.argsort(pairwise_iou(before, after).diagonal(), kind="stable")][:count]


# ---------------------------------------------------------------------- the nine pictures


def draw_input(p):
    """Draw the picture as the first network sees it."""
    (left, top), (height, width) = p.preprocess["offset"], p.resized.shape[:2]
    padded_height, padded_width = p.seen.shape[:2]
    original_height, original_width = p.image.shape[:2]
    settings = p.settings.preprocess
    resized = "" if settings.scale is None else f"resized to {width} x {height}, "
    caption = f"Input: {original_width} x {original_height} pixels, {resized}padded to {padded_width} x {padded_height}"
    figure = new_figure(panel_height(p.seen, 1.1) + 0.3)
    axis = figure.subplots()
    show(axis, p.seen)
    right, bottom = left + width, top + height
    for x, y, w, h in ((right, 0, padded_width - right, padded_height), (0, bottom, right, padded_height - bottom),
                       (0, 0, left, bottom), (left, 0, width, top)):  # fmt: skip
        if w and h:
            axis.add_patch(
                mpl.patches.Rectangle((x - 0.5, y - 0.5), w, h, fill=False, hatch="////", lw=0, color="white")
            )
    axis.set_xticks([left, right], ["0", f"{width}"])
    axis.set_yticks([top, bottom], ["0", f"{height}"])
    filler = "black" if settings.canvas else name_of_padding(settings)
    until = "up to a square" if settings.pad_to_square else f"up to multiples of {divisor_of(settings)}"
    hatched = f"; hatched: {filler}, {until}" if p.seen.shape != p.resized.shape else ""
    axis.set_xlabel("shown before normalisation" + hatched)
    which = "first network" if hasattr(p, "propose") else "network"
    return Page("input", caption, tell_input(settings, width, height, which), "detectors.preprocess.preprocess", figure)


def name_of_padding(settings):
    """Return what pictures are padded with, as a text."""
    return "zeros" if settings.pad_value == 0 else f"pixels of {settings.pad_value:g}"


def divisor_of(settings):
    """Return the number of which the sides of what the network sees are multiples."""
    return settings.canvas + 1 if settings.canvas else settings.pad_divisor


def tell_input(settings, width, height, which):
    """Return the text about the picture as a network sees it, which is resized to width and height."""
    normalised = "it is not normalised"
    if any(settings.mean) or set(settings.std) != {1}:
        normalised = (
            f"it is normalised: from each channel its mean is subtracted ({listed(settings.mean)}), and the rest is "
            f"divided by its standard deviation ({listed(settings.std)})"
        )
    divisor = divisor_of(settings)
    sides = f"make both sides multiples of {divisor}, because the {which} halves the picture again and again."
    if settings.canvas:
        return f"The picture keeps its size. It is put in the middle of black pixels, which {sides} Then {normalised}."
    resized = f"is resized to {width} x {height} pixels, whatever its shape"
    if settings.scale is None:
        resized = "keeps its size"
    elif settings.keep_ratio:
        long_side, short_side = max(settings.scale), min(settings.scale)
        resized = (
            f"is resized until its long side is {long_side} pixels or its short side {short_side}, whichever comes "
        )
        resized += "first"
    order = "Before that" if settings.normalize_first else "Then"
    text = f"The picture {resized}. {order} {normalised}. "
    filler = name_of_padding(settings)
    if settings.pad_to_square:
        return text + (
            f"On the right or at the bottom, {filler} make it a square, which is what the {which} was trained on."
        )
    return text + (f"{filler.capitalize()} on the right and at the bottom {sides}" if divisor > 1 else "")


def draw_anchors(p):
    """Draw the anchors of three cells of each level, to scale."""
    levels, settings = len(p.strides), p.settings.proposals.anchors
    counts = [anchors[..., 0].size for anchors in p.anchors]
    number = p.anchors[0].shape[2]
    caption = f"Anchors: {sum(counts):,} boxes of fixed sizes, {number} at every cell of every level"
    figure, axes = level_panels(p, fade=0.55)
    for level, axis in enumerate(axes):
        map_height, map_width = p.anchors[level].shape[:2]
        axis.set_title(f"level {level}, stride {p.strides[level]}: {map_width} x {map_height} cells", fontsize=11)
        draw_some_anchors(axis, p, level)
    text = (
        "The search starts from anchors: boxes that are the same for every picture of this size. Their height is "
        f"{listed(settings.ratios)} times their width, and the side of a square one is {listed(settings.scales)} times "
        f"the base size of its level. That makes {listed(counts)} on {level_names(levels)}. Each panel shows the "
        "anchors of three cells, with a cross in their centre. Coarse levels have few anchors, and large ones."
    )
    functions = "postprocess.level_anchors, postprocess.base_anchors, postprocess.grid_anchors"
    return Page("anchors", caption, text, functions, figure)


def draw_objectness(p):
    """Draw the RPN's scores of each level over the picture."""
    softmax_of_two, maps = p.settings.proposals.softmax, []
    for logits, anchors in zip(p.cls, p.anchors):
        maps.append(objectness(logits, softmax_of_two).reshape(anchors.shape[:3]).max(axis=2))
    best = max(scores.max() for scores in maps)
    caption = f"Objectness: how sure the RPN is that there is an object at a cell (best {best:.2f})"
    figure = draw_maps(p, maps, "objectness")
    logit, function = ("a pair of logits", "softmax") if softmax_of_two else ("a logit", "sigmoid")
    text = (
        f"For every anchor the first network predicts {logit}, which a {function} turns into its objectness: how "
        "likely it is to hold an object, of whatever class. A cell has the colour of its best anchor's objectness and "
        "is drawn around their centre. Small objects light up on the fine levels, large ones on the coarse levels."
    )
    return Page("objectness", caption, text, "model1.onnx, postprocess.objectness", figure)


def draw_proposals(p, shown=60):
    """Draw the best decoded anchors, what NMS keeps of them, and what goes on."""
    stage = p.propose
    before, kept, after = (len(stage[name]) for name in ("candidates", "kept", "proposals"))
    caption = f"Proposals: {before:,} decoded anchors, {kept:,} kept by NMS, {after:,} go on"
    figure = draw_before_and_after(p.resized, stage["candidates"], stage, after, shown)
    functions = (
        "postprocess.propose, postprocess.top_k, postprocess.decode_boxes, postprocess.batched_nms, postprocess.nms"
    )
    return Page("proposals", caption, tell_proposals(p, shown), functions, figure)


def tell_proposals(p, shown):
    """Return the text about the proposals."""
    stage, settings = p.propose, p.settings.proposals
    decoded = [anchors[..., 0].size for anchors in p.anchors]
    if settings.nms_pre > 0:
        decoded = [min(count, settings.nms_pre) for count in decoded]
    dropped, kept = sum(decoded) - len(stage["candidates"]), len(stage["kept"])
    which = f"best {settings.nms_pre:,} anchors" if settings.nms_pre > 0 else "anchors"
    text = (
        f"The {which} of each level are moved and scaled by the deltas that the first network predicts for them: "
        f"{listed(decoded)} boxes on {level_names(len(decoded))}. "
    )
    if dropped:
        text += f"{dropped:,} of them are dropped, because a side is no longer than {settings.min_bbox_size:g} pixels"
        text += f" or the score not above {settings.score_threshold:g}. " if settings.score_threshold > 0 else ". "
    return text + (
        "They crowd around the objects. NMS goes through the boxes of each level from the best to the worst, and "
        f"removes a box if its IoU with a better one that stays is above {settings.iou_threshold:g}: it removes "
        f"{len(stage['candidates']) - kept:,} and keeps {kept:,}. No more than {settings.max_per_img:,} may go on, "
        f"the best of all levels: here {len(stage['proposals']):,}. Drawn are the best {shown} boxes of each level, "
        "and what NMS keeps of them."
    )


def draw_pyramid(p, shown=40):
    """Draw the level of the pyramid that each proposal is assigned to."""
    proposals, levels, settings = p.propose["proposals"], p.aligned[0]["levels"], p.settings.rois
    num_levels = len(settings.strides)
    counts = np.bincount(levels, minlength=num_levels)
    gets = "the level gets" if num_levels == 1 else "the levels get"
    caption = f"Pyramid: {gets} {listed(counts)} proposals"
    figure = new_figure(max(panel_height(p.resized, 1.8), 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    show(left, p.resized, f"the best {shown} of each level", fade=0.5)
    for level in range(num_levels):
        draw_boxes(left, proposals[levels == level][:shown], PALETTE[level % len(PALETTE)], 1.2)
    draw_sizes(right, p)
    text = (
        "A small box needs fine features, a large one coarse features. Its level is the logarithm (to base 2) of its "
        f"size over {settings.finest_scale:g} pixels, rounded down; the dashed lines are where the level changes."
    )
    if num_levels < len(p.strides):
        finest = "finest gives" if num_levels == 1 else f"{num_levels} finest give"
        text += f" Of the {len(p.strides)} levels, only the {finest} features to the second network."
    if len(p.heads) > 1:
        text += " Each later head of the cascade has boxes of its own, which find their levels in the same way."
    return Page("pyramid", caption, text, "postprocess.assign_levels", figure)


def draw_sizes(axis, p):
    """Draw how many proposals there are of each size, coloured by level, and the sizes where the level changes."""
    proposals, levels, settings = p.propose["proposals"], p.aligned[0]["levels"], p.settings.rois
    scale, num_levels = settings.finest_scale, len(settings.strides)
    sizes = np.sqrt(np.maximum((proposals[:, 2:] - proposals[:, :2]).prod(axis=1), 1))
    thresholds = scale * 2.0 ** np.arange(1, num_levels)
    low, high = np.log2([min([*sizes, 16]), max([*sizes, *thresholds * 1.4])] / np.float64(scale))
    bins = scale * 2 ** (np.arange(np.floor(low * 6), np.ceil(high * 6) + 1) / 6)  # a level is six bins
    colours = [PALETTE[level % len(PALETTE)] for level in range(num_levels)]
    labels = [f"level {level}, stride {stride}" for level, stride in enumerate(settings.strides)]
    axis.hist([sizes[levels == level] for level in range(num_levels)], bins, stacked=True, color=colours, label=labels)
    for threshold in thresholds:
        axis.axvline(threshold, color="black", lw=1, ls="--")
    axis.set_xscale("log")
    axis.set_xticks([16, 32, *thresholds], ["16", "32", *(f"{threshold:g}" for threshold in thresholds)])
    axis.minorticks_off()
    axis.set_xlabel("sqrt(width x height), pixels")
    axis.set_ylabel("proposals")
    axis.legend(fontsize=9, loc="upper right", framealpha=1)
    limits = f"limited to 0 .. {num_levels - 1}" if num_levels > 1 else "limited to 0"
    axis.set_title(rf"level = $\lfloor \log_2 (\sqrt{{w h}}\,/\,{scale:g}) \rfloor$, {limits}", fontsize=11)


class Sampling(NamedTuple):
    """How RoIAlign samples one RoI, each as (x, y)."""

    start: np.ndarray  # of the RoI, in cells of its level
    lengths: np.ndarray
    points: list  # [bins, points of a bin] each
    cells: list  # (first, stop) of the cells that are read
    matrices: list  # [bins, cells] each


def sampling_of(p, which):
    """Return the Sampling of a proposal."""
    settings, level = p.settings.rois, p.aligned[0]["levels"][which]
    height, width = p.features[level].shape[1:]
    start, lengths = to_cells(p.propose["proposals"][[which]], settings.strides[level], settings.aligned)
    sampling = Sampling(start[0], lengths[0], [], [], [])
    for axis, map_length in enumerate((width, height)):
        matrices, first, stop = interpolation_matrices(start[:, axis], lengths[:, axis], map_length, settings)
        sampling.points.append(sample_points(start[:, axis], lengths[:, axis], settings)[0][0])
        sampling.cells.append((first[0], stop[0]))
        sampling.matrices.append(matrices[0, :, : stop[0] - first[0]])
    return sampling


def explained_roi(p):
    """Return the best proposal whose bins have 2 x 2 points, or else the best; None if there is none.

    A proposal that became a detection counts as better than one that did not, and the best detection's as the best.
    """
    best_first = [*p.detect["rois"][p.returned], *range(len(p.propose["proposals"]))]
    for which in best_first:
        if [points.shape[1] for points in sampling_of(p, which).points] == [2, 2]:
            return which
    return best_first[0] if best_first else None


def principal_component(features):
    """Return the first principal component of features [..., C] as a function of features [..., C]."""
    flat = features.reshape(-1, features.shape[-1])
    mean = flat.mean(axis=0)
    direction = np.linalg.svd(flat - mean, full_matrices=False)[2][0]
    direction = direction * np.sign(direction.sum() or 1)
    return lambda values: (values - mean) @ direction


def draw_roi_align(p):
    """Draw RoIAlign of one proposal, from the sample points to the result."""
    functions = ", ".join(
        f"postprocess.{name}" for name in ("to_cells", "sample_points", "interpolation_matrices", "roi_align")
    )
    which = explained_roi(p)
    if which is None:
        return empty_page(p.resized, "roi_align", "RoIAlign: there is no proposal", functions)
    level, sampling, bins = p.aligned[0]["levels"][which], sampling_of(p, which), p.settings.rois.output_size
    (left, right), (top, bottom) = sampling.cells
    crop = p.features[level][:, top:bottom, left:right].transpose(1, 2, 0)
    project = principal_component(crop)
    points = " x ".join(str(points.shape[1]) for points in sampling.points)
    cells = f"{right - left} x {bottom - top} cells"
    caption = f"RoIAlign: {bins} x {bins} bins of {points} points, from {cells} of level {level}"
    figure = new_figure(7.2)
    rows = [["picture"] * 2 + ["crop"] * 2 + ["result"] * 2, ["y"] * 3 + ["x"] * 3]
    grid = figure.subplot_mosaic(rows, height_ratios=(1.5, 1))
    box = p.propose["proposals"][[which]]
    draw_zoom(grid["picture"], p.resized, box, f"proposal {which + 1:,} in the picture")
    draw_boxes(grid["picture"], box, PALETTE[5], 2)
    draw_crop(grid["crop"], project(crop), sampling, bins)
    result = project(p.aligned[0]["roi_feats"][which].transpose(1, 2, 0))
    figure.colorbar(grid["result"].imshow(result, cmap="cividis"), ax=grid["result"], shrink=0.7)
    grid["result"].set_title(f"the result: {bins} x {bins} bins", fontsize=11)
    draw_matrix(grid["y"], sampling.matrices[1], "y", "rows")
    draw_matrix(grid["x"], sampling.matrices[0], "x", "columns")
    return Page("roi_align", caption, tell_roi_align(p, points), functions, figure)


def tell_roi_align(p, points):
    """Return the text about RoIAlign, whose bins have so many points: "2 x 2"."""
    settings, channels = p.settings.rois, len(p.features[0])
    bins, number = f"{settings.output_size} x {settings.output_size}", "as in every bin"
    if settings.sampling_ratio == 0:
        number = "along each axis as many as a bin is cells long, rounded up"
    text = (
        f"The second network takes {bins} values from each channel, however large the proposal is. So RoIAlign cuts "
        f"the proposal into {bins} bins, and the value of a bin is the mean of its sample points: here {points} "
        f"({number}). A point takes its value from the four cells around it, and the nearest counts most. The weight "
        "of a cell in a bin is the weight of its row times the weight of its column. So two matrix products compute "
        "all bins at once: Wy @ crop @ Wx transposed. The colours of the crop and of the result are the first "
        f"principal component of {channels} channels. The result is what the second network sees."
    )
    if len(p.heads) > 1:
        text += " Each later head of the cascade sees the features of its own boxes, pooled in the same way."
    return text


def draw_matrix(axis, matrix, name, cells):
    """Draw an interpolation matrix."""
    axis.imshow(matrix, cmap="cividis", aspect="auto", vmin=0)
    axis.set_title(f"$W_{name}$: the weight of each {cells[:-1]} in each bin", fontsize=11)
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axis.set_xlabel(f"{cells} of the crop")
    axis.set_ylabel("bins")


def draw_crop(axis, values, sampling, bins):
    """Show a crop of a feature map with the bins and their sample points, in cells of the map."""
    height, width = values.shape
    (left, _), (top, _) = sampling.cells
    axis.imshow(values, cmap="cividis", extent=(left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5))
    (x1, y1), (x2, y2) = sampling.start, sampling.start + sampling.lengths
    axis.vlines(np.linspace(x1, x2, bins + 1), y1, y2, color="white", lw=1)
    axis.hlines(np.linspace(y1, y2, bins + 1), x1, x2, color="white", lw=1)
    x, y = np.meshgrid(*(points.ravel() for points in sampling.points))
    axis.plot(x.ravel(), y.ravel(), "o", color=PALETTE[5], ms=3.5, mec="white", mew=0.5)
    axis.set_title("its cells (the crop), bins and points", fontsize=11)


def draw_head(p, shown=4):
    """Draw boxes before and after their regression, and the class scores."""
    best = p.moving_most(p.rois[-1], shown)
    network = [name for name in p.detector.networks if name.startswith("model2")][-1]
    functions = f"{network}, postprocess.softmax, postprocess.decode_boxes"
    if len(best) == 0:
        return empty_page(p.resized, "head", "Head: no class has a score above the threshold", functions)
    caption = (
        f"Head: class scores and a better box for each of {len(p.logits):,} proposals (dashed: before, solid: after)"
    )
    figure = new_figure(4.6)
    axes = figure.subplots(2, shown, squeeze=False, height_ratios=(1.6, 1))
    for (above, below), candidate, colour in zip(axes.T, best, PALETTE):
        draw_regression(above, p, candidate, colour)
        scores = softmax(p.logits[p.detect["rois"][candidate]])
        draw_class_scores(below, scores, [*p.classes, "background"], colour)
    for axis in axes[:, len(best) :].ravel():
        axis.axis("off")
    deltas = "four deltas" if p.settings.head.class_agnostic else "four deltas for each class"
    text = (
        "All that the second network sees of a proposal are its pooled features. It answers with a score for each "
        f"class and for the background (a softmax), and with {deltas}, which move and scale the box once more. Shown "
        "are the detections whose boxes moved most; proposals are numbered by their objectness, the best first."
    )
    if len(p.heads) > 1:
        text += (
            f" This is the last of {len(p.heads)} heads, which moves the boxes that the others left. The scores are "
            "those of the mean of all heads' logits."
        )
    return Page("head", caption, text, functions, figure)


def draw_regression(axis, p, candidate, colour):
    """Show where a candidate came from: its box before and after the regression, and how the corners moved."""
    which = p.detect["rois"][candidate]
    before, after = p.rois[-1][which], p.detect["resized"][candidate]
    draw_zoom(axis, p.resized, np.stack([before, after]), f"proposal {which + 1:,}")
    draw_boxes(axis, before[None], colour, 1.5, "dashed")
    draw_boxes(axis, after[None], colour, 2)
    for corner in ([0, 1], [2, 3], [0, 3], [2, 1]):
        arrow = {"arrowstyle": "->", "color": "black", "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", after[corner], before[corner], arrowprops=arrow)


def draw_class_scores(axis, scores, classes, colour):
    """Draw the best scores of one proposal as bars."""
    best = np.argsort(-scores, kind="stable")[:4][::-1]
    draw_bars(axis, scores[best], [classes[label] for label in best], colour)


def of_all_classes(p):
    """Return whether boxes of all classes met in the last NMS."""
    return p.settings.head.nms_class_agnostic and len(p.detect["candidates"]) < NMS_SPLIT


def removers(p):
    """Return the candidates that others removed, for each the kept one that did it, and their IoU; the least first.

    NMS is replayed with the boxes that it kept, the best first, where batched_nms saw them.
    """
    stage, settings = p.detect, p.settings.head
    boxes, labels = stage["resized" if settings.nms_resized else "candidates"], stage["labels"]
    scores, kept = stage["scores"], stage["kept"]
    removed = np.setdiff1d(np.arange(len(boxes)), kept)
    if settings.soft_min_score is not None:
        removed = removed[scores[removed] >= settings.soft_min_score]  # the others nobody had to remove
    if len(removed) == 0:
        return removed, removed, np.zeros(0)
    moved = moved_apart(boxes, labels, settings)
    overlaps = pairwise_iou(moved[removed], moved[kept])
    if not of_all_classes(p):
        overlaps[labels[removed][:, None] != labels[kept]] = 0
    if settings.soft_min_score is None:
        gone = overlaps > settings.iou_threshold
    else:
        factors = np.where(overlaps >= settings.iou_threshold, 1 - overlaps, np.float32(1))
        gone = np.cumprod(np.c_[scores[removed], factors], axis=1)[:, 1:] < settings.soft_min_score
    by = kept[gone.argmax(axis=1)]
    iou = pairwise_iou(boxes[removed], boxes[by]).diagonal()
    order = np.argsort(iou, kind="stable")
    return removed[order], by[order], iou[order]


def at_most(values, count):
    """Return the indices of values of which no more than `count` equal ones came before."""
    return [i for i, value in enumerate(values) if np.count_nonzero(values[:i] == value) < count]


def draw_nms(p, shown=12):
    """Draw what the last NMS removed, by what, at which IoU."""
    stage = p.detect
    removed, by, iou = removers(p)
    keepers = list(dict.fromkeys(by[at_most(by, 2)]))[: len(PALETTE)]
    which = [i for i in at_most(by, 2) if by[i] in keepers][:shown]
    before, kept, after = len(stage["candidates"]), len(stage["kept"]), len(p.detections.boxes)
    name = "NMS" if p.settings.head.soft_min_score is None else "Soft-NMS"
    name += " of all classes together" if of_all_classes(p) else " class by class"
    caption = f"{name}: {before:,} candidates, {kept:,} kept, {after:,} returned"
    figure = new_figure(max(panel_height(p.image, 1.8), 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    show(left, p.image[..., ::-1], "solid: kept; dashed: removed", fade=0.4)
    colours = dict(zip(keepers, PALETTE))
    draw_boxes(left, stage["candidates"][removed[which]], [colours[keeper] for keeper in by[which]], 1.3, "dashed")
    draw_boxes(left, stage["candidates"][list(colours)], list(colours.values()), 2.2)
    if which:
        draw_overlaps(right, p, removed[which], by[which], iou[which], colours)
    else:
        nothing(right, "no box removed another")
        right.axis("off")
    functions = f"{p.decided_by}, postprocess.batched_nms, postprocess." + (
        "nms" if p.settings.head.soft_min_score is None else "soft_nms"
    )
    return Page("nms", caption, tell_nms(p), functions, figure)


def tell_nms(p):
    """Return the text about the last NMS."""
    settings, threshold = p.settings.head, f"{p.settings.head.iou_threshold:g}"
    before, kept, after = len(p.detect["candidates"]), len(p.detect["kept"]), len(p.detections.boxes)
    name, fate = "NMS", f"removes a box if its IoU with a better one that stays is above {threshold}"
    if settings.soft_min_score is not None:
        name = "Soft-NMS"
        fate = (
            f"multiplies the score of a box by 1 - IoU for each better one with which its IoU is {threshold} or more. "
            f"A box is removed when its score is below {settings.soft_min_score:g}"
        )
    group = "all boxes" if of_all_classes(p) else "the boxes of each class"
    limit = "All of them are returned"
    if settings.max_per_img is not None:
        limit = f"No more than {settings.max_per_img:,} are returned, the best of all classes"
    return (
        f"Several boxes end up on the same object. {name} goes through {group} from the best to the worst, and "
        f"{fate}: of {before:,} boxes, {before - kept:,} are removed and {kept:,} stay. {limit}: here {after:,}. Shown "
        "are the removed boxes with the least IoU, at most two for each box that removed some, in its colour."
    )


def draw_overlaps(axis, p, removed, by, iou, colours):
    """Draw the IoUs of removed candidates with those that removed them as bars."""
    scores, labels = p.detect["scores"], p.detect["labels"]
    rows = np.arange(len(removed))[::-1]
    axis.barh(rows, iou, color=[colours[keeper] for keeper in by])
    names = [f"{p.classes[labels[i]]} {scores[i]:.3f}, by {scores[k]:.3f}" for i, k in zip(removed, by)]
    axis.set_yticks(rows, names, fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_xlabel("IoU with the box that removed it (dashed: threshold)")
    axis.axvline(p.settings.head.iou_threshold, color="black", ls="--", lw=1)


def draw_result(p):
    """Draw the detections."""
    shown = p.detections.where(p.detections.scores >= SHOWN_SCORE)
    caption = f"Result: {len(p.detections.boxes)} detections, {len(shown.boxes)} with a score of at least {SHOWN_SCORE}"
    scale = max(1, WIDTH * DPI / max(p.image.shape[:2]))  # draw on a picture as large as it will be shown
    image = cv2.resize(p.image, None, fx=scale, fy=scale) if scale > 1 else p.image
    large = shown._replace(boxes=shown.boxes * np.float32(scale), masks=resized_masks(shown.masks, image))
    figure = new_figure(panel_height(p.image, 1.1))
    show(figure.subplots(), draw(image, large, p.detector.classes)[..., ::-1])
    back = "are divided by the factors by which the picture was resized"
    if p.settings.preprocess.scale is None:
        back = "are moved by what stands beside the picture and above it"
    text = (
        f"The boxes {back}: now they are pixels of the picture as it came in. Drawn are the detections with a score of "
        f"at least {SHOWN_SCORE}."
    )
    if hasattr(p, "vote"):
        text += " Each box is the weighted mean of all candidates of its class that overlap it."
    if shown.masks is not None:
        text += " The pixels of a mask are tinted, and its outline is drawn."
    return Page("result", caption, text, f"{p.decided_by}, pictures.draw", figure)


def resized_masks(masks, image):
    """Return run-length encoded masks, None or [d], stretched over an image."""
    if masks is None:
        return None
    height, width = image.shape[:2]
    decoded = [rle.decode(mask).astype(np.uint8) for mask in masks]
    larger = [cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) > 0 for mask in decoded]
    return np.array([rle.encode(mask, (height, width)) for mask in larger], object)


# ---------------------------------------------------------------------- the files


def pages_of(p):
    """Return the pages, numbered in the order of what happens."""
    drawers = drawers_of_two_stages(p) if hasattr(p, "propose") else drawers_of_one_stage(p)
    return [numbered(draw_page(p), number) for number, draw_page in enumerate(drawers, 1)]


def drawers_of_one_stage(p):
    """Return the functions that draw the pages of a one-stage detector; CenterNet and DETR have no priors."""
    if hasattr(p.detector, "priors"):
        return [draw_input, draw_priors, draw_scores, draw_candidates, draw_nms, draw_result]
    return [draw_input, *([draw_heat, draw_peaks] if "heatmap" in p.model else [draw_queries]), draw_result]


def drawers_of_two_stages(p):
    """Return the functions that draw the pages of a two-stage detector."""
    drawers = [draw_input, draw_anchors, draw_objectness, draw_proposals, draw_pyramid, draw_roi_align]
    drawers += [draw_cascade, draw_head, draw_nms] if len(p.heads) > 1 else [draw_head, draw_nms]
    drawers += [draw_points] if p.stages("subdivide") else []
    return drawers + ([draw_masks, draw_result] if p.mask_heads else [draw_result])


START = f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><meta name=generator content={SIGN}>"
STYLE = """body { font: 17px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
img { width: 100%; border: 1px solid #ddd } code { background: #f2f2f2; padding: 0 .2em } h2 { margin-top: 2em }"""


def as_png(page):
    """Return a page's figure as the bytes of a PNG that carries our mark, with its caption as the description."""
    buffer = io.BytesIO()
    metadata = {"Software": SIGN, "Description": page.caption}
    FigureCanvasAgg(page.figure).print_png(buffer, metadata=metadata)  # savefig draws twice
    return buffer.getvalue()


def as_html(title, pages, pngs):
    """Return all pages as one HTML file that needs no other."""
    title = html.escape(title)
    parts = [f"{START}<title>{title}</title>"]
    parts.append(f"<style>{STYLE}</style>\n<h1>{title}</h1>")
    for page, png in zip(pages, pngs):
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        caption, text = html.escape(page.caption), html.escape(page.text)
        parts.append(f'<h2>{caption}</h2>\n<img alt="{caption}" src="{source}">')
        parts.append(f"<p>{text}</p>\n<p>Computed by <code>{html.escape(page.functions)}</code></p>")
    return "\n".join(parts) + "\n</html>\n"


def check_out(paths):
    """Refuse files that are there and were not written by an earlier run: ModelError."""
    for path in paths:
        is_page = path.suffix == ".html" and path.is_file() and path.read_bytes().startswith(START.encode())
        if os.path.lexists(path) and not is_page and not is_annotated(path):
            raise ModelError(f"{path} is there, and not from an earlier run: name another folder with --out")


def explain(detector, path, out):
    """Write the pages and index.html for the picture in a file; return the pages."""
    pipeline = Pipeline(detector, read_picture(path))
    with mpl.rc_context({"font.family": "DejaVu Sans", "hatch.linewidth": 0.8}):
        pages = pages_of(pipeline)
        pngs = [as_png(page) for page in pages]
    paths = [out / f"{page.name}.png" for page in pages]
    if os.path.realpath(path) in map(os.path.realpath, paths):
        raise ValueError("it would be overwritten: name another folder with --out")
    check_out([*paths, out / "index.html"])
    out.mkdir(parents=True, exist_ok=True)
    for file, png in zip(paths, pngs):
        write_file(file, png)
    family = re.sub(r"(?<=[a-z])(?=[A-Z]\w*CNN)", " ", type(detector).__name__).replace("RCNN", "R-CNN")
    title = f"{family} on {printable(Path(path).name)}"
    write_file(out / "index.html", as_html(title, pages, pngs).encode())
    return pages


def main(arguments=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="explain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", metavar="PICTURE", help="a picture, preferably with a few objects")
    parser.add_argument("--model", metavar="DIR", type=Path, default=default_folder(),
                        help="folder of an export (default: as demo.py)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("output"), help="folder (default: output)")
    args = parser.parse_args(arguments)
    try:
        if mpl is None:
            raise ModelError("matplotlib is missing: pip install matplotlib, or uv run --extra explain explain.py")
        pages = explain(load_folder(args.model), args.picture, args.out)
        for page in pages:
            print(page.caption)
        written = [*(args.out / f"{page.name}.png" for page in (pages[0], pages[-1])), args.out / "index.html"]
        print("written: {} to {}, {}".format(*map(printable, written)))
    except (ModelError, OSError) as error:
        print(f"explain.py: {one_line(error)}", file=sys.stderr)
        return 2
    except (ValueError, MemoryError, cv2.error) as error:
        print(f"explain.py: {printable(args.picture)}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("explain.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    run_program(main)
