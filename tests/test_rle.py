"""Run-length encoded masks against pycocotools, which is whom they are for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from detectors import rle

coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools: uv run --extra test pytest")

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def encoded(mask):
    """Return what pycocotools makes of a mask [h, w]."""
    result = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": result["counts"].decode()}


@given(MASKS)
def test_both_ways(mask):
    assert rle.encode(mask, mask.shape) == encoded(mask)
    np.testing.assert_array_equal(rle.decode(encoded(mask)), mask)


@given(MASKS, st.tuples(*[st.integers(0, 9)] * 4))
def test_a_part_of_a_picture(part, margins):
    """Outside the part the mask is empty; runs go on over the edge of a column only where the picture ends, too."""
    top, left, bottom, right = margins
    mask = np.pad(part, [(top, bottom), (left, right)])
    assert rle.encode(part, mask.shape, top, left) == encoded(mask)


@pytest.mark.parametrize("value", [False, True])
def test_all_and_nothing(value):
    mask = np.full((7, 5), value)
    assert rle.encode(mask, mask.shape) == encoded(mask)
    np.testing.assert_array_equal(rle.decode(encoded(mask)), mask)


def test_long_runs():
    """Their counts, and their differences of either sign, need up to five characters."""
    mask = np.zeros((3000, 4000), bool)
    mask[:, 100:3900:700] = True
    mask[5, 200] = mask[2999, 3999] = True
    assert rle.encode(mask, mask.shape) == encoded(mask)
    np.testing.assert_array_equal(rle.decode(encoded(mask)), mask)
