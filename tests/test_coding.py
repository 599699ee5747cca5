"""Arithmetic coding of bits, edge maps and tiny pictures: bit-exact, short, and the same on every machine."""

import hashlib
import math
from contextlib import suppress

import cv2
import numpy as np
import pytest

from compress.coding import colour, edge_maps
from compress.coding.arithmetic import Decoder, encoded
from compress.coding.train import largest_sums

LARGE = 1 << 16


def noise(height, width, density, seed=0):
    return np.where(np.random.default_rng(seed).random((height, width)) < density, 255, 0).astype(np.uint8)


def scene(height, width, seed=0):
    """The edge map of a picture with lines, as photographs have them."""
    random = np.random.default_rng(seed)
    picture = cv2.GaussianBlur(random.normal(0, 1, (height, width, 3)), (0, 0), height / 12)
    picture = (picture / picture.std() * 50 + 128).clip(0, 255).astype(np.uint8) // 40 * 40
    return cv2.Canny(picture, 100, 200)


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 100, 5000])
@pytest.mark.parametrize("most", [1, 100, LARGE // 2, LARGE - 1])
def test_bits_come_back_and_take_what_information_theory_says(count, most):
    random = np.random.default_rng(count)
    probabilities = random.integers(1, most + 1, count)
    bits = (random.random(count) < probabilities / LARGE).astype(int)
    code = encoded(bits.tolist(), probabilities.tolist())
    decoder = Decoder(code)
    assert [decoder.bit(int(p)) for p in probabilities] == bits.tolist()
    decoder.check_end()
    information = -np.log2(np.where(bits, probabilities, LARGE - probabilities) / LARGE).sum() / 8
    assert len(code) <= max(1, math.ceil(information * 1.002 + 0.01))
    assert len(code) >= information * 0.998 - 1


def test_the_least_likely_bits_come_back():
    bits, probabilities = [1, 0] * 500, [1, LARGE - 1] * 500
    decoder = Decoder(encoded(bits, probabilities))
    assert [decoder.bit(p) for p in probabilities] == bits


def test_a_code_is_a_number_in_the_interval_of_its_bits():
    """With exact fractions: probabilities of 1/4 are exact in the coder too, while the interval is a power of two."""
    bits, probabilities = [0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [LARGE // 2] * 10
    start, length = 0.0, 1.0
    for bit in bits:
        length /= 2
        start += bit * length
    code = encoded(bits, probabilities)
    number = int.from_bytes(code, "big") / 256 ** len(code)
    assert start <= number < start + length


def test_most_damage_shows():
    probabilities = [LARGE // 20] * 1500
    bits = (np.random.default_rng(0).random(1500) < 0.05).astype(int).tolist()
    code = encoded(bits, probabilities)

    def is_taken(damaged):
        decoder = Decoder(damaged)
        for probability in probabilities:
            decoder.bit(probability)
        try:
            decoder.check_end()
        except OSError:
            return False
        return True

    assert is_taken(code)
    assert not any(is_taken(code[:-cut]) for cut in range(2, 40))
    assert not any(is_taken(code + bytes(more)) for more in range(1, 5))
    flipped = [code[:i] + bytes([code[i] ^ 1 << i % 8]) + code[i + 1 :] for i in range(len(code))]
    assert sum(map(is_taken, flipped)) < 0.2 * len(flipped)
    with pytest.raises(OSError, match="empty"):
        Decoder(b"")


# --- edge maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 8), (1, 300), (300, 1), (28, 28), (33, 17), (90, 61)])
def test_an_edge_map_is_kept_bit_for_bit(size, density):
    edges = noise(*size, density)
    code = edge_maps.encode(edges)
    found = edge_maps.decode(code, *size)
    assert found.dtype == np.uint8
    assert np.array_equal(found, edges)
    assert code


@pytest.mark.parametrize(
    "size", [(1, 20_000), *(pytest.param(long, marks=pytest.mark.long) for long in ((20_000, 1), (3000, 20)))]
)
def test_long_edge_maps_are_kept_bit_for_bit(size):
    edges = noise(*size, 0.1)
    assert np.array_equal(edge_maps.decode(edge_maps.encode(edges), *size), edges)


@pytest.mark.parametrize("size", [(28, 28), (32, 40), (64, 64), (130, 180)])
def test_the_edge_map_of_a_scene_is_short(size):
    edges = scene(*size)
    code = edge_maps.encode(edges)
    assert np.array_equal(edge_maps.decode(code, *size), edges)
    file = cv2.imencode(".webp", edges, [cv2.IMWRITE_WEBP_QUALITY, 101])[1]
    assert len(code) < 0.85 * len(file)


def test_codes_of_another_size_or_damaged_ones_are_oserrors():
    code = edge_maps.encode(scene(64, 64))
    cases = [(b"", 64), (code, 90), (code, 20), (code[: len(code) // 2], 64), (code * 2, 64)]
    for broken, width in cases:
        with pytest.raises(OSError, match=r"\w"):
            edge_maps.decode(broken, 64, width)


def in_integers(network, inputs, rows, columns, left):
    """The rounded logits of pixels, in 64-bit integers throughout."""
    weights = {name: getattr(network, name).astype(np.int64) for name in edge_maps.WEIGHTS}
    first = inputs.astype(np.int64) @ weights["first"] + rows @ weights["rows"] + columns @ weights["columns"]
    hidden = np.clip((first + weights["bias"]) >> 7, 0, 1023)
    hidden = np.clip((hidden @ weights["second"] + weights["second_bias"]) >> 7, 0, 1023)
    logits = (hidden * weights["last"][left]).sum(1) + weights["last_bias"][left]
    return np.clip(logits >> 8, -352, 352)


@pytest.mark.parametrize("kind", range(len(edge_maps.KINDS)))
def test_the_network_in_float32_is_exact(kind):
    """So any order of additions gives the same sums."""
    network = edge_maps.network(kind)
    assert max(largest_sums({n: getattr(network, n) for n in edge_maps.WEIGHTS})) < 1 << 24
    edges = scene(60, 50, kind)
    field = edge_maps.Field(60, 50)
    field.set_rows(0, edges)
    every = slice(0, 60)
    rows = np.repeat(edge_maps.inputs_of_places(60).astype(np.int64), 50, 0)
    columns = np.tile(edge_maps.inputs_of_places(50).astype(np.int64), (60, 1))
    logits = in_integers(network, field.inputs(every), rows, columns, field.left(every))
    hidden = network.hidden(field.inputs(every), (rows @ network.rows + columns @ network.columns + network.bias))
    sums = (hidden * network.last[field.left(every)]).sum(1) + network.last_bias[field.left(every)]
    assert np.array_equal(network.from_logits(sums), network.probabilities[logits + 352])


def test_the_inputs_of_a_pixel_are_what_the_page_says():
    edges = scene(40, 30) > 0
    field = edge_maps.Field(40, 30)
    field.set_rows(0, edges)
    inputs = field.inputs(slice(0, 40)).reshape(40, 30, -1)
    padded = np.pad(edges, ((4, 0), (7, 7)))
    for y, x in ((0, 0), (3, 29), (20, 11), (39, 5)):
        assert np.array_equal(inputs[y, x, :60], padded[y : y + 4, x : x + 15].ravel())
        before = edges[y, max(0, x - 6) : x][::-1]
        assert field.left(slice(y, y + 1))[x] == sum(int(edge) << i for i, edge in enumerate(before))
        for i, (up, side, slack) in enumerate(((12, 12, 16), (32, 32, 32), (99, 99, 32))):
            window = edges[max(0, y - up) : y, max(0, x - side) : x + side + 1]
            assert inputs[y, x, 60 + i] == min(255, 512 * window.sum() // (window.size + slack))
    assert inputs[:, :, 63].min() == inputs[:, :, 63].max() == 8 * (30**2).bit_length()


def test_codes_are_those_that_were_written_before():
    """Files on disk are read with the networks that wrote them: after a new training, this digest changes knowingly."""
    codes = []
    for height, width in ((28, 28), (32, 32), (64, 90), (130, 120)):
        y, x = np.indices((height, width))
        codes.append(edge_maps.encode(np.sqrt((y * y + 2 * x * x) // 3).astype(int) % 9 == 0))
    assert hashlib.sha256(b"".join(codes)).hexdigest()[:16] == DIGEST


DIGEST = "b743e5704c354c6b"


# --- tiny pictures --------------------------------------------------------------------------------------------------


def tiny(height, width, seed=0):
    picture = cv2.GaussianBlur(
        np.random.default_rng(seed).normal(0, 1, (height, width, 3)), (0, 0), min(height, width) / 4
    )
    return (picture / picture.std() * 40 + 128).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (8, 8), (16, 21), (24, 16)])
def test_a_tiny_picture_comes_back_about_as_it_was_in_few_bytes(size):
    picture = tiny(*size) if min(size) > 1 else np.full((*size, 3), (200, 100, 30), np.uint8)
    code = encoded(*colour.bits_of(picture))
    decoder = Decoder(code)
    found = colour.read(decoder, *size)
    decoder.check_end()
    assert np.array_equal(found, colour.picture_of(colour.planes(picture), *size))
    assert found.dtype == np.uint8
    assert np.sqrt(np.square(found.astype(float) - picture).mean()) < 20
    assert len(code) < 80


def test_levels_are_those_of_a_cosine_transform_of_jpegs_colours():
    picture = tiny(16, 12)
    ycrcb = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2YCrCb) * 255
    for levels, channel, offset in zip(colour.planes(picture), (0, 2, 1), (128, 127.5, 127.5), strict=True):
        expected = cv2.dct(ycrcb[:, :, channel] - offset) / (4 * math.isqrt(16 * 12))
        rows, columns = levels.shape
        assert np.abs(levels - expected[:rows, :columns]).max() < 0.6  # rounded


def test_colours_beyond_the_tables_come_back():
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[::2, ::2] = (255, 0, 255)
    bits = colour.bits_of(picture)
    decoder = Decoder(encoded(*bits))
    assert np.array_equal(colour.read(decoder, 8, 8), colour.picture_of(colour.planes(picture), 8, 8))
    white = np.full((8, 8), 255, np.uint8)
    decoder = Decoder(encoded(*colour.bits_of(white)))
    assert abs(colour.read(decoder, 8, 8).astype(int) - 255).max() <= 4


def test_any_bytes_are_some_colours_or_an_oserror():
    for seed in range(30):
        with suppress(OSError):
            assert colour.read(Decoder(np.random.default_rng(seed).bytes(40)), 16, 16).shape == (16, 16, 3)
