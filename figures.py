"""What the pages of explain.py are made with: figures, pictures, boxes, bars."""

from typing import NamedTuple

import numpy as np

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


class Page(NamedTuple):
    """One step of the explanation."""

    name: str
    caption: str  # one line, in the picture
    text: str  # for index.html
    functions: str
    figure: object


def numbered(page, number):
    """Return a page with its number: in its name, in its caption, and in its figure, which shows the caption."""
    caption = f"{number}  {page.caption}"
    page.figure.suptitle(caption, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return page._replace(name=f"{number}_{page.name}", caption=caption)


def new_figure(height):
    """Return an empty figure, so many inches high."""
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def panel_height(picture, columns, rows=1):
    """Return the height in inches of a figure with so many pictures side by side."""
    height, width = picture.shape[:2]
    return np.clip(WIDTH / columns * height / width, 1.6, 7) * rows + 0.4 + 0.25 * rows


def show(axis, picture, title="", fade=0.0):
    """Show a picture [h, w, 3], faded towards white, without ticks."""
    height, width = picture.shape[:2]
    axis.imshow((picture * (1 - fade) + 255 * fade).astype(np.uint8))
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), autoscale_on=False)
    axis.set_title(title, fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])


def listed(values):
    """Return numbers as a text: "0.5, 1 and 2"."""
    texts = [f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:g}" for value in values]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def level_names(number):
    """Return the names of so many levels as a text."""
    return "level 0" if number == 1 else f"levels 0 to {number - 1}"


def level_panels(p, fade):
    """Return a figure with the resized picture once for each level, and the levels' axes."""
    levels = len(p.strides)
    columns = min(levels, 3)
    rows = -(-levels // columns)
    figure = new_figure(panel_height(p.resized, columns, rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[levels:]:
        axis.axis("off")
    for axis in axes[:levels]:
        show(axis, p.resized, fade=fade)
    return figure, axes[:levels]


def extent_of(anchors, stride):
    """Return left, right, bottom and top of a map whose cells lie around the centres of their anchors [h, w, a, 4]."""
    first, last = (anchors[i, i, 0].reshape(2, 2).mean(axis=0) for i in (0, -1))
    cells = np.array(anchors.shape[1::-1])
    half = np.where(cells > 1, (last - first) / np.maximum(cells - 1, 1), stride) / 2
    (left, top), (right, bottom) = first - half, last + half
    return left, right, bottom, top


def draw_some_anchors(axis, p, level):
    """Draw the anchors of three cells of a level."""
    (height, width), (map_height, map_width) = p.resized.shape[:2], p.anchors[level].shape[:2]
    stride = p.strides[level]
    for part in (0.2, 0.5, 0.8):
        y = min(int(min(height / stride, map_height) / 2), map_height - 1)
        x = min(int(width / stride * part), map_width - 1)
        anchors = p.anchors[level][y, x]
        draw_boxes(axis, anchors, PALETTE[level % len(PALETTE)])
        axis.plot(*((anchors[0, :2] + anchors[0, 2:]) / 2), "+", color="black", ms=6)
    axis.set(xlim=(-0.3 * width, 1.3 * width), ylim=(1.3 * height, -0.3 * height))


def draw_maps(p, maps, label):
    """Return a figure with a map of scores [h, w] for each level, over the picture."""
    figure, axes = level_panels(p, fade=0.3)
    for level, (axis, scores) in enumerate(zip(axes, maps)):
        axis.set_title(f"level {level}, stride {p.strides[level]:g}: best {scores.max():.2f}", fontsize=11)
        extent = extent_of(p.anchors[level], p.strides[level])
        alpha = 0.2 + 0.7 * scores  # where there is nothing the picture shows
        axis.imshow(scores, cmap=SCORES, vmin=0, vmax=1, alpha=alpha, extent=extent, interpolation="nearest")
        axis.set(xlim=(-0.5, p.resized.shape[1] - 0.5), ylim=(p.resized.shape[0] - 0.5, -0.5))
    add_score_bar(figure, list(axes), label)
    return figure


def draw_before_and_after(picture, boxes, stage, after, shown, label="objectness"):
    """Return a figure with the best boxes of each level before and after NMS.

    boxes [n, 4], of which `after` go on; stage: what was recorded, with their scores, levels, and which NMS kept.
    """
    scores, levels, kept = stage["scores"], stage["levels"], stage["kept"]
    figure = new_figure(panel_height(picture, 2))
    left, right = axes = figure.subplots(1, 2)
    drawn = [np.flatnonzero(levels == level) for level in range(max(levels, default=-1) + 1)]
    drawn = [here[np.argsort(-scores[here], kind="stable")][:shown] for here in drawn]
    drawn = np.concatenate([*drawn, np.zeros(0, int)])
    drawn = drawn[np.argsort(scores[drawn], kind="stable")]  # the best on top
    go_on, left_behind = (drawn[np.isin(drawn, part)] for part in (kept[:after], kept[after:]))
    for axis, which, style in ((left, drawn, "solid"), (right, left_behind, "dotted"), (right, go_on, "solid")):
        if not axis.images:
            show(axis, picture, fade=0.5)
        draw_boxes(axis, boxes[which], colours_of_scores(scores[which]), 1, style)
    left.set_title(f"the best {shown} of each level: {len(drawn):,} boxes", fontsize=11)
    dotted = f" ({len(left_behind)} of them, dotted, do not go on)" if len(left_behind) else ""
    right.set_title(f"NMS keeps {len(go_on) + len(left_behind):,} of them{dotted}", fontsize=11)
    add_score_bar(figure, list(axes), label)
    return figure


def draw_zoom(axis, picture, boxes, title):
    """Show the part of a picture around boxes [n, 4]."""
    height, width = picture.shape[:2]
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    margin = 0.2 * max(*(high - low), 4)
    show(axis, picture, title, fade=0.2)
    axis.set_xlim(max(low[0] - margin, 0) - 0.5, min(high[0] + margin, width) - 0.5)
    axis.set_ylim(min(high[1] + margin, height) - 0.5, max(low[1] - margin, 0) - 0.5)


def draw_boxes(axis, boxes, colours, width=1.5, style="solid"):
    """Draw boxes [n, 4]; colours: one, or n."""
    if len(boxes):
        x1, y1, x2, y2 = np.asarray(boxes).T
        corners = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 4, 2)
        axis.add_collection(PolyCollection(corners, facecolors="none", edgecolors=colours, linewidths=width,
                                           linestyles=style))  # fmt: skip


def draw_bars(axis, values, names, colours):
    """Draw values from 0 to 1 as bars, the first one at the bottom, with their names and the values as numbers."""
    axis.barh(range(len(values)), values, color=colours)
    axis.set_yticks(range(len(values)), names, fontsize=9)
    for row, value in enumerate(values):
        axis.text(value + 0.02, row, f"{value:.2f}", va="center", fontsize=9)
    axis.set_xlim(0, 1.3)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


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


def empty_page(picture, name, caption, functions):
    """Return a page that says that there is nothing to see in a picture."""
    figure = new_figure(panel_height(picture, 1.6))
    axis = figure.subplots()
    show(axis, picture, fade=0.7)
    nothing(axis, "nothing to see here in this picture")
    return Page(name, caption, "In this picture nothing gets this far.", functions, figure)
