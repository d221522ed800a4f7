"""The pages of explain.py for what Faster R-CNN's relatives add: the heads of a cascade, and masks."""

import numpy as np

from detectors import rle
from detectors.mask_rcnn import paste, pasting_matrix, with_border
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
from postprocess import pairwise_iou, softmax

PROPOSAL, MEAN = "#777777", "#000000"  # colours beside those of the heads


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


# ---------------------------------------------------------------------- masks


def draw_masks(p, shown=3):
    """Draw the cells of a few masks, and how two matrices make pixels of them."""
    functions = ", ".join(
        [networks_of(p, "mask")] + [f"detectors.mask_rcnn.{name}" for name in ("paste_all", "paste", "pasting_matrix")]
    )
    cells, boxes = cells_and_boxes(p)
    m = p.paste["scores"].shape[-1]
    if len(boxes) == 0:
        return empty_page(p.resized, "masks", "Masks: there is no detection", functions)
    caption = f"Masks: {m} x {m} scores for each of {len(boxes):,} boxes, pasted by two matrices"
    which = largest(p, shown)
    figure = new_figure(2.4 * len(which) + 0.5)
    axes = figure.subplots(len(which), 4, squeeze=False, width_ratios=(1, 1.3, 1.3, 1.6))
    for row, i in zip(axes, which):
        draw_pasting(row, p, cells[i], boxes[i], i)
    # No score bar of figures.py: it moves what is narrow to the right.
    figure.colorbar(axes[0, 1].images[0], ax=axes, label="score", shrink=0.8, pad=0.01, panchor=False)
    return Page("masks", caption, tell_masks(p), functions, figure)


def cells_and_boxes(p):
    """Return the cells [d, s, s] of the detections' masks, and the boxes [d, 4] that they are stretched over."""
    cells, factor = p.paste["scores"], np.float32(p.preprocess["scale_factor"])
    boxes = p.paste["boxes"] * factor / factor  # as paste_all rounds them
    return with_border(cells, boxes) if p.settings.masks.bordered else (cells, boxes)


def largest(p, count):
    """Return the largest of the detections that pages choose from, first of all one of each class."""
    boxes, labels = p.detections.boxes[p.shown], p.detections.labels[p.shown]
    by_size = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    first = np.sort(np.unique(labels[by_size], return_index=True)[1])
    return p.shown[by_size[list(dict.fromkeys([*first, *range(len(by_size))]))[:count]]]


def draw_pasting(axes, p, cells, box, which):
    """Draw a detection's matrices around its cells, and what they make of them, over the picture."""
    (x1, y1, x2, y2), (height, width) = box, p.preprocess["original_size"]
    pasted, top, left = paste(cells, box, (height, width))
    rows, columns = pasted.shape
    (_, weights_y), (_, weights_x) = (
        pasting_matrix(start, stop, len(cells), length) for start, stop, length in ((y1, y2, height), (x1, x2, width))
    )
    weights = {"cmap": "cividis", "aspect": "auto", "vmin": 0, "vmax": 1}
    axes[0].imshow(weights_y, **weights)
    axes[0].set_title(f"$W_y$: {rows} x {len(cells)}", fontsize=11)
    axes[0].set(xlabel="rows of cells", ylabel="rows of pixels")
    axes[1].imshow(cells, cmap=SCORES, vmin=0, vmax=1)
    axes[1].set_title(f"@ {len(cells)} x {len(cells)} cells", fontsize=11)
    axes[2].imshow(weights_x.T, **weights)
    axes[2].set_title(f"@ $W_x^T$: {len(cells)} x {columns}", fontsize=11)
    axes[2].set(xlabel="columns of pixels", ylabel="columns of cells")
    part = np.s_[top : top + rows, left : left + columns]
    name, score = p.classes[p.detections.labels[which]], p.detections.scores[which]
    show(axes[3], p.image[part][..., ::-1], f"= {rows} x {columns} pixels\n{name} {score:.2f}")
    axes[3].imshow(pasted, cmap=SCORES, vmin=0, vmax=1, alpha=0.2 + 0.5 * pasted)
    mask = np.pad(rle.decode(p.detections.masks[which])[part], 1)
    if mask.any():
        axes[3].contour(np.arange(-1, columns + 1), np.arange(-1, rows + 1), mask, [0.5], colors="white")


def tell_masks(p):
    """Return the text about masks."""
    settings, heads, refined = p.settings.masks, len(p.mask_heads), p.stages("subdivide")
    s, (_, channels, m, _) = settings.rois.output_size, p.mask_heads[0]["mask"].shape
    classes = ", for each class; the label's are taken" if channels > 1 else ""
    text = (
        f"The boxes are final now. The mask head sees their features, pooled into {s} x {s} bins, and answers with a "
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
