"""Draw pictures of simple shapes and their COCO annotations, the same ones every time.

python ckpt/shapes/dataset.py                       the training and the held-out pictures, to ckpt/shapes/data
python ckpt/shapes/dataset.py --split val           the held-out pictures alone
python ckpt/shapes/dataset.py --seed 7 FILE.png     one picture from a seed of your own
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("circle", "triangle", "square", "star", "cross", "crescent")
SPLITS = {"train": range(0, 4000), "val": range(1_000_000, 1_000_300)}  # each picture is its seed
WIDTHS, HEIGHTS = (400, 520), (300, 400)  # of a picture, in pixels
SIZES = (12, 300)  # of a shape's longer side, in pixels
MIN_INSIDE = 0.6  # of a shape's box that the border leaves
MAX_COVERED = 0.35  # of the smaller one of two boxes
SUBPIXEL_BITS = 4  # of the coordinates that OpenCV draws with


def outline(name):
    """Return the corners [k, 2] of a shape within the unit circle."""
    if name == "crescent":
        outer, inner = np.linspace(0.2 * np.pi, 1.8 * np.pi, 48), np.linspace(1.72 * np.pi, 0.28 * np.pi, 40)
        inner_arc = np.stack([0.42 + 0.72 * np.cos(inner), 0.72 * np.sin(inner)], axis=1)
        return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), inner_arc])
    if name == "cross":
        a, b = 0.32, 0.95
        return np.float64(
            [(a, b), (a, a), (b, a), (b, -a), (a, -a), (a, -b), (-a, -b), (-a, -a), (-b, -a), (-b, a), (-a, a), (-a, b)]
        )
    corners = {"circle": 72, "triangle": 3, "square": 4, "star": 10}[name]
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.42, 1.0) if name == "star" else np.ones(corners)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def background(rng, height, width):
    """Return [height, width, 3] float: a gradient of two colours under a texture, both at random."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    first, second = rng.uniform(20, 235, (2, 3))
    picture = first + ramp[..., None] * (second - first)

    texture, strength = rng.choice(["clouds", "stripes", "checks", "none"]), rng.uniform(5, 22)
    if texture == "clouds":
        coarse = rng.standard_normal((rng.integers(4, 24), rng.integers(4, 24), 3))
        picture += strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    elif texture == "stripes":
        picture += strength * np.sin(rng.uniform(20, 160) * (x * np.sin(angle) + y * np.cos(angle)))[..., None]
    elif texture == "checks":
        cells = rng.integers(6, 30)
        picture += strength * ((np.floor(x * cells) + np.floor(y * cells)) % 2 - 0.5)[..., None]
    return picture


def place(rng, name, size, height, width):
    """Return the corners of a shape, rotated, stretched and somewhere in the picture."""
    angle, stretch = rng.uniform(0, 2 * np.pi), np.diag([1.0, rng.uniform(0.75, 1.0)])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = outline(name) @ stretch @ rotation.T
    corners *= size / np.ptp(corners, axis=0).max()
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    return corners - centre + rng.uniform(0, [width, height])


def visible_box(corners, thickness, height, width):
    """Return the tight box of the part of a shape that is inside the picture."""
    steps = np.linspace(0, 1, 256)[:, None, None]
    edges = (corners + steps * (np.roll(corners, -1, axis=0) - corners)).reshape(-1, 2)
    inside = edges[((edges >= 0) & (edges <= [width, height])).all(axis=1)]
    if len(inside) == 0:
        return np.zeros(4)
    box = np.concatenate([inside.min(axis=0) - thickness / 2, inside.max(axis=0) + thickness / 2])
    return np.clip(box, 0, [width, height, width, height])


def area(boxes):
    """Return the areas of boxes [..., 4]."""
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def covers_too_much(box, others):
    """Tell whether a box shares too much of its area, or of another one's, with one of the others."""
    others = np.array(others).reshape(-1, 4)
    shared = np.concatenate([np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])], axis=1)
    return (area(shared) > MAX_COVERED * np.minimum(area(box), area(others))).any()


def fixed_point(corners):
    """Return corners as OpenCV draws them: integers with SUBPIXEL_BITS after the point."""
    return np.round(corners * 2**SUBPIXEL_BITS).astype(np.int32)


def draw(rng, picture, corners, thickness):
    """Draw one shape, filled if its lines have no thickness, in a colour that stands out from what is below."""
    height, width = picture.shape[:2]
    x, y = np.clip(corners.mean(axis=0), 0, [width - 1, height - 1]).astype(int)
    below = picture[y, x].astype(float)
    colour = rng.uniform(0, 255, 3)
    while np.abs(colour - below).max() < 90:
        colour = rng.uniform(0, 255, 3)
    points = fixed_point(corners)
    if thickness:
        cv2.polylines(picture, [points], True, colour.tolist(), thickness, cv2.LINE_AA, SUBPIXEL_BITS)
    else:
        cv2.fillPoly(picture, [points], colour.tolist(), cv2.LINE_AA, SUBPIXEL_BITS)


def visible_masks(shapes, height, width):
    """Return masks [n, height, width] bool of shapes (corners, thickness): what no later shape covers.

    A shape that is drawn as a line has all that the line encloses, and the line itself.
    """
    topmost = np.zeros((height, width), np.uint8)  # the number of the shape that is seen at each pixel, 0 for none
    for number, (corners, thickness) in enumerate(shapes, start=1):
        points = fixed_point(corners)
        cv2.fillPoly(topmost, [points], number, cv2.LINE_8, SUBPIXEL_BITS)
        if thickness:
            cv2.polylines(topmost, [points], True, number, thickness, cv2.LINE_8, SUBPIXEL_BITS)
    return topmost == np.arange(1, len(shapes) + 1)[:, None, None]


def draw_scene(seed):
    """Return what draw_picture does, and masks [n, h, w] bool of the parts of the shapes that are seen."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(*HEIGHTS)), int(rng.integers(*WIDTHS))
    picture = np.clip(background(rng, height, width), 0, 255).astype(np.uint8)
    boxes, labels, shapes = [], [], []
    for _ in range(rng.integers(4, 14)):
        label = int(rng.integers(len(CLASSES)))
        size = np.exp(rng.uniform(*np.log(SIZES)))
        thickness = 0 if rng.random() < 0.6 else max(2, round(size * rng.uniform(0.04, 0.1)))
        for _ in range(20):  # tries to find it a place
            corners = place(rng, CLASSES[label], size, height, width)
            box = visible_box(corners, thickness, height, width)
            if area(box) >= MIN_INSIDE * np.ptp(corners, axis=0).prod() and not covers_too_much(box, boxes):
                draw(rng, picture, corners, thickness)
                boxes.append(box)
                labels.append(label)
                shapes.append((corners, thickness))
                break
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(0, 8)
    picture = np.clip(picture + noise, 0, 255).astype(np.uint8)
    return picture, np.array(boxes), np.array(labels), visible_masks(shapes, height, width)


def draw_picture(seed):
    """Return a picture [h, w, 3] uint8 BGR, boxes [n, 4] as x1, y1, x2, y2 in pixels, and labels [n]."""
    return draw_scene(seed)[:3]


def run_lengths(mask):
    """Return a mask [h, w] bool as COCO's compressed run-length encoding."""
    import pycocotools.mask  # here, because pictures can be drawn without it

    encoded = pycocotools.mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def write_split(folder, name):
    """Write the pictures and the COCO annotations of one split below the folder."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for seed in SPLITS[name]:
        picture, boxes, labels, masks = draw_scene(seed)
        cv2.imwrite(str(folder / name / f"{seed}.png"), picture)
        images.append({"id": seed, "file_name": f"{seed}.png", "height": picture.shape[0], "width": picture.shape[1]})
        for (x1, y1, x2, y2), label, mask in zip(boxes.round(2).tolist(), labels.tolist(), masks):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),  # the box's, not the mask's
                    "segmentation": run_lengths(mask),
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))


def main(arguments=None):
    """Read the command line and write what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="one picture, with --seed")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--split", choices=list(SPLITS), help="draw only this one")
    args = parser.parse_args(arguments)
    if (args.file is None) != (args.seed is None):
        parser.error("a seed and a file go together")
    if args.file:
        cv2.imwrite(args.file, draw_picture(args.seed)[0])
        return
    for name in [args.split] if args.split else SPLITS:
        write_split(Path(__file__).parent / "data", name)


if __name__ == "__main__":
    main()
