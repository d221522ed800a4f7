"""pictures.py: files are found, read, numbered, drawn and written; each function by itself."""

import json
import os
import stat

import cv2
import numpy as np
import pytest
from conftest import MMDETECTION, ROOT
from PIL import Image

import pictures
from detectors import Detections, rle

PICTURE = ROOT / "asset" / "shapes.png"

# ------------------------------------------------------------------ find


def fill(folder, *names):
    """Write empty files; return their paths as find_pictures does."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def test_what_is_taken_from_a_folder(tmp_path):
    expected = fill(tmp_path, "a.PNG", "b.jpg", "c.jpeg", "d.tif", "e.tiff", "f.webp", "g.bmp")
    fill(tmp_path, "text.txt", "no suffix", "folder.png/in it.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert pictures.find_pictures([str(tmp_path)]) == (expected, [])


def test_a_broken_link_is_found_so_that_it_is_told(tmp_path):
    (tmp_path / "link.png").symlink_to("nowhere")
    assert pictures.find_pictures([str(tmp_path)]) == ([str(tmp_path / "link.png")], [])


def test_a_quoted_glob_finds_what_the_unquoted_does(tmp_path):
    files = fill(tmp_path, "cam1/a.png", "cam2/b.png", "loose.png")
    fill(tmp_path, "empty/text.txt", ".hidden/c.png")
    os.mkfifo(tmp_path / "pipe")
    unquoted = sorted(str(path) for path in tmp_path.iterdir() if not path.name.startswith("."))
    quoted = pictures.find_pictures([str(tmp_path / "*")])
    assert quoted == pictures.find_pictures(unquoted)
    assert quoted == (
        files,
        [f"{tmp_path / 'empty'}: no pictures in this folder", f"{tmp_path / 'pipe'}: not a regular file"],
    )
    assert pictures.find_pictures([str(tmp_path / "cam*")]) == (files[:2], [])
    assert pictures.find_pictures([str(tmp_path / "**" / "?.png")]) == (files[:2], [])


def test_every_file_is_taken_once_and_in_order(tmp_path):
    b, a = fill(tmp_path, "b.png", "a.png")
    (tmp_path / "link.png").symlink_to(a)
    files, problems = pictures.find_pictures([b, str(tmp_path / "*.png"), str(tmp_path / "x.png"), a, b])
    assert files == [b, a]
    assert problems == [f"{tmp_path / 'x.png'}: no such file"]


def test_a_name_with_brackets_is_a_name_first(tmp_path):
    brackets, _ = fill(tmp_path, "[x].png", "x.png")
    assert pictures.find_pictures([brackets]) == ([brackets], [])


# ------------------------------------------------------------------ read


def test_pipes_are_not_read(tmp_path):
    """Reading one would wait for somebody to write; so would looking whether it is an annotated picture."""
    os.mkfifo(tmp_path / "pipe.png")
    writer = os.open(tmp_path / "pipe.png", os.O_RDWR)  # so that a fault ends in a failure, not in waiting
    os.write(writer, pictures.annotated_png(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(ValueError, match="not a regular file"):
        pictures.read_picture(tmp_path / "pipe.png")
    assert not pictures.is_annotated(tmp_path / "pipe.png")
    os.close(writer)


def colour_modes(folder):
    """Write a picture in every mode that is not plain RGB; return the paths."""
    picture = Image.open(PICTURE).convert("RGB").resize((120, 80))
    modes = {"grey.png": "L", "grey_alpha.png": "LA", "rgba.png": "RGBA", "palette.png": "P", "cmyk.jpg": "CMYK"}
    for name, mode in modes.items():
        picture.convert(mode).save(folder / name)
    cv2.imwrite(str(folder / "16_bit.png"), np.asarray(picture).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90)])
    picture.save(folder / "animated.webp", save_all=True, append_images=[picture.rotate(90)], lossless=True)
    return sorted(folder.iterdir())


def test_every_kind_of_picture_is_read_as_mmdetection_reads_it(tmp_path):
    pytest.importorskip("mmdet", reason=MMDETECTION)
    from mmdet.datasets.pipelines import LoadImageFromFile

    for path in colour_modes(tmp_path):
        expected = LoadImageFromFile()({"img_info": {"filename": str(path)}, "img_prefix": None})["img"]
        np.testing.assert_array_equal(pictures.read_picture(path), expected, err_msg=path.name)


def test_every_kind_of_picture_is_bgr_and_upright(tmp_path):
    upright = Image.open(PICTURE).convert("RGB").resize((120, 80))
    for path in colour_modes(tmp_path):
        image = pictures.read_picture(path)
        assert image.dtype == np.uint8
        assert image.shape == ((120, 80, 3) if path.name == "turned.jpg" else (80, 120, 3)), path.name
        if path.name in ("16_bit.png", "rgba.png", "animated.webp"):  # those without loss
            rgb = image if path.name == "16_bit.png" else image[..., ::-1]  # written from RGB as if it were BGR
            np.testing.assert_array_equal(rgb, np.asarray(upright), err_msg=path.name)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("files", "ids", "names"),
    [
        (["in/000000000139.png", "in/000000000285.jpg"], [139, 285], ["000000000139.png", "000000000285.jpg"]),
        (["in/cam1/0001.png", "in/cam2/0001.png"], [1, 2], ["cam1/0001.png", "cam2/0001.png"]),
        (["in/cam1/7.png", "in/cam1/0007.png"], [1, 2], ["7.png", "0007.png"]),
        (["in/x.png", "in/x.jpg"], [1, 2], ["x.png", "x.jpg"]),
        (["in/5.png", "in/x.png"], [1, 2], ["5.png", "x.png"]),
        (["in/cam1/5.png", "in/6.png"], [5, 6], ["cam1/5.png", "6.png"]),
        (["in/\u00b2.png"], [1], ["\u00b2.png"]),  # a digit, but no decimal one
        (["in/only.png"], [1], ["only.png"]),
    ],
)
def test_ids_and_file_names(monkeypatch, tmp_path, files, ids, names):
    expected = [{"id": i, "file_name": name} for i, name in zip(ids, names)]
    assert pictures.coco_images([str(tmp_path / file) for file in files]) == expected
    monkeypatch.chdir(tmp_path)
    assert pictures.coco_images(files) == expected


# ------------------------------------------------------------------ draw


@pytest.mark.parametrize("size", [(400, 600), (40, 60), (1500, 2000)])
def test_labels_are_never_cut_off(size):
    """The patch below a label is drawn whole wherever the box is: it covers as many pixels as in the middle."""
    height, width = size
    blank = np.full((*size, 3), 7, np.uint8)
    places = [(width / 3, height / 2), (0, 0), (width, 0), (0, height), (width, height), (-50, -50), (width + 50, 10)]
    areas = []
    for x, y in places:
        image = blank.copy()
        pictures.draw_label(image, np.float32([x, y, x + 5, y + 5]), "crescent 0.97", (0, 200, 255))
        areas.append((image != blank).any(axis=2).sum())
    assert areas[0] > 50
    assert len(set(areas)) == 1


def test_neighbouring_classes_have_different_colours():
    colours = np.int64([pictures.colour_of(label) for label in range(80)])
    assert np.abs(colours[1:] - colours[:-1]).max(axis=1).min() > 60
    assert len({tuple(colour) for colour in colours}) > 60


def test_names_that_opencv_cannot_draw_become_numbers():
    image = np.full((100, 150, 3), 7, np.uint8)
    found = Detections(np.float32([[20, 40, 90, 80]]), np.float32([0.9]), np.int64([1]))
    drawn = pictures.draw(image, found, ["circle", "\u4e09\u89d2\u5f62"])
    assert (drawn != image).any()
    np.testing.assert_array_equal(drawn, pictures.draw(image, found, ["", "class 2"]))
    assert (drawn != pictures.draw(image, found, ["", "???"])).any()


def two_with_masks():
    """Return two Detections with masks in a picture of 60 x 90: a square with a hole, and a part of it."""
    square, part = np.zeros((2, 60, 90), bool)
    square[10:50, 20:60], square[25:35, 35:45], part[40:50, 20:30] = True, False, True
    masks = np.array([rle.encode(mask, mask.shape) for mask in (square, part)], object)
    boxes = np.float32([[20, 10, 60, 50], [20, 40, 30, 50]])
    return square, part, Detections(boxes, np.float32([0.9, 0.6]), np.int64([0, 1]), masks)


def test_masks_are_tinted_and_outlined():
    square, part, found = two_with_masks()
    image = np.full((60, 90, 3), 200, np.uint8)
    drawn = pictures.draw(image, found.where([0]), ["a", "b"])
    colour = np.array(pictures.colour_of(0))
    np.testing.assert_array_equal(drawn[30, 25], 200 // 2 + colour // 2)  # inside the mask
    np.testing.assert_array_equal(drawn[30, 40], image[30, 40])  # in its hole
    np.testing.assert_array_equal(drawn[25, 34], colour)  # on the outline of the hole
    assert (image == 200).all()
    twice = pictures.draw(image, found, ["a", "b"])
    np.testing.assert_array_equal(twice[45, 22], (200 // 2 + np.array(pictures.colour_of(1)) // 2) // 2 + colour // 2)


def test_results_have_masks_that_pycocotools_reads():
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools: uv run --extra test pytest")
    square, part, found = two_with_masks()
    results = json.loads(json.dumps(pictures.coco_results(found, {"id": 3, "file_name": "x"}, ["a", "b"], [1, 2])))
    for result, mask in zip(results, (square, part)):
        np.testing.assert_array_equal(coco.decode(result["segmentation"]), mask)
    without = pictures.coco_results(found._replace(masks=None), {"id": 3, "file_name": "x"}, ["a", "b"], [1, 2])
    assert not any("segmentation" in result for result in without)


# ------------------------------------------------------------------ write


def test_annotated_pictures_are_known_again_and_are_pngs(tmp_path):
    image = cv2.imread(str(PICTURE))[:50, :60]
    (tmp_path / "plain.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    (tmp_path / "annotated.png").write_bytes(pictures.annotated_png(image))
    assert not pictures.is_annotated(tmp_path / "plain.png")
    assert not pictures.is_annotated(tmp_path / "not there.png")
    assert not pictures.is_annotated(tmp_path)
    assert pictures.is_annotated(tmp_path / "annotated.png")
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "annotated.png")), image)
    with Image.open(tmp_path / "annotated.png") as opened:
        opened.verify()  # the checksums of all chunks
    with Image.open(tmp_path / "annotated.png") as opened:
        assert opened.text == {"Software": "faster-rcnn-onnx"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "file"
    pictures.write_file(target, b"one")
    pictures.write_file(target, b"two")
    assert target.read_bytes() == b"two"

    def interrupt(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures.write_file(target, b"three")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"two")]


def test_an_interruption_after_the_last_step_comes_out(tmp_path, monkeypatch):
    rename = os.replace

    def rename_and_interrupt(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures.write_file(tmp_path / "file", b"one")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"one")]


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_obeys_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        pictures.write_file(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert oct(stat.S_IMODE((tmp_path / "file").stat().st_mode)) == oct(mode)
