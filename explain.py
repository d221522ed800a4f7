"""Draw Faster R-CNN at work on your picture: nine PNGs, from the arrays that the pipeline itself computes.

python explain.py PICTURE      into the folder output/: 1_input.png to 9_result.png, and index.html with all of them

Exit status: 0 all well, 2 nothing could be done, 130 interrupted.
"""

import argparse
import base64
import html
import io
import sys
from pathlib import Path
from typing import NamedTuple

import demo  # first, because it sets the limits of cv2

# isort: split
import cv2
import numpy as np

from postprocess import (
    decode_boxes,
    grid_anchors,
    interpolation_matrices,
    objectness,
    pairwise_iou,
    sample_points,
    softmax,
    to_cells,
)

try:
    import matplotlib as mpl
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
except ImportError:
    mpl = None

# Told apart with any kind of colour vision (Okabe and Ito's colours); a level has the same one in every picture.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
SCORES = "viridis"
WIDTH, DPI = 10, 100  # inches and pixels per inch: 1000 pixels, about as wide as GitHub shows
SHOWN_SCORE = 0.3


class Page(NamedTuple):
    """One step of the explanation."""

    name: str
    caption: str  # one line, in the picture
    text: str  # for index.html
    functions: str
    figure: object


class Pipeline:
    """A detector, a picture and the arrays of every stage: self.propose["candidates"] and so on."""

    def __init__(self, detector, image):
        self.detector, self.image = detector, image
        self.detections = detector(image, self.record)
        self.config = detector.config
        self.strides = self.config["anchors"]["strides"]
        names = demo.drawable_names(detector.classes)
        self.classes = [name.replace("$", r"\$") for name in names]  # between two, matplotlib reads TeX
        settings = self.config["preprocess"]
        pixels = self.preprocess["blob"][0].transpose(1, 2, 0) * np.float32(settings["std"]) + settings["mean"]
        self.seen = np.clip(pixels, 0, 255).round().astype(np.uint8)[..., :: 1 if settings["to_rgb"] else -1]
        height, width = self.preprocess["image_size"]
        self.resized = self.seen[:height, :width]

    def record(self, stage, **arrays):
        """Keep the arrays of a stage under its name."""
        setattr(self, stage, arrays)


# ---------------------------------------------------------------------- drawing


def new_figure(caption, height):
    """Return an empty figure with its caption."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(caption, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure


def show(axis, picture, title="", fade=0.0):
    """Show a picture [h, w, 3], faded towards white, without ticks."""
    height, width = picture.shape[:2]
    axis.imshow((picture * (1 - fade) + 255 * fade).astype(np.uint8))
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), autoscale_on=False)
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])


def panel_height(picture, columns, rows=1):
    """Return the height in inches of a figure with so many pictures side by side."""
    height, width = picture.shape[:2]
    return np.clip(WIDTH / columns * height / width, 1.6, 7) * rows + 0.4 + 0.25 * rows


def draw_boxes(axis, boxes, colours, width=1.5, style="solid"):
    """Draw boxes [n, 4]; colours: one, or n."""
    if len(boxes):
        x1, y1, x2, y2 = np.asarray(boxes).T
        corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 4, 2)
        axis.add_collection(PolyCollection(corners, facecolors="none", edgecolors=colours, linewidths=width,
                                           linestyles=style))  # fmt: skip


def colours_of_scores(scores):
    """Return a colour for each score, from 0 to 1."""
    return mpl.colormaps[SCORES](np.asarray(scores, float))


def add_score_bar(figure, axes, label):
    """Draw the scale of the scores' colours beside the axes."""
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), SCORES)
    figure.colorbar(scale, ax=axes, label=label, shrink=0.8, pad=0.01)


def nothing(axis, text):
    """Say that there is nothing to draw."""
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, fontsize=12, color="#555555")


def level_panels(p, caption, fade):
    """Return a figure with the resized picture once for each level, and the levels' axes."""
    levels = len(p.strides)
    columns = min(levels, 3)
    rows = -(-levels // columns)
    figure = new_figure(caption, panel_height(p.resized, columns, rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[levels:]:
        axis.axis("off")
    for axis in axes[:levels]:
        show(axis, p.resized, fade=fade)
    return figure, axes[:levels]


# ---------------------------------------------------------------------- the nine pictures


def draw_input(p):
    """1: the picture as the first network sees it."""
    height, width = p.resized.shape[:2]
    padded_height, padded_width = p.seen.shape[:2]
    original_height, original_width = p.image.shape[:2]
    caption = (
        f"1  Input: {original_width} x {original_height} pixels, resized to {width} x {height}, "
        f"padded to {padded_width} x {padded_height}"
    )
    figure = new_figure(caption, panel_height(p.seen, 1.1) + 0.3)
    axis = figure.subplots()
    show(axis, p.seen)
    for x, y, w, h in ((width, 0, padded_width - width, padded_height), (0, height, width, padded_height - height)):
        if w and h:
            axis.add_patch(
                mpl.patches.Rectangle((x - 0.5, y - 0.5), w, h, fill=False, hatch="////", lw=0, color="white")
            )
    axis.set_xticks([0, width], ["0", f"{width}"])
    axis.set_yticks([0, height], ["0", f"{height}"])
    settings = p.config["preprocess"]
    axis.set_xlabel(
        f"every pixel minus the mean, divided by the standard deviation; hatched: zeros, up to multiples of "
        f"{settings['pad_divisor']}"
    )
    text = (
        f"The picture is resized so that it fits into {settings['scale'][0]} x {settings['scale'][1]}, normalised with "
        f"mean {settings['mean']} and deviation {settings['std']}, and padded with zeros, so that every level of "
        "the pyramid has a whole number of cells."
    )
    return Page("1_input", caption, text, "demo.preprocess", figure)


def draw_anchors(p):
    """2: the anchors of three cells of each level, to scale."""
    levels, bases = len(p.strides), p.detector.base_anchors
    counts = [len(base) * scores[0].size for base, scores in zip(bases, p.model1["rpn_reg"])]
    caption = f"2  Anchors: {sum(counts):,} boxes of fixed size, {len(bases[0])} at every cell of every level"
    figure, axes = level_panels(p, caption, fade=0.55)
    height, width = p.resized.shape[:2]
    for level, axis in enumerate(axes):
        map_height, map_width = p.model1["rpn_reg"][level].shape[1:]
        axis.set_title(f"level {level}, stride {p.strides[level]}: {map_width} x {map_height} cells", fontsize=11)
        for part in (0.2, 0.5, 0.8):
            y, x = int(min(height / p.strides[level], map_height) / 2), int(width / p.strides[level] * part)
            y, x = min(y, map_height - 1), min(x, map_width - 1)
            here = (y * map_width + x) * len(bases[level]) + np.arange(len(bases[level]))
            anchors = grid_anchors(bases[level], (map_height, map_width), p.strides[level], here)
            draw_boxes(axis, anchors, PALETTE[level % len(PALETTE)])
            axis.plot(*((anchors[0, :2] + anchors[0, 2:]) / 2), "+", color="black", ms=6)
        axis.set_xlim(-0.3 * width, 1.3 * width)
        axis.set_ylim(1.3 * height, -0.3 * height)
    anchors = p.config["anchors"]
    text = (
        f"An anchor is a guess that costs nothing. Ratios of height to width {anchors['ratios']} and scales "
        f"{[round(scale, 2) for scale in anchors['scales']]} times the level's base size give {len(bases[0])} at each "
        f"cell: {', '.join(f'{count:,}' for count in counts)} on levels 0 to {levels - 1}. Three cells of each are "
        "shown; coarse levels have few, large anchors."
    )
    return Page("2_anchors", caption, text, "postprocess.base_anchors, postprocess.grid_anchors", figure)


def draw_objectness(p):
    """3: the RPN's scores of each level over the picture."""
    strides, maps = p.strides, []
    for logits, base in zip(p.model1["rpn_cls"], p.detector.base_anchors):
        maps.append(objectness(logits, len(base)).reshape(*logits.shape[1:], len(base)).max(axis=2))
    best = max(scores.max() for scores in maps)
    caption = f"3  Objectness: how sure the RPN is of an object at each cell (best {best:.2f})"
    figure, axes = level_panels(p, caption, fade=0.3)
    for level, axis in enumerate(axes):
        axis.set_title(f"level {level}, stride {strides[level]}: best {maps[level].max():.2f}", fontsize=11)
        map_height, map_width = maps[level].shape
        anchor = p.detector.base_anchors[level][0]
        left, top = (anchor[:2] + anchor[2:]) / 2 - strides[level] / 2  # around the centre of its anchors lies a cell
        extent = (left, left + map_width * strides[level], top + map_height * strides[level], top)
        alpha = 0.2 + 0.7 * maps[level]  # where there is nothing the picture shows
        axis.imshow(maps[level], cmap=SCORES, vmin=0, vmax=1, alpha=alpha, extent=extent, interpolation="nearest")
        axis.set(xlim=(-0.5, p.resized.shape[1] - 0.5), ylim=(p.resized.shape[0] - 0.5, -0.5))
    add_score_bar(figure, list(axes), "objectness")
    text = (
        "The first network gives every anchor a logit; from it comes its objectness, without saying of what class. "
        "Shown is the best anchor of each cell. Small things light up on fine levels, large ones on coarse levels."
    )
    return Page("3_objectness", caption, text, "model1.onnx, postprocess.objectness", figure)


def draw_proposals(p, shown=60):
    """4: the best decoded anchors before and after NMS."""
    stage = p.propose
    before, after = len(stage["candidates"]), len(stage["proposals"])
    caption = f"4  Proposals: {before:,} decoded anchors before NMS, {after:,} after"
    figure = new_figure(caption, panel_height(p.resized, 2))
    left, right = axes = figure.subplots(1, 2)
    drawn = [np.flatnonzero(stage["levels"] == level)[:shown] for level in range(len(p.strides))]
    drawn = np.concatenate(drawn) if before else np.zeros(0, int)
    drawn = drawn[np.argsort(stage["scores"][drawn], kind="stable")]  # the best on top
    for axis, which in ((left, drawn), (right, drawn[np.isin(drawn, stage["kept"])])):
        show(axis, p.resized, fade=0.5)
        draw_boxes(axis, stage["candidates"][which], colours_of_scores(stage["scores"][which]), 1)
        axis.set_title(f"{'before' if axis is left else 'after'}: {len(which)} drawn", fontsize=11)
    add_score_bar(figure, list(axes), "objectness")
    settings = p.config["rpn"]
    counts = np.bincount(stage["levels"], minlength=len(p.strides)) if before else []
    how_many = f"The best {settings['nms_pre']}" if settings["nms_pre"] > 0 else "All"
    text = (
        f"{how_many} anchors of each level are moved and scaled by the deltas that the network "
        f"predicts for them ({', '.join(map(str, counts))} by level). They crowd around objects: NMS keeps the best "
        f"and removes what overlaps it by an IoU above {settings['iou_threshold']}; {after:,} go on. Drawn are the "
        f"best {shown} of each level, and those of them that stay."
    )
    functions = "postprocess.propose: top_k, decode_boxes, batched_nms"
    return Page("4_proposals", caption, text, functions, figure)


def draw_pyramid(p, shown=40):
    """5: the level of the pyramid that each proposal is assigned to."""
    proposals, levels, roi = p.propose["proposals"], p.align["levels"], p.config["roi"]
    num_levels = len(roi["strides"])
    counts = np.bincount(levels, minlength=num_levels)
    caption = "5  Pyramid: proposals on each level: " + ", ".join(f"{count:,}" for count in counts)
    figure = new_figure(caption, max(panel_height(p.resized, 1.8), 3.6))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    show(left, p.resized, f"the best {shown} of each level", fade=0.5)
    for level in range(num_levels):
        draw_boxes(left, proposals[levels == level][:shown], PALETTE[level % len(PALETTE)], 1.2)
    sizes = np.sqrt(np.maximum((proposals[:, 2:] - proposals[:, :2]).prod(axis=1), 1))
    thresholds = roi["finest_scale"] * 2.0 ** np.arange(1, num_levels)
    low, high = np.log2([min([*sizes, 16]), max([*sizes, *thresholds * 1.4])] / np.float64(roi["finest_scale"]))
    bins = roi["finest_scale"] * 2 ** (np.arange(np.floor(low * 6), np.ceil(high * 6) + 1) / 6)  # a level is six bins
    colours = [PALETTE[level % len(PALETTE)] for level in range(num_levels)]
    labels = [f"level {level}, stride {stride}" for level, stride in enumerate(roi["strides"])]
    right.hist([sizes[levels == level] for level in range(num_levels)], bins, stacked=True, color=colours, label=labels)
    for threshold in thresholds:
        right.axvline(threshold, color="black", lw=1, ls="--")
    right.set_xscale("log")
    right.set_xticks([16, 32, *thresholds], ["16", "32", *(f"{threshold:g}" for threshold in thresholds)])
    right.minorticks_off()
    right.set_xlabel("sqrt(width x height), pixels")
    right.set_ylabel("proposals")
    right.legend(fontsize=9, loc="upper right")
    right.set_title(
        rf"level = $\lfloor \log_2 (\sqrt{{w h}}\,/\,{roi['finest_scale']}) \rfloor$, 0 to {num_levels - 1}",
        fontsize=11,
    )
    text = (
        "A small box needs fine features, a large one coarse features. The level is the logarithm of the box's size "
        f"over {roi['finest_scale']} pixels, rounded down; dashed lines are where it changes. RoIs read only the "
        f"finest levels, {num_levels} of them."
    )
    return Page("5_pyramid", caption, text, "postprocess.assign_levels", figure)


def explained_roi(p):
    """Return the proposal that the best detection came from, or else the best proposal; None if there is none."""
    if len(p.detect["kept"]):
        return p.detect["rois"][p.detect["kept"][0]]
    return 0 if len(p.propose["proposals"]) else None


def principal_component(features):
    """Return the first principal component of features [..., C] as a function of features [..., C]."""
    flat = features.reshape(-1, features.shape[-1])
    mean = flat.mean(axis=0)
    direction = np.linalg.svd(flat - mean, full_matrices=False)[2][0]
    direction = direction * np.sign(direction.sum() or 1)
    return lambda values: (values - mean) @ direction


class Sampling(NamedTuple):
    """How RoIAlign samples one RoI, each as (x, y)."""

    start: np.ndarray  # of the RoI, in cells of its level
    lengths: np.ndarray
    points: list  # [bins, points of a bin] each
    cells: list  # (first, stop) of the cells that are read
    matrices: list  # [bins, cells] each


def sampling_of(p, which):
    """Return the Sampling of a proposal."""
    roi, level = p.config["roi"], p.align["levels"][which]
    height, width = p.model1["features"][level].shape[1:]
    start, lengths = to_cells(p.propose["proposals"][[which]], roi["strides"][level], roi["aligned"])
    sampling = Sampling(start[0], lengths[0], [], [], [])
    for axis, map_length in enumerate((width, height)):
        interval, bins = (start[:, axis], lengths[:, axis]), (roi["output_size"], roi["sampling_ratio"])
        matrices, first, stop = interpolation_matrices(*interval, map_length, *bins)
        sampling.points.append(sample_points(*interval, *bins)[0][0])
        sampling.cells.append((first[0], stop[0]))
        sampling.matrices.append(matrices[0, :, : stop[0] - first[0]])
    return sampling


def draw_roi_align(p):
    """6: RoIAlign of one proposal, from the sample points to the result."""
    which, functions = explained_roi(p), "postprocess.to_cells, sample_points, interpolation_matrices, roi_align"
    if which is None:
        return empty_page(p, "6_roi_align", "6  RoIAlign: there is no proposal", functions)
    level, sampling, bins = p.align["levels"][which], sampling_of(p, which), p.config["roi"]["output_size"]
    (left, right), (top, bottom) = sampling.cells
    crop = p.model1["features"][level][:, top:bottom, left:right].transpose(1, 2, 0)
    project = principal_component(crop)
    cells = f"{right - left} x {bottom - top} cells"
    caption = f"6  RoIAlign: {bins} x {bins} bins for a proposal, from {cells} of level {level}"
    figure = new_figure(caption, 7.2)
    grid = figure.subplot_mosaic([["picture", "crop", "result"], ["y", "y", "x"]], height_ratios=(1.5, 1))
    box = p.propose["proposals"][[which]]
    draw_zoom(grid["picture"], p.resized, box, "the proposal in the picture")
    draw_boxes(grid["picture"], box, PALETTE[5], 2)
    draw_crop(grid["crop"], project(crop), sampling, bins)
    result = project(p.align["roi_feats"][which].transpose(1, 2, 0))
    figure.colorbar(grid["result"].imshow(result, cmap="cividis"), ax=grid["result"], shrink=0.7)
    grid["result"].set_title(f"result: {bins} x {bins} bins", fontsize=11)
    draw_matrix(grid["y"], sampling.matrices[1], "y", "rows")
    draw_matrix(grid["x"], sampling.matrices[0], "x", "columns")
    points = f"{sampling.points[0].shape[1]} x {sampling.points[1].shape[1]}"
    text = (
        f"The second network wants {bins} x {bins} numbers a channel, whatever the box's size. Each bin is the mean "
        f"of {points} points, and each point lies between four cells. Weights of rows times weights of columns: for "
        "all bins together this is Wy @ crop @ Wx transposed. Colours are the first principal component of "
        f"{crop.shape[2]} channels; the result is what the second network gets."
    )
    return Page("6_roi_align", caption, text, functions, figure)


def draw_matrix(axis, matrix, name, cells):
    """Draw an interpolation matrix."""
    axis.imshow(matrix, cmap="cividis", aspect="auto", vmin=0)
    axis.set_title(f"$W_{name}$: each bin's weights of the {cells}", fontsize=11)
    axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axis.set_xlabel(cells)
    axis.set_ylabel("bins")


def draw_zoom(axis, picture, boxes, title):
    """Show the part of a picture around boxes [n, 4]."""
    height, width = picture.shape[:2]
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    margin = 0.2 * max(*(high - low), 4)
    show(axis, picture, title, fade=0.2)
    axis.set_xlim(max(low[0] - margin, 0) - 0.5, min(high[0] + margin, width) - 0.5)
    axis.set_ylim(min(high[1] + margin, height) - 0.5, max(low[1] - margin, 0) - 0.5)


def draw_crop(axis, values, sampling, bins):
    """Show a crop of a feature map with the bins and their sample points, in cells of the map."""
    height, width = values.shape
    (left, _), (top, _) = sampling.cells
    axis.imshow(values, cmap="cividis", extent=(left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5))
    (x1, y1), (x2, y2) = sampling.start, sampling.start + sampling.lengths
    axis.vlines(np.linspace(x1, x2, bins + 1), y1, y2, color="white", lw=1)
    axis.hlines(np.linspace(y1, y2, bins + 1), x1, x2, color="white", lw=1)
    x, y = np.meshgrid(*(points.ravel() for points in sampling.points))
    axis.plot(x.ravel(), y.ravel(), ".", color=PALETTE[5], ms=3)
    axis.set_title("its cells, bins, sample points", fontsize=11)


def draw_head(p, shown=4):
    """7: boxes before and after their regression, and the class scores."""
    best = moving_most(p, shown)
    functions = "model2.onnx, postprocess.softmax, postprocess.decode_boxes"
    if len(best) == 0:
        return empty_page(p, "7_head", "7  Head: no class has a score above the threshold", functions)
    caption = (
        f"7  Head: {len(p.model2['cls']):,} proposals get class scores and a better box (dashed: before, solid: after)"
    )
    figure = new_figure(caption, 4.6)
    axes = figure.subplots(2, shown, squeeze=False, height_ratios=(1.6, 1))
    for column, (above, below) in enumerate(axes.T):
        if column >= len(best):
            above.axis("off")
            below.axis("off")
            continue
        which, label, colour = p.detect["rois"][best[column]], p.detect["labels"][best[column]], PALETTE[column]
        before, after = p.propose["proposals"][which], refined(p, which, label)
        draw_zoom(above, p.resized, np.stack([before, after]), f"proposal {which + 1:,}")
        draw_boxes(above, before[None], colour, 1.5, "dashed")
        draw_boxes(above, after[None], colour, 2)
        for corner in ([0, 1], [2, 3], [0, 3], [2, 1]):
            arrow = {"arrowstyle": "->", "color": "black", "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
            above.annotate("", after[corner], before[corner], arrowprops=arrow)
        draw_class_scores(below, softmax(p.model2["cls"][which]), [*p.classes, "background"], colour)
    text = (
        "The second network sees only the pooled features of a proposal. It answers with a score for every class and "
        "for the background (softmax), and with four deltas for every class, which move the box once more. Shown are "
        "the detections whose boxes moved most; the proposals count from the best one."
    )
    return Page("7_head", caption, text, functions, figure)


def moving_most(p, count):
    """Return the candidates that became confident detections, those first whose proposal the head moved most."""
    stage = p.detect
    kept = stage["kept"][stage["scores"][stage["kept"]] >= SHOWN_SCORE]
    kept = kept if len(kept) else stage["kept"]
    overlaps = [
        pairwise_iou(p.propose["proposals"][[roi]], refined(p, roi, label)[None])[0, 0]
        for roi, label in zip(stage["rois"][kept], stage["labels"][kept])
    ]
    return kept[np.argsort(overlaps, kind="stable")][:count]


def refined(p, which, label):
    """Return a proposal's box [4] after its regression for a class."""
    head = p.config["rcnn"]
    deltas = p.model2["reg"][which].reshape(-1, 4)[0 if head["class_agnostic"] else label]
    size = p.preprocess["image_size"]
    return decode_boxes(p.propose["proposals"][which][None], deltas[None], head["means"], head["stds"], size)[0]


def draw_class_scores(axis, scores, classes, colour):
    """Draw the best scores of one proposal as bars."""
    best = np.argsort(-scores, kind="stable")[:4][::-1]
    axis.barh(range(len(best)), scores[best], color=colour)
    axis.set_yticks(range(len(best)), [classes[label] for label in best], fontsize=9)
    for row, label in enumerate(best):
        axis.text(scores[label] + 0.02, row, f"{scores[label]:.2f}", va="center", fontsize=9)
    axis.set_xlim(0, 1.3)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def removers(p):
    """Return the candidates that NMS removed, for each the kept one that removed it, and their IoU; the least first.

    Only candidates of one class can remove each other, unless NMS is class-agnostic.
    """
    stage, settings = p.detect, p.config["rcnn"]
    kept = stage["kept"]
    removed = np.setdiff1d(np.arange(len(stage["candidates"])), kept)
    overlaps = pairwise_iou(stage["candidates"][removed], stage["candidates"][kept])
    if not settings.get("nms_class_agnostic"):
        overlaps[stage["labels"][removed][:, None] != stage["labels"][kept]] = 0
    overlaps[~(overlaps > settings["iou_threshold"])] = 0
    if not overlaps.size:
        return removed[:0], kept[:0], np.zeros(0)
    by = np.argmax(overlaps > 0, axis=1)  # kept is sorted: the first that overlaps enough is the best
    iou = overlaps[np.arange(len(removed)), by]
    order = np.argsort(iou, kind="stable")
    order = order[iou[order] > 0]
    return removed[order], kept[by[order]], iou[order]


def at_most(values, count):
    """Return the indices of values of which no more than `count` equal ones came before."""
    return [i for i, value in enumerate(values) if np.count_nonzero(values[:i] == value) < count]


def draw_nms(p, shown=12):
    """8: what NMS removed class by class, by what, at which IoU."""
    stage, threshold = p.detect, p.config["rcnn"]["iou_threshold"]
    removed, by, iou = removers(p)
    keepers = list(dict.fromkeys(by[at_most(by, 2)]))[: len(PALETTE)]
    which = [i for i in at_most(by, 2) if by[i] in keepers][:shown]
    before, after = len(stage["candidates"]), len(stage["kept"])
    settings = p.config["rcnn"]
    how = "NMS of all classes" if settings.get("nms_class_agnostic") else "NMS class by class"
    how = f"Soft-{how}" if "soft_min_score" in settings else how
    caption = f"8  {how}: {before:,} boxes above the score threshold, {after:,} stay"
    figure = new_figure(caption, max(panel_height(p.image, 1.8), 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    show(left, p.image[..., ::-1], "solid: stays; dashed: removed", fade=0.4)
    colours = dict(zip(keepers, PALETTE))
    draw_boxes(left, stage["candidates"][removed[which]], [colours[keeper] for keeper in by[which]], 1.3, "dashed")
    draw_boxes(left, stage["candidates"][list(colours)], list(colours.values()), 2.2)
    if which:
        draw_overlaps(right, p, removed[which], by[which], iou[which], colours)
        right.axvline(threshold, color="black", ls="--", lw=1)
    else:
        nothing(right, "NMS removed nothing")
        right.axis("off")
    fate = "lowers the scores of those" if "soft_min_score" in settings else "removes those"
    text = (
        f"Several proposals end on the same object. {how} keeps the best box and {fate} whose IoU with it is above "
        f"{threshold}; here {len(removed):,} of them are not among the detections. Shown are those with the least IoU, "
        "at most two for each box that stays, in its colour."
    )
    return Page("8_nms", caption, text, "postprocess.batched_nms, postprocess.nms", figure)


def draw_overlaps(axis, p, removed, by, iou, colours):
    """Draw the IoUs of removed candidates with those that removed them as bars."""
    scores, labels = p.detect["scores"], p.detect["labels"]
    rows = np.arange(len(removed))[::-1]
    axis.barh(rows, iou, color=[colours[keeper] for keeper in by])
    classes = p.classes
    names = [f"{classes[labels[i]]} {scores[i]:.3f}, by {scores[k]:.3f}" for i, k in zip(removed, by)]
    axis.set_yticks(rows, names, fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_xlabel("IoU with the box that removed it (dashed: threshold)")


def draw_result(p):
    """9: the detections."""
    confident = p.detections.scores >= SHOWN_SCORE
    shown = demo.Detections(*(field[confident] for field in p.detections))
    caption = (
        f"9  Result: {len(p.detections.boxes)} detections, {len(shown.boxes)} with a score of at least {SHOWN_SCORE}"
    )
    scale = max(1, WIDTH * DPI / max(p.image.shape[:2]))  # draw on a picture as large as it will be shown
    image = cv2.resize(p.image, None, fx=scale, fy=scale) if scale > 1 else p.image
    large = shown._replace(boxes=shown.boxes * np.float32(scale))
    figure = new_figure(caption, panel_height(p.image, 1.1))
    show(figure.subplots(), demo.draw(image, large, p.detector.classes)[..., ::-1])
    text = "Boxes are divided by the factor of the resizing, so that they are pixels of the picture as it came in."
    return Page("9_result", caption, text, "postprocess.detect, demo.draw", figure)


def empty_page(p, name, caption, functions):
    """Return a page that says that there is nothing to see."""
    figure = new_figure(caption, panel_height(p.resized, 1.6))
    axis = figure.subplots()
    show(axis, p.resized, fade=0.7)
    nothing(axis, "nothing to see here in this picture")
    return Page(name, caption, "In this picture nothing gets this far.", functions, figure)


# ---------------------------------------------------------------------- the files


DRAWERS = (
    draw_input, draw_anchors, draw_objectness, draw_proposals, draw_pyramid,
    draw_roi_align, draw_head, draw_nms, draw_result,
)  # fmt: skip

STYLE = """body { font: 17px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
img { width: 100%; border: 1px solid #ddd } code { background: #f2f2f2; padding: 0 .2em } h2 { margin-top: 2em }"""


def as_png(page):
    """Return a page's figure as the bytes of a PNG, with its caption as the description."""
    buffer = io.BytesIO()
    page.figure.savefig(buffer, format="png", metadata={"Description": page.caption})
    return buffer.getvalue()


def as_html(picture, pages, pngs):
    """Return all pages as one HTML file that needs no other."""
    parts = [
        f"<!DOCTYPE html>\n<html lang=en><meta charset=utf-8><title>Faster R-CNN on {html.escape(picture)}</title>"
    ]
    parts.append(f"<style>{STYLE}</style>\n<h1>Faster R-CNN on {html.escape(picture)}</h1>")
    for page, png in zip(pages, pngs):
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        caption, text = html.escape(page.caption), html.escape(page.text)
        parts.append(f'<h2>{caption}</h2>\n<img alt="{caption}" src="{source}">')
        parts.append(f"<p>{text}</p>\n<p>Computed by <code>{html.escape(page.functions)}</code></p>")
    return "\n".join(parts) + "\n</html>\n"


def explain(detector, path, out):
    """Write the nine pictures and index.html for the picture in a file; return the pages."""
    pipeline = Pipeline(detector, demo.read_picture(path))
    with mpl.rc_context({"font.family": "DejaVu Sans", "hatch.linewidth": 0.8}):
        pages = [draw(pipeline) for draw in DRAWERS]
        pngs = [as_png(page) for page in pages]
    out.mkdir(parents=True, exist_ok=True)
    for page, png in zip(pages, pngs):
        demo.write_file(out / f"{page.name}.png", png)
    demo.write_file(out / "index.html", as_html(demo.printable(Path(path).name), pages, pngs).encode())
    return pages


def main(arguments=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="explain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", metavar="PICTURE", help="a picture, best one with a few objects")
    parser.add_argument("--model", metavar="DIR", type=Path, default=demo.default_model(),
                        help="folder of model1.onnx and model2.onnx (default: as in demo.py)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("output"), help="folder (default: output)")
    args = parser.parse_args(arguments)
    try:
        if mpl is None:
            raise demo.ModelError("matplotlib is missing: pip install matplotlib, or uv run --extra explain explain.py")
        for page in explain(demo.FasterRCNN(args.model), args.picture, args.out):
            print(page.caption)
        written = [args.out / "1_input.png", args.out / "9_result.png", args.out / "index.html"]
        print("written: {} to {}, {}".format(*map(demo.printable, written)))
    except (demo.ModelError, OSError) as error:
        print(f"explain.py: {demo.first_line(error)}", file=sys.stderr)
        return 2
    except (ValueError, MemoryError, cv2.error) as error:
        print(f"explain.py: {demo.printable(args.picture)}: {demo.first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("explain.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    demo.run_program(main)
