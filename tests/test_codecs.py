"""Pictures without what all files of a codec share: the payload is small, and the file comes back from it."""

import importlib.util
import io
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from compress.forms import form_named
from compress.presets import HIGH
from utils.data import codecs
from utils.data.codecs import CODECS
from utils.errors import UserError

HAS_JXL = importlib.util.find_spec("pillow_jxl") is not None
NEEDS_JXL = pytest.mark.skipif(not HAS_JXL, reason="needs pillow-jxl-plugin")
EACH = ["jpeg", "webp", "avif", pytest.param("jxl", marks=NEEDS_JXL)]
SHARED = {"jpeg": 320, "webp": 28, "avif": 285, "jxl": 38}
"""Bytes that small colour pictures have in common, at least."""
SMALL, LARGE = [(1, 1), (28, 28), (3, 2), (47, 33)], [(20, 3000), (20_000, 1)]
SIZES = [
    pytest.param(name, size, marks=[NEEDS_JXL] * (name == "jxl") + [pytest.mark.long] * (slow and size in LARGE))
    for name, slow in (("jpeg", False), ("webp", False), ("avif", True), ("jxl", True))
    for size in SMALL + LARGE
]


def picture(height, width, greyscale=False, seed=0):
    """A smooth picture with some detail."""
    noise = np.random.default_rng(seed).normal(0, 1, (height, width) if greyscale else (height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 2).reshape(noise.shape)
    return (smooth * 400 + 4 * noise + 128).clip(0, 255).astype(np.uint8)


def pillows_file(image, name, quality):
    """What Pillow writes, without anything of this project."""
    file = io.BytesIO()
    grey = {"subsampling": "4:0:0"} if name == "avif" and image.ndim == 2 else {}
    Image.fromarray(image).save(file, CODECS[name].kind, quality=quality, **CODECS[name].options, **grey)
    return file.getvalue()


def opened(file):
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("greyscale", [False, True])
@pytest.mark.parametrize("quality", [0, 10, 75, 99])
def test_the_file_of_a_payload_shows_what_pillows_own_file_shows(name, greyscale, quality):
    codecs.check_codec(name)
    image = picture(32, 32, greyscale)
    payload, theirs = codecs.encoded(image, name, quality), pillows_file(image, name, quality)
    assert np.array_equal(opened(codecs.file_of(payload, name, quality, (32, 32), greyscale)), opened(theirs))
    if not greyscale and (name, quality) != ("jxl", 75):  # whose beginning is of this picture alone
        assert len(payload) <= len(theirs) - SHARED[name]


@pytest.mark.parametrize(("name", "size"), SIZES)
@pytest.mark.parametrize("greyscale", [False, True])
def test_pictures_of_any_size_come_back(name, size, greyscale):
    codecs.check_codec(name)
    image = picture(*size, greyscale)
    if name == "webp" and max(size) > 16383:
        with pytest.raises(OSError, match="1 x 20000 pixels can't be written as WebP"):
            codecs.encoded(image, name, 20)
        return
    kept = codecs.encoded(image, name, 20)
    file = codecs.file_of(kept, name, 20, size, greyscale)
    assert np.array_equal(opened(file), opened(pillows_file(image, name, 20)))
    assert codecs.file_of(file, name, 20, size, greyscale) == file  # a whole file is taken as it is


def test_small_avifs_take_what_is_theirs():
    """On smooth pictures of 32 x 32 pixels a file is nearly six times its payload."""
    images = [cv2.GaussianBlur(picture(32, 32, seed=seed), (0, 0), 2) for seed in range(5)]
    payloads = [len(codecs.encoded(image, "avif", 10)) for image in images]
    files = [len(pillows_file(image, "avif", 10)) for image in images]
    assert np.mean(payloads) < 70
    assert {file - payload for file, payload in zip(files, payloads, strict=True)} == {290}


def test_large_jpegs_keep_tables_of_their_own():
    image = picture(200, 300)
    kept = codecs.encoded(image, "jpeg", 60)
    assert kept.startswith(b"\xff\xc4")  # a table
    assert len(kept) < len(pillows_file(image, "jpeg", 60)) - 150


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_files_of_earlier_versions_are_read_and_count_as_their_payload(name):
    """Earlier versions kept whole files, greyscale AVIFs in three channels."""
    image, form = picture(40, 30), form_named(f"{name}:30", HIGH)
    file = pillows_file(image, name, 30)
    assert np.array_equal(form.condition(file, (40, 30)).start, opened(file))
    payload = form.payload(file, (40, 30), False)
    assert len(payload) < len(file) - 25
    assert np.array_equal(form.condition(payload, (40, 30)).start, opened(file))
    assert form.payload(payload, (40, 30), False) == payload
    assert form.check(file, image) is None
    grey = picture(40, 30, greyscale=True)
    in_colour = pillows_file(np.repeat(grey[:, :, None], 3, axis=2), name, 30)
    assert np.array_equal(form.condition(in_colour, (40, 30), True).start, opened(in_colour))


def test_edge_maps_with_pictures_of_earlier_versions_are_read():
    image, form = picture(40, 30), form_named("edges+webp:10@16", HIGH)
    small = cv2.resize(image, (16, 21), interpolation=cv2.INTER_AREA)
    file = io.BytesIO()
    Image.fromarray(form_named("edges", HIGH).edges(image) > 0).save(file, "WEBP", lossless=True)
    edge_map = file.getvalue()
    kept = len(edge_map).to_bytes(4, "little") + edge_map + pillows_file(small, "webp", 10)
    assert form.check(kept, image) is None
    assert form.payload(kept, (40, 30), False) == form.encode(image)


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
def test_what_is_left_of_a_file_has_no_payload(name):
    file = pillows_file(picture(40, 30), name, 30)
    for length in range(8, len(file), 7):
        part = file[:length]
        payload = codecs.stripped(part, name, 30, (40, 30), False)
        assert codecs.file_of(payload, name, 30, (40, 30), False) == part


@pytest.mark.parametrize("name", EACH)
def test_damaged_payloads_are_an_oserror_or_another_picture(name):
    codecs.check_codec(name)
    form, rng = form_named(f"{name}:30", HIGH), np.random.default_rng(0)
    kept = form.encode(picture(32, 32))
    damaged = [b"", b"\xff", kept[:1], kept[: len(kept) // 2], b"\x80" * 40, b"\0" * 40]
    for _ in range(30):
        changed = bytearray(kept)
        for place in rng.integers(0, len(kept), 3):
            changed[place] = rng.integers(0, 256)
        damaged.append(bytes(changed))
    for broken in damaged:
        try:
            assert form.condition(broken, (32, 32)).start.ndim == 3
        except OSError as error:
            assert re.search(r"\w", str(error))  # noqa: PT017


@pytest.mark.skipif(HAS_JXL, reason="pillow-jxl-plugin is installed")
def test_jpeg_xl_without_its_plugin_says_what_to_install():
    with pytest.raises(UserError, match="pip install pillow-jxl-plugin"):
        form_named("jxl:30", HIGH)


@NEEDS_JXL
def test_the_encoder_of_jpeg_xl_is_a_setting():
    assert form_named("jxl:30", HIGH).settings()["encoder"].startswith("pillow-jxl-plugin ")
    with pytest.raises(UserError, match="needs a quality, 0 to 99"):
        form_named("jxl:100", HIGH)
