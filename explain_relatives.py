"""The pages of explain.py for what Faster R-CNN's relatives add: the heads of a cascade, PointRend's points, masks."""

import numpy as np

from detectors import rle
from detectors.mask_rcnn import paste, pasting_matrix, placed
from figures import (
    PALETTE,
    SCORES,
    Page,
    draw_bars,
    draw_boxes,
    draw_zoom,
    empty_page,
    new_figure,
    show,
)
from postprocess import pairwise_iou, sigmoid, softmax

PROPOSAL, MEAN = "#777777", "#000000"  # colours beside those of the heads
POINT = "#ffffff"  # seen well on the colour of a score of one half


def networks_of(p, kind):
    """Return the files of a kind, such as the heads, as a text."""
    return ", ".join(name for name in p.detector.networks if name.startswith(kind))


# ---------------------------------------------------------------------- a cascade


def draw_cascade(p, shown=4):
    """Draw boxes on their way through the stages, and how sure each head is of their class."""
    functions = f"{networks_of(p, 'model2')}, detectors.cascade_rcnn.refine, postprocess.softmax"
    best = p.moving_most(p.rois[0], shown)
    if len(best) == 0:
        return empty_page(p.resized, "cascade", "Cascade: no class has a score above the threshold", functions)
    caption = f"Cascade: {len(p.heads)} heads, one after the other, move the boxes of {len(p.logits):,} proposals"
    figure = new_figure(6)
    axes = figure.subplots(3, shown, squeeze=False, height_ratios=(2, 1, 1))
    for column, candidate in zip(axes.T, best):
        draw_way(column, p, candidate)
    for axis in axes[1:, 1 : len(best)].ravel():
        axis.tick_params(labelleft=False)  # as in the first column
    for axis in axes[:, len(best) :].ravel():
        axis.axis("off")
    return Page("cascade", caption, tell_cascade(p), functions, figure)


def draw_way(axes, p, candidate):
    """Show the boxes of a candidate, their IoUs with the last one, and each head's score of its class."""
    which, label = p.detect["rois"][candidate], p.detect["labels"][candidate]
    boxes = np.stack([rois[which] for rois in p.rois] + [p.detect["resized"][candidate]])
    names = [f"head {stage}" for stage in range(len(p.heads))]
    colours = [PALETTE[stage % len(PALETTE)] for stage in range(len(p.heads))]
    above, middle, below = axes
    draw_zoom(above, p.resized, boxes, f"proposal {which + 1:,}")
    draw_boxes(above, boxes[:1], PROPOSAL, 1.5, "dashed")
    draw_boxes(above, boxes[1:], colours, np.linspace(3, 1.5, len(colours)))  # those on top leave a rim of the others
    iou = pairwise_iou(boxes, boxes[-1:])[:, 0]
    draw_bars(middle, iou[::-1], ["proposal", *names][::-1], [PROPOSAL, *colours][::-1])
    middle.set_title("IoU with the final box", fontsize=10)
    scores = [softmax(logits[which])[label] for logits in [*(head["cls"] for head in p.heads), p.logits]]
    draw_bars(below, scores[::-1], [*names, "mean"][::-1], [*colours, MEAN][::-1])
    below.set_title(f"score of {p.classes[label]}", fontsize=10)


def tell_cascade(p):
    """Return the text about the cascade."""
    which, final = p.detect["rois"][p.returned], p.detect["resized"][p.returned]
    iou = [np.nan_to_num(pairwise_iou(rois[which], final).diagonal()).mean() for rois in p.rois]
    *rises, last = [f"{iou[0]:.2f} for the proposals"] + [
        f"{value:.2f} after head {stage}" for stage, value in enumerate(iou[1:])
    ]
    return (
        "A box that was moved once can be moved again: RoIAlign pools its features anew, and the next head sees more "
        "of the object and less of what is around it. Each head was trained on the boxes that the one before it "
        "leaves, and a box had to overlap an object more to count as a hit. So the first head is good at poor boxes "
        "and the last one at good boxes, where a single head has to be both. In the end each box has logits from every "
        "head. Their mean goes through one softmax, and that is its score. Shown are the detections that moved most: "
        "the proposal, the box that each head makes of it, and the score that each head alone would give. Over all "
        f"{len(which):,} detections, the mean IoU with the final box is {', '.join(rises)} and {last}."
    )


# ---------------------------------------------------------------------- PointRend


def draw_points(p, shown=3):
    """Draw the masks of a few detections as they grow, and the points that each step predicts anew."""
    names = ("enlarge", "most_uncertain", "sample", "sample_masks")
    functions = ", ".join(
        [networks_of(p, "mask"), networks_of(p, "point"), *(f"detectors.point_rend.{name}" for name in names)]
    )
    steps, coarse = p.stages("subdivide"), p.mask_heads[0]["mask"]
    if len(coarse) == 0:
        return empty_page(p.resized, "points", "Points: there is no detection", functions)
    k, s = coarse.shape[-1], steps[-1]["logits"].shape[-1]
    caption = f"Points: {k} x {k} scores become {s} x {s}, and {count_points(steps):,} points are predicted anew"
    which = largest(p, shown)
    width, height = np.maximum(p.detections.boxes[which, 2:] - p.detections.boxes[which, :2], 1).T
    heights = np.clip(height / width, 0.4, 1.2)  # of the rows, in widths of a column
    figure = new_figure(1.6 * heights.sum() + 1)
    axes = figure.subplots(len(which), len(steps) + 2, squeeze=False, height_ratios=heights)
    for row, i, aspect in zip(axes, which, height / width):
        draw_growth(row, p, steps, coarse[i, p.detections.labels[i]], i)
        for axis in row[:-1]:
            axis.set_aspect(aspect)
    for axis, stage in zip(axes[0, 1:], steps):
        (s, _), points = stage["logits"].shape[1:], stage["points"].shape[1]
        axis.set_title(f"{s} x {s}\n{points:,} points", fontsize=11)
    axes[0, 0].set_title(f"{k} x {k}\ncoarse", fontsize=11)
    axes[0, -1].set_title(f"pasted\n{named(p, which[0])}", fontsize=11)
    figure.colorbar(axes[0, 0].images[0], ax=axes, label="score", shrink=0.8, pad=0.01, panchor=False)
    return Page("points", caption, tell_points(p, steps, k), functions, figure)


def count_points(steps):
    """Return how many points of a mask all steps together predict."""
    return sum(stage["points"].shape[1] for stage in steps)


def draw_growth(axes, p, steps, coarse, which):
    """Draw the scores of a detection's mask, from coarse logits [k, k] on, with the points of each step, and pasted."""
    for axis, logits in zip(axes, [coarse, *(stage["logits"][which] for stage in steps)]):
        axis.imshow(sigmoid(logits), cmap=SCORES, vmin=0, vmax=1, extent=(0, 1, 1, 0))  # as points are given
        axis.set(xticks=[], yticks=[])
    for axis, stage in zip(axes[1:], steps):
        axis.plot(*stage["points"][which].T, ".", color=POINT, markersize=2, markeredgewidth=0)
    draw_pasted(axes[-1], p, which, named(p, which))


def tell_points(p, steps, k):
    """Return the text about the steps that make a mask of k x k logits finer."""
    settings, s = p.settings.points, steps[-1]["logits"].shape[-1]
    skipped = settings.steps - len(steps)
    text = (
        "Mask R-CNN stretches 28 x 28 cells over every box, large or small. On a large object each of them covers many "
        "pixels, and the outline is blurred. More cells for every box would be wasted: most of them are far inside the "
        "object or far outside it, and need no second look. So PointRend treats a mask as a picture that is rendered: "
        "coarse first, then finer, computed anew only where there is doubt. "
        f"The mask head gives {k} x {k} logits for each class; the label's are taken. Then a step doubles rows and "
        "columns, which two matrices do by interpolation: U @ mask @ U transposed. In the new mask it finds the "
        f"{settings.num_points:,} cells whose logits are nearest to zero, their scores nearest to one half, and "
        "predicts them anew. At the centre of each it reads the features of the finest level and the coarse logits of "
        "all classes. A small network, the same for every point, makes a logit of them, and that replaces the "
        "interpolated one. "
    )
    if skipped:
        which = "first step only doubles" if skipped == 1 else f"first {skipped} steps only double"
        text += f"The {which}, because the next one predicts all of its points anyway. "
    return text + (
        f"After {settings.steps} steps there are {s} x {s} = {s * s:,} cells, and the small network has answered for "
        f"{count_points(steps):,} points. Shown are the largest detections: the scores before and after each step that "
        "predicts, with its points as dots, which gather along the outline from step to step."
    )


# ---------------------------------------------------------------------- masks


def draw_masks(p, shown=3):
    """Draw the cells of a few masks, and how two matrices make pixels of them."""
    functions = ", ".join(
        [networks_of(p, "mask")] + [f"detectors.mask_rcnn.{name}" for name in ("paste_all", "paste", "pasting_matrix")]
    )
    d, _, m = p.paste["scores"].shape
    if d == 0:
        return empty_page(p.resized, "masks", "Masks: there is no detection", functions)
    caption = f"Masks: {m} x {m} scores for each of {d:,} boxes, pasted by two matrices"
    which = largest(p, shown)
    figure = new_figure(2.4 * len(which) + 0.5)
    axes = figure.subplots(len(which), 4, squeeze=False, width_ratios=(1, 1.3, 1.3, 1.6))
    for row, i in zip(axes, which):
        draw_pasting(row, p, i)
    # No score bar of figures.py: it moves what is narrow to the right.
    figure.colorbar(axes[0, 1].images[0], ax=axes, label="score", shrink=0.8, pad=0.01, panchor=False)
    return Page("masks", caption, tell_masks(p), functions, figure)


def cells_and_box(p, which):
    """Return the cells [s, s] of a detection's mask, and the box [4] that they are stretched over."""
    scores, boxes = p.paste["scores"][[which]], p.paste["boxes"][[which]]
    (cells,), (box,) = placed(scores, boxes, p.preprocess["scale_factor"], p.settings.masks)
    return cells, box


def named(p, which):
    """Return the class and the score of a detection as a text."""
    return f"{p.classes[p.detections.labels[which]]} {p.detections.scores[which]:.2f}"


def largest(p, count):
    """Return the largest of the detections that pages choose from, first of all one of each class."""
    boxes, labels = p.detections.boxes[p.shown], p.detections.labels[p.shown]
    by_size = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    first = np.sort(np.unique(labels[by_size], return_index=True)[1])
    return p.shown[by_size[list(dict.fromkeys([*first, *range(len(by_size))]))[:count]]]


def draw_pasting(axes, p, which):
    """Draw a detection's matrices around its cells, and what they make of them, over the picture."""
    (cells, (x1, y1, x2, y2)), (height, width) = cells_and_box(p, which), p.preprocess["original_size"]
    (_, weights_y), (_, weights_x) = (
        pasting_matrix(start, stop, len(cells), length) for start, stop, length in ((y1, y2, height), (x1, x2, width))
    )
    weights = {"cmap": "cividis", "aspect": "auto", "vmin": 0, "vmax": 1}
    rows, columns = len(weights_y), len(weights_x)
    axes[0].imshow(weights_y, **weights)
    axes[0].set_title(f"$W_y$: {rows} x {len(cells)}", fontsize=11)
    axes[0].set(xlabel="rows of cells", ylabel="rows of pixels")
    axes[1].imshow(cells, cmap=SCORES, vmin=0, vmax=1)
    axes[1].set_title(f"@ {len(cells)} x {len(cells)} cells", fontsize=11)
    axes[2].imshow(weights_x.T, **weights)
    axes[2].set_title(f"@ $W_x^T$: {len(cells)} x {columns}", fontsize=11)
    axes[2].set(xlabel="columns of pixels", ylabel="columns of cells")
    draw_pasted(axes[3], p, which, f"= {rows} x {columns} pixels\n{named(p, which)}")


def draw_pasted(axis, p, which, title):
    """Show the part of the picture under a detection's mask, tinted by the scores of its pixels, and the outline."""
    pasted, top, left = paste(*cells_and_box(p, which), p.preprocess["original_size"])
    rows, columns = pasted.shape
    part = np.s_[top : top + rows, left : left + columns]
    show(axis, p.image[part][..., ::-1], title)
    axis.imshow(pasted, cmap=SCORES, vmin=0, vmax=1, alpha=0.2 + 0.5 * pasted)
    mask = np.pad(rle.decode(p.detections.masks[which])[part], 1)
    if mask.any():
        axis.contour(np.arange(-1, columns + 1), np.arange(-1, rows + 1), mask, [0.5], colors="white")


def tell_masks(p):
    """Return the text about masks."""
    settings, heads, refined = p.settings.masks, len(p.mask_heads), p.stages("subdivide")
    s, (_, channels, m, _) = settings.rois.output_size, p.mask_heads[0]["mask"].shape
    classes = ", for each class; the label's are taken" if channels > 1 else ""
    seen = f"read at the centres of {s} x {s} bins" if refined else f"pooled into {s} x {s} bins"
    text = (
        f"The boxes are final now. The mask head sees their features, {seen}, and answers with a "
        f"logit for each of {m} x {m} cells{classes}. A sigmoid makes scores of them: how likely it is that the cell "
        "belongs to the object. "
    )
    if refined:
        m = p.paste["scores"].shape[-1]
        text += f"Before that, steps that double the cells and predict the uncertain ones anew make {m} x {m} of them. "
    if heads > 1:
        text += f"There are {heads} mask heads, which all see the same boxes: a cell's score is the mean of theirs. "
    if settings.bordered:
        text += "A border of zeros around the cells makes the scores fade at the edges of the box. "
    return text + (
        "Then the cells are stretched over the pixels of the box. It is RoIAlign the other way round: there a bin took "
        "from many cells, here many pixels take from few cells. A pixel takes from the four cells around its centre, "
        "and the nearest counts most, so again two matrix products do it: Wy @ cells @ Wx transposed. A row of Wy is a "
        f"row of pixels. Where the score is {settings.threshold:g} or more, the pixel is in the mask: the white "
        "outline. Shown are the largest detections."
    )
