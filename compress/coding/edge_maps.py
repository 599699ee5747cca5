"""Lossless coding of edge maps: a small network predicts each pixel from those above it and to its left.

A pixel's probability of being an edge depends on the ROWS x (2 COLUMNS + 1) pixels above it, the LEFT pixels before it,
the share of edges in larger windows above, its place and the map's size.  The pixels are coded arithmetically under
these probabilities.  There is a network for each kind of map, and the first bits of a code tell which one.  It has two
hidden layers, and one output for each pattern of the LEFT pixels, so that a row's hidden layers are computed at once.
edge_maps.npz was trained by `python -m compress.coding.train`.

Weights and activations are integers whose sums stay below 2^24.  Such sums are exact in float32 in whatever order a
machine adds, so the same bytes come back as the same pixels everywhere.
"""

import hashlib
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from compress.coding.arithmetic import LEAST, PRECISION, Decoder, encoded

ROWS, COLUMNS, LEFT = 4, 7, 6
PIXELS = ROWS * (2 * COLUMNS + 1)
WINDOWS = ((12, 12, 16), (32, 32, 32), (1 << 20, 1 << 20, 32))
"""Windows whose share of edges is an input: rows above, columns to each side, and pixels without an edge that are added
so that small windows say little."""
PLACES, BORDER = 16, 8
"""Inputs for a pixel's place along a side: in which of 16 parts of the side, and how far from either end, up to 7."""
SHARES = len(WINDOWS) + 1

KINDS = ("drawings", "small", "large", "smooth")
"""Kinds of maps: handwritten digits of 28 pixels, photographs of 32, larger photographs, and photographs that were
blurred or enlarged first."""
LIKELY, OTHERS = 1 << PRECISION - 3, 1 << PRECISION - 1
"""Probability that a map's kind is not the likeliest of its size, and of each bit of the kind's number then."""

INPUT_UNIT, UNIT, HIDDEN_UNIT, MOST = 1 << 13, 1 << 7, 1 << 6, 1023
"""Weights of the first layer are multiples of 1 / INPUT_UNIT, later ones of 1 / UNIT; activations are multiples of
1 / HIDDEN_UNIT, MOST of them at most."""
LOGIT_UNIT, MOST_LOGIT = 32, 352
"""Logits are rounded to multiples of 1 / LOGIT_UNIT, MOST_LOGIT of them at most."""
BAND = 1 << 13
"""Pixels whose probabilities are computed at a time: what a processor's cache holds."""
SAMPLE = 1 << 12
"""Pixels of a map that decide whose network codes it."""

WEIGHTS = ("first", "rows", "columns", "bias", "second", "second_bias", "last", "last_bias")

FILE = Path(__file__).with_name("edge_maps.npz")


@dataclass(frozen=True)
class Network:
    """The integer weights of one kind's network, in float32 where they are multiplied.

    first: (PIXELS + SHARES) x H; rows, columns: (PLACES + 2 BORDER) x H, of a pixel's place; bias: H; second: H x H2;
    second_bias: H2; last: 2^LEFT x H2; last_bias: 2^LEFT.  probabilities: of an edge, for each rounded logit.
    """

    first: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    bias: np.ndarray
    second: np.ndarray
    second_bias: np.ndarray
    last: np.ndarray
    last_bias: np.ndarray
    probabilities: np.ndarray

    def hidden(self, inputs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The second hidden layer, N x H2, of N pixels with these inputs and sums of the weights of their places."""
        sums = inputs @ self.first
        sums += places
        sums = _activated(sums, INPUT_UNIT // HIDDEN_UNIT) @ self.second
        sums += self.second_bias
        return _activated(sums, UNIT)

    def places(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(height x H, width x H): what the places of rows and of columns add to the first layer."""
        return inputs_of_places(height) @ self.rows + self.bias, inputs_of_places(width) @ self.columns

    def from_logits(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities of an edge (uint16) from the last layer's sums."""
        rounded = np.floor(logits * np.float32(LOGIT_UNIT / (UNIT * HIDDEN_UNIT)))
        return self.probabilities[np.clip(rounded, -MOST_LOGIT, MOST_LOGIT).astype(np.intp) + MOST_LOGIT]


def encode(edges: np.ndarray) -> bytes:
    """The code of an edge map (HxW, nonzero on an edge), as `decode` reads it."""
    return encoded(*bits_of(edges))


def decode(code: bytes, height: int, width: int) -> np.ndarray:
    """The edge map (HxW uint8, 0 or 255) of a code.  Raises OSError for bytes that code no map of this size."""
    decoder = Decoder(code)
    edges = read(decoder, height, width)
    decoder.check_end()
    return edges


def bits_of(edges: np.ndarray) -> tuple[list[int], list[int]]:
    """(bits, their probabilities of being 1) of an edge map, which `read` reads."""
    field = Field(*edges.shape)
    field.set_rows(0, edges)
    likely, kind = _likely(*edges.shape), _best_kind(field)
    bits, probabilities = [0], [LIKELY]
    if kind != likely:
        bits, probabilities = [1, kind >> 1, kind & 1], [LIKELY, OTHERS, OTHERS]
    of_pixels = [_of_pixels(field, rows, kind)[0] for rows in field.bands()]
    return bits + (edges != 0).ravel().tolist(), probabilities + np.concatenate(of_pixels).tolist()


def read(decoder: Decoder, height: int, width: int) -> np.ndarray:
    """An edge map (HxW uint8, 0 or 255) from a code that goes on with it."""
    field, kind = Field(height, width), _likely(height, width)
    if decoder.bit(LIKELY):
        kind = decoder.bit(OTHERS) << 1 | decoder.bit(OTHERS)
    chosen = network(kind)
    rows, columns = chosen.places(height, width)
    for y in range(height):
        hidden = chosen.hidden(field.inputs(slice(y, y + 1)), rows[y] + columns)
        probabilities = chosen.from_logits(hidden @ chosen.last.T + chosen.last_bias)
        row = memoryview(probabilities.ravel())  # type: ignore[arg-type]  # an array is a buffer
        field.set_rows(y, _decoded_row(decoder, row, width)[None])
    return field.pixels * np.uint8(255)


def _decoded_row(decoder: Decoder, probabilities: memoryview, width: int) -> np.ndarray:
    """A row's pixels.  probabilities: width x 2^LEFT of them, one row after another."""
    # `Decoder.bit`, written out: this loop is most of the time.
    length, offset, left, row = decoder.length, decoder.offset, 0, bytearray(width)
    mask, patterns = (1 << LEFT) - 1, 1 << LEFT
    for x in range(width):
        of_one = (length >> PRECISION) * probabilities[x * patterns + left]
        length -= of_one
        left = left << 1 & mask
        if offset >= length:
            offset -= length
            length = of_one
            left |= 1
            row[x] = 1
        while length < LEAST:
            length <<= 8
            offset = offset << 8 | decoder.next_byte()
    decoder.length, decoder.offset = length, offset
    decoder.checksum = zlib.crc32(row, decoder.checksum)
    return np.frombuffer(row, np.uint8)


class Field:
    """An edge map that is being filled from the top, and the inputs of its pixels."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self._padded = np.zeros((ROWS + height, width + 2 * COLUMNS), np.float32)
        self.windows = np.lib.stride_tricks.sliding_window_view(self._padded, (ROWS, 2 * COLUMNS + 1))
        self._sums = np.zeros((height + 1, width + 1), np.int32)  # of all pixels above and to the left
        x = np.arange(width)
        self._ends = [(np.maximum(0, x - side), np.minimum(width, x + side + 1)) for _, side, _ in WINDOWS]
        self.size_input = size_input(height, width)

    @property
    def pixels(self) -> np.ndarray:
        """HxW uint8, 0 or 1."""
        return self._padded[ROWS:, COLUMNS : COLUMNS + self.width].astype(np.uint8)

    def set_rows(self, first: int, rows: np.ndarray) -> None:
        """Fill in the rows from number `first` on."""
        end, edges = first + len(rows), rows != 0
        self._padded[ROWS + first : ROWS + end, COLUMNS : COLUMNS + self.width] = edges
        above = edges.cumsum(1, dtype=np.int32).cumsum(0, dtype=np.int32)
        self._sums[first + 1 : end + 1, 1:] = self._sums[first, 1:] + above

    def inputs(self, rows: slice) -> np.ndarray:
        """Of the pixels of some rows, N x (PIXELS + SHARES) float32: pixels above, shares of edges, the size."""
        count = rows.stop - rows.start
        inputs = np.empty((count, self.width, PIXELS + SHARES), np.float32)
        inputs[:, :, :PIXELS].reshape(count, self.width, ROWS, -1)[...] = self.windows[rows]
        inputs[:, :, PIXELS:-1] = self.shares(rows)
        inputs[:, :, -1] = self.size_input
        return inputs.reshape(-1, PIXELS + SHARES)

    def shares(self, rows: slice) -> np.ndarray:
        """Rows x W x len(WINDOWS): the share of edges in each window above a pixel, half of them as 255."""
        y = np.arange(rows.start, rows.stop)
        shares = np.empty((len(y), self.width, len(WINDOWS)), np.int32)
        for i, ((up, _, slack), (left, right)) in enumerate(zip(WINDOWS, self._ends, strict=True)):
            top = np.maximum(0, y - up)
            band = self._sums[y] - self._sums[top]
            area = (y - top)[:, None] * (right - left) + slack
            edges = band.take(right, axis=1) - band.take(left, axis=1)
            np.floor_divide(edges << 9, area, out=shares[:, :, i])
        return np.minimum(shares, 255, out=shares)

    def left(self, rows: slice) -> np.ndarray:
        """The pattern of the LEFT pixels before each pixel of some rows: N numbers, the nearest in the lowest bit."""
        pixels = self._padded[ROWS + rows.start : ROWS + rows.stop].astype(np.uint8)
        before = [pixels[:, COLUMNS - 1 - i :][:, : self.width] << i for i in range(LEFT)]
        return np.bitwise_or.reduce(before).ravel()

    def bands(self) -> list[slice]:
        """All rows, in slices of BAND pixels or of one row."""
        count = max(1, BAND // self.width)
        return [slice(y, min(y + count, self.height)) for y in range(0, self.height, count)]

    def sample(self) -> list[slice]:
        """Rows spread over the map, of about SAMPLE pixels or all there are."""
        if self.height * self.width <= SAMPLE:
            return [slice(0, self.height)]
        count = max(1, SAMPLE // (4 * self.width))
        return [slice(y, min(y + count, self.height)) for y in (self.height * i // 4 for i in range(4))]


def _of_pixels(field: Field, rows: slice, *kinds: int) -> list[np.ndarray]:
    """Probabilities of an edge (N uint16) of the pixels of some rows of a whole map, by the networks of these kinds."""
    inputs, left, probabilities = field.inputs(rows), field.left(rows), []
    for chosen in map(network, kinds):
        of_rows, of_columns = chosen.places(field.height, field.width)
        hidden = chosen.hidden(inputs, (of_rows[rows, None] + of_columns).reshape(len(inputs), -1))
        logits = np.einsum("nh,nh->n", hidden, chosen.last.take(left, axis=0)) + chosen.last_bias.take(left)
        probabilities.append(chosen.from_logits(logits))
    return probabilities


def _activated(sums: np.ndarray, unit: int) -> np.ndarray:
    """Rounded down to multiples of `unit`, from 0 to MOST of them; in place."""
    sums *= np.float32(1 / unit)
    return np.clip(np.floor(sums, out=sums), 0, MOST, out=sums)


@lru_cache(16)
def inputs_of_places(side: int) -> np.ndarray:
    """side x (PLACES + 2 BORDER) float32, 0 or 1: where each place along a side of that length is."""
    places = np.arange(side)
    inputs = np.zeros((side, PLACES + 2 * BORDER), np.float32)
    inputs[places, places * PLACES // side] = 1
    inputs[places, PLACES + np.minimum(places, BORDER - 1)] = 1
    inputs[places, PLACES + BORDER + np.minimum(places[::-1], BORDER - 1)] = 1
    return inputs


def size_input(height: int, width: int) -> int:
    """The input for a map's size: 16 more for each doubling of its shorter side."""
    return min(255, 8 * (min(height, width) ** 2).bit_length())


def _likely(height: int, width: int) -> int:
    """The likeliest kind of a map of this size, by its number in KINDS."""
    return int(np.searchsorted([28, 48], min(height, width)))


def _best_kind(field: Field) -> int:
    """The kind whose network gives a map, or its SAMPLE, the shortest code."""
    likely, whole = _likely(field.height, field.width), 1 << PRECISION
    kinds = [kind for kind in range(len(KINDS)) if likely < 2 or kind >= 2]  # of large maps the last two, for speed
    bits = np.array([0.0 if kind == likely else 5.0 for kind in kinds])
    for rows in field.sample():
        edges = field.pixels[rows].ravel()
        of_one = np.array(_of_pixels(field, rows, *kinds), np.float32)
        bits -= np.log2(np.where(edges, of_one, whole - of_one) / whole).sum(1)
    return kinds[int(np.argmin(bits))]


@cache
def network(kind: int) -> Network:
    """The network of a kind of KINDS, by its number."""
    with np.load(FILE, allow_pickle=False) as arrays:
        weights = {name: arrays[f"{KINDS[kind]}/{name}"].astype(np.float32) for name in WEIGHTS}
        return Network(**weights, probabilities=arrays["probabilities"])


@cache
def coder_digest() -> str:
    """A digest of all networks: codes made with others can't be read."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()[:12]
