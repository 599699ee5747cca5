"""Coding of a tiny picture in 10 to 40 bytes: the low frequencies of its colours, without any header.

Luma and chroma (JPEG's YCbCr) are transformed by a discrete cosine transform of the whole picture, of chroma the lower
half of the frequencies alone, quantised, and coded arithmetically with probabilities that depend on the frequency and
on the levels coded before it.  The probabilities were counted by `python -m compress.coding.train`.  The transform is
in integers, so that every machine reads the same picture.
"""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np

from compress.coding.arithmetic import PRECISION, Decoder
from compress.coding.edge_maps import FILE

UNIT = 1 << 13
"""Cosines are multiples of 1 / UNIT."""
STEP = 4
"""The quantiser's step in levels of 255 of the mean; other coefficients have the same step in an orthonormal
transform.  It grows with the picture's side, as coefficients do, so the same tables serve pictures of all sizes."""
FREQUENCIES, NEIGHBOURS, DECISIONS = 16, 3, 15
"""Contexts: the frequency (sum of both, FREQUENCIES - 1 at most), how large the two levels before it are (0, 1, more);
decisions: whether a level's magnitude exceeds 0, 1, ... DECISIONS - 1."""
HALF = 1 << PRECISION - 1


def planes(picture: np.ndarray) -> list[np.ndarray]:
    """The quantised coefficients of Y, Cb and Cr of a picture (HxWx3 or HxW uint8): ints, low frequencies first."""
    height, width = picture.shape[:2]
    rgb = np.broadcast_to(np.atleast_3d(picture), (height, width, 3)).astype(np.int64)
    coefficients = []
    unit = (_step(height, width) << 16) * UNIT * UNIT
    for weights, offset, (rows, columns) in zip(TO_YCBCR, (128, 0, 0), sizes(height, width), strict=True):
        plane = rgb @ np.array(weights, np.int64) - (offset << 16)
        levels = _cosines(height)[:rows] @ plane @ _cosines(width)[:columns].T
        coefficients.append((2 * levels + unit) // (2 * unit))
    return coefficients


def picture_of(levels: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The picture, HxWx3 uint8, of quantised coefficients."""
    ycbcr = []
    for plane in levels:
        rows, columns = _cosines(height)[: plane.shape[0]], _cosines(width)[: plane.shape[1]]
        whole = rows.T @ (plane * _step(height, width)) @ columns
        ycbcr.append((2 * whole + UNIT * UNIT) // (2 * UNIT * UNIT))
    y, cb, cr = ycbcr[0] + 128, ycbcr[1], ycbcr[2]
    rgb = [(y << 16) + 91881 * cr, (y << 16) - 22554 * cb - 46802 * cr, (y << 16) + 116130 * cb]  # JFIF 1.02
    return np.stack([np.clip((channel + (1 << 15)) >> 16, 0, 255) for channel in rgb], 2).astype(np.uint8)


TO_YCBCR = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
"""JFIF 1.02's weights of red, green and blue, times 2^16."""


def sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of the coefficients that are kept of Y, Cb and Cr."""
    half = -(-height // 2), -(-width // 2)
    return [(height, width), half, half]


def bits_of(picture: np.ndarray) -> tuple[list[int], list[int]]:
    """(bits, their probabilities of being 1) of a picture (HxWx3 or HxW uint8), which `read` reads."""
    bits, probabilities = [], []
    for level, context in levels_of(picture):
        magnitude = abs(level)
        for i in range(min(magnitude + 1, DECISIONS)):
            bits.append(int(magnitude > i))
            probabilities.append(int(tables()[context][i]))
        if magnitude >= DECISIONS:  # Elias' gamma code
            rest = magnitude - DECISIONS + 1
            code = [0] * (rest.bit_length() - 1) + [int(bit) for bit in f"{rest:b}"]
            bits += code
            probabilities += [HALF] * len(code)
        if magnitude:
            bits.append(int(level < 0))
            probabilities.append(HALF)
    return bits, probabilities


def levels_of(picture: np.ndarray) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(level, where the probabilities of the decisions about it are in `tables`), in the order of coding."""
    for channel, levels in enumerate(planes(picture)):
        before = (0, 0)
        for row, column in _order(*levels.shape):
            level = int(levels[row, column])
            yield level, _context(channel, row + column, before)
            before = (before[1], abs(level))


def read(decoder: Decoder, height: int, width: int) -> np.ndarray:
    """A picture (HxWx3 uint8) from a code that begins with it.  Raises OSError for levels that no picture has."""
    planes = []
    for channel, (rows, columns) in enumerate(sizes(height, width)):
        levels, before = np.zeros((rows, columns), np.int64), (0, 0)
        for row, column in _order(rows, columns):
            context, magnitude = tables()[_context(channel, row + column, before)], 0
            while magnitude < DECISIONS and decoder.bit(int(context[magnitude])):
                magnitude += 1
            if magnitude == DECISIONS:
                magnitude += _gamma(decoder) - 1
            levels[row, column] = -magnitude if magnitude and decoder.bit(HALF) else magnitude
            before = (before[1], magnitude)
        planes.append(levels)
    return picture_of(planes, height, width)


def _gamma(decoder: Decoder) -> int:
    zeros = 0
    while not decoder.bit(HALF):
        zeros += 1
        if zeros > 16:
            raise OSError("the code is damaged: no picture has such colours")
    rest = 1
    for _ in range(zeros):
        rest = rest << 1 | decoder.bit(HALF)
    return rest


def _context(channel: int, frequency: int, before: tuple[int, int]) -> tuple[int, int, int]:
    """An index of `tables`.  before: two magnitudes."""
    return min(channel, 1), min(frequency, FREQUENCIES - 1), min(NEIGHBOURS - 1, max(before))


def _order(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Frequencies from the lowest on, by diagonals."""
    return iter(sorted(((r, c) for r in range(rows) for c in range(columns)), key=lambda at: (sum(at), at[0])))


def _step(height: int, width: int) -> int:
    """The quantiser's step of an orthonormal transform's coefficients."""
    return STEP * max(1, math.isqrt(height * width))


@cache
def _cosines(side: int) -> np.ndarray:
    """side x side: rows are the basis of the orthonormal transform of that length, times UNIT."""
    n, k = np.arange(side), np.arange(side)[:, None]
    scale = np.where(k == 0, math.sqrt(1 / side), math.sqrt(2 / side))
    return np.rint(UNIT * scale * np.cos(np.pi * (2 * n + 1) * k / (2 * side))).astype(np.int64)


@cache
def tables() -> np.ndarray:
    """Probabilities of decisions: 2 (luma, chroma) x FREQUENCIES x NEIGHBOURS x DECISIONS, uint16."""
    with np.load(FILE, allow_pickle=False) as arrays:
        return arrays["colour"]
