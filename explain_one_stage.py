"""The pages of explain.py for one-stage detectors: where they look, what they see there, and what NMS leaves of it."""

import numpy as np

from detectors.paa import PAA
from figures import (
    PALETTE,
    SCORES,
    Page,
    add_score_bar,
    colours_of_scores,
    draw_before_and_after,
    draw_boxes,
    draw_maps,
    draw_some_anchors,
    level_names,
    level_panels,
    listed,
    new_figure,
    panel_height,
    show,
)
from postprocess import grid_anchors, map_stride, sigmoid, softmax


def maps_of_one_stage(p):
    """Return the stride, the anchors [h, w, a, 4] and the best score of every cell [h, w], level by level.

    Where there are no anchors, a square of one stride stands for a point.
    """
    settings, head = p.settings, p.settings.head
    counts = p.detector.priors(settings)
    logits = [p.model[f"cls_{level}"][0] for level in range(len(counts))]
    sizes = [level.shape[1:] for level in logits]
    anchors, scores = [], []
    for level, (a, values) in enumerate(zip(counts, logits)):
        stride, base = places(settings, level, sizes)
        anchors.append(grid_anchors(base, sizes[level], stride).reshape(*sizes[level], a, 4))
        values = values.reshape(a, len(values) // a, -1)
        best = softmax(values.transpose(0, 2, 1))[..., :-1].max(axis=2) if head.softmax else sigmoid(values.max(axis=1))
        if head.factor:
            best = best * sigmoid(p.model[f"{head.factor}_{level}"][0].reshape(a, -1))
            best = np.sqrt(best) if head.combined == "root" else best
        scores.append(best.max(axis=0).reshape(sizes[level]))
    return (settings.anchors if has_anchors(p) else settings.points).strides, anchors, scores


def places(settings, level, sizes):
    """Return the stride of a level, and the boxes [a, 4] of its first cell."""
    if hasattr(settings, "anchors"):
        return map_stride(level, sizes, settings.anchors), np.float32(settings.anchors.boxes[level])
    points = settings.points
    stride = np.broadcast_to(np.float32(map_stride(level, sizes, points)), 4)
    return stride, (np.float32([[-0.5, -0.5, 0.5, 0.5]]) + np.float32(points.offset)) * stride


def has_anchors(p):
    """Return whether a cell has anchors, and not just a point."""
    return hasattr(p.settings, "anchors")


def draw_priors(p):
    """Draw what three cells of each level predict from, to scale."""
    counts = [anchors[..., 0].size for anchors in p.anchors]
    kind = "anchors" if has_anchors(p) else "points"
    figure, axes = level_panels(p, fade=0.55)
    height, width = p.resized.shape[:2]
    for level, axis in enumerate(axes):
        map_height, map_width = p.anchors[level].shape[:2]
        axis.set_title(f"level {level}, stride {p.strides[level]:g}: {map_width} x {map_height} cells", fontsize=11)
        if has_anchors(p):
            draw_some_anchors(axis, p, level)
        else:
            centers = (p.anchors[level][..., :2] + p.anchors[level][..., 2:]).reshape(-1, 2) / 2
            axis.plot(*centers.T, ".", color=PALETTE[level % len(PALETTE)], ms=max(1.5, min(p.strides[level] / 8, 8)))
    if has_anchors(p):
        caption = f"Anchors: {sum(counts):,} boxes of fixed sizes"
        text = (
            "The detector looks for objects from anchors: boxes that are the same for every picture of this size. "
            f"There are {listed(counts)} on {level_names(len(counts))}. Each panel shows the anchors of three cells, "
            "with a cross in their centre. "
        )
    else:
        caption = f"Points: {sum(counts):,} places from which boxes are measured"
        text = (
            "The detector has no anchors. Each cell has a point, and if an object is there, the network says how far "
            f"it is from the point to the four sides of its box. There are {listed(counts)} points on "
            f"{level_names(len(counts))}. "
        )
    text += "Faster R-CNN starts in the same way, but it has a second network; here, everything is decided at once."
    return Page(kind, caption, text, f"{module_of(p)}.decode, postprocess.grid_anchors", figure)


def module_of(p):
    """Return where a detector's class is, as a name."""
    return f"{type(p.detector).__module__}.{type(p.detector).__name__}"


def draw_scores(p):
    """Draw the best score of each cell over the picture, level by level."""
    best = max(scores.max() for scores in p.scores)
    figure = draw_maps(p, p.scores, "best score of all classes")
    return Page("scores", f"Scores: how sure the network is of the best class at a cell (best {best:.2f})",
                tell_scores(p), "model.onnx, detectors.one_stage.best_candidates", figure)  # fmt: skip


def tell_scores(p):
    """Return the text about scores."""
    head = p.settings.head
    function = "a sigmoid of its own" if not head.softmax else "a softmax over all classes and the background"
    text = (
        f"For every cell the network predicts a logit for each of {len(p.detector.classes):,} classes, which "
        f"{function} turns into a score. "
    )
    if head.factor:
        text += f"It also predicts another map, {head.factor}, whose sigmoid the scores are multiplied by"
        text += ", and the root of the product is taken. " if head.combined == "root" else ". "
    return text + (
        "A cell has the colour of its best class. Small objects light up on the fine levels, large ones on the coarse "
        "levels."
    )


def draw_candidates(p, shown=60):
    """Draw the best boxes of each level, and what NMS keeps of them."""
    stage = p.detect
    before, kept, after = len(stage["candidates"]), len(stage["kept"]), len(p.detections.boxes)
    caption = f"Candidates: {before:,}, of which NMS keeps {kept:,}; {after:,} returned"
    figure = draw_before_and_after(p.resized, stage["resized"], stage, after, shown, "score")
    counts = np.bincount(stage["levels"], minlength=len(p.strides)).tolist()
    text = (
        f"{tell_choice(p)} That makes {listed(counts)} on {level_names(len(counts))}. Neighbouring cells see the same "
        "object, so boxes crowd around it, and NMS keeps the best one of each class. Drawn are the best boxes of each "
        "level before and after it."
    )
    functions = f"detectors.one_stage.best_candidates, {module_of(p)}.decode, detectors.one_stage.suppress"
    return Page("candidates", caption, text, functions, figure)


def tell_choice(p):
    """Return the text about which answers of the network are candidates."""
    head, prior = p.settings.head, "anchor" if has_anchors(p) else "point"
    which = f"{'The best class' if head.one_class else 'A class'} of {'an' if has_anchors(p) else 'a'} {prior}"
    most = "all of them get a box"
    if head.nms_pre_per_class is not None:
        most = f"the best {head.nms_pre_per_class:,} of each class get a box"
    elif head.nms_pre > 0:
        what = f" {prior}s, with all their classes," if isinstance(p.detector, PAA) else ""
        most = f"on each level, the best {head.nms_pre:,}{what} get a box"
    return f"{which} is a candidate if its score is above {head.score_threshold:g}; {most}."


# ---------------------------------------------------------------------- without priors


def draw_heat(p):
    """Draw CenterNet's heat, of each cell that of its best class, and the peaks."""
    heat, peaks = p.model["heatmap"][0].max(axis=0), len(p.detect["kept"])
    (height, width), (map_height, map_width) = p.seen.shape[:2], heat.shape
    figure = new_figure(panel_height(p.seen, 1.15))
    axis = figure.subplots()
    show(axis, p.seen, fade=0.3)
    axis.imshow(heat, cmap=SCORES, vmin=0, vmax=1, alpha=0.2 + 0.7 * heat, extent=(0, width, height, 0),
                interpolation="nearest")  # fmt: skip
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    boxes = p.detect["resized"] + np.tile(p.preprocess["offset"], 2)
    axis.plot(*((boxes[:, :2] + boxes[:, 2:]) / 2).T, "+", color="white", ms=6, mew=1)
    add_score_bar(figure, [axis], "heat of the best class")
    text = (
        f"An object is a point: the centre of its box. The network draws a map of heat for each of "
        f"{len(p.detector.classes):,} classes, {map_width} x {map_height} cells. A cell that is at least as hot as the "
        f"eight around it is a peak. A cross stands in the cell of each of the best {peaks:,}, where the network says "
        "that the centre is."
    )
    caption = f"Heat: {map_width} x {map_height} cells, {peaks:,} peaks, the hottest {heat.max():.2f}"
    return Page("heat", caption, text, "model.onnx, detectors.center_net.largest_around", figure)


def draw_peaks(p):
    """Draw the boxes of CenterNet's peaks."""
    text = (
        "Two more maps are read where the peaks are: how large the box is, and where in the cell its centre. The "
        "neighbours of a peak are no peaks, so one object is found once, and no NMS follows."
    )
    return Page("boxes", f"Boxes: one around each of {len(p.detect['kept']):,} peaks", text,
                "detectors.center_net.best_peaks", draw_answers(p))  # fmt: skip


def draw_queries(p):
    """Draw the boxes with which DETR's queries answer."""
    scores, queries = p.detect["scores"], len(p.detect["scores"])
    text = (
        f"{queries:,} learned queries ask a transformer that has read the whole picture. Each answers with a box, and "
        'with a class or with "no object". They were trained to answer with different objects, so no NMS follows. A '
        "box has the colour of its query's best class; that of most queries is nearly zero, because they found no "
        "object."
    )
    caption = f"Queries: {queries:,} answers, the best score {scores.max(initial=0):.2f}"
    return Page("queries", caption, text, "model.onnx, detectors.detr.answers", draw_answers(p))


def draw_answers(p):
    """Return a figure with the boxes of all answers, the best on top."""
    order = np.argsort(p.detect["scores"], kind="stable")
    figure = new_figure(panel_height(p.resized, 1.15))
    axis = figure.subplots()
    show(axis, p.resized, fade=0.5)
    draw_boxes(axis, p.detect["resized"][order], colours_of_scores(p.detect["scores"][order]))
    add_score_bar(figure, [axis], "score")
    return figure
