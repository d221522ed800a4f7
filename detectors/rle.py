"""Masks of whole pictures in little memory: COCO's compressed run-length encoding, as pycocotools reads and writes it.

A mask is {"size": [height, width], "counts": text}. Its pixels are counted down the columns, from the left one to the
right one: so many outside, then so many inside, outside, and so on.
"""

import numpy as np


def encode(mask, size, top=0, left=0):
    """Return the mask of a picture of `size` (height, width), given the part of it [h, w] that begins at (top, left).

    Outside that part the mask is empty.
    """
    height, width = size
    # Where each column enters the mask and where it leaves it, in turns, as places in the picture.
    columns = np.pad(mask.T, [(0, 0), (1, 1)])  # [w, h + 2], false at both ends
    column, row = np.divmod(np.flatnonzero(columns[:, 1:] != columns[:, :-1]), len(mask) + 1)
    places = (left + column) * height + top + row
    # A run goes on in the next column if it leaves a column at the bottom just where it enters the next one.
    goes_on = places[1:] == places[:-1]
    if goes_on.any():
        places = places[~(np.append(goes_on, False) | np.append(False, goes_on))]
    bounds = np.concatenate([[0], places, [height * width]])
    counts = bounds[1:] - bounds[:-1]
    counts = counts if counts[-1] else counts[:-1]  # the last pixel is inside: nothing follows
    return {"size": [int(height), int(width)], "counts": to_text(counts)}


def decode(rle):
    """Return a mask as [height, width] bool."""
    height, width = rle["size"]
    counts = from_text(rle["counts"])
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def to_text(counts):
    """Return counts [n] as COCO's text.

    From the fourth on, a count is written as its difference from the last but one. A number becomes groups of five
    bits, the lowest first; a sixth bit says that another group follows, and 48 makes it a printable character.
    """
    numbers = counts.copy()
    numbers[3:] -= counts[1:-2]
    groups = numbers[:, None] >> np.arange(0, 40, 5)  # eight of them, each with all higher bits
    rest = groups >> 5
    more = rest != np.where(groups & 16, -1, 0)  # the fifth bit of the last group is the sign
    needed = np.ones_like(more)
    np.logical_and.accumulate(more[:, :-1], axis=1, out=needed[:, 1:])
    return bytes(((groups & 31) + 32 * more + 48)[needed].astype(np.uint8)).decode()


def from_text(text):
    """Return the counts [n] in a text that to_text made."""
    groups = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(groups < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(groups)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((groups & 31) << 5 * place, starts)
    numbers -= np.where(groups[ends] & 16, 32 << 5 * place[ends], 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
