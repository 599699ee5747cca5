"""JPEG, WebP, AVIF and JPEG XL pictures without what all files of one codec, quality and size share.

A file is container, tables, headers and the coded picture.  Of small pictures the first three are most of it: 290 of
the 350 bytes of an AVIF of 32 x 32 pixels.  A payload is what is left of a file when all that follows from codec,
quality, size and kind (colour or greyscale) is taken away; `file_of` puts it back, so that any viewer opens the result.

    JPEG      the entropy coded data, with the standard's Huffman tables (ITU-T T.81, Annex K); or, where these are
              fewer bytes, a progressive file's own tables and scans
    WebP      the length of the first partition, and the partitions (RFC 6386, section 9.1)
    AVIF      the frame of the AV1 stream (AV1 Bitstream & Decoding Process Specification, section 5.9)
    JPEG XL   the frame's only section, without its beginning as far as two unlike pictures share it

What a payload can't express is kept as the whole file, which is told by its first bytes.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

import numpy as np
from PIL import Image, features

from utils.errors import UserError

Size = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class Codec:
    """kind: Pillow's name of the format; ending: of its files; options: what Pillow's encoder is told beside the
    quality; magic: (offset, bytes) that tell a whole file; payload: (file, quality, size, greyscale) -> its payload,
    None where it has none; file: (payload, quality, size, greyscale) -> the file; also: other options that may give a
    smaller payload, of the same pixels.
    """

    kind: str
    ending: str
    options: Mapping[str, Any]
    magic: tuple[int, bytes]
    payload: Callable[[bytes, int, Size, bool], bytes | None]
    file: Callable[[bytes, int, Size, bool], bytes]
    also: Mapping[str, Any] | None = None


def encoded(image: np.ndarray, name: str, quality: int) -> bytes:
    """The smallest payload of an image (HxWx3 RGB or HxW greyscale, uint8), or the whole file where it has none.

    name: of CODECS; quality: Pillow's, 0 to 100.  Raises OSError where a side is too long for the codec.
    """
    codec, size, greyscale = CODECS[name], image.shape[:2], image.ndim == 2
    try:
        files = [_written(image, name, quality, options) for options in (codec.options, codec.also) if options]
    except (OSError, ValueError, RuntimeError) as error:  # which of them depends on the codec
        raise OSError(f"{size[1]} x {size[0]} pixels can't be written as {codec.kind} ({error})") from error
    return min((stripped(file, name, quality, size, greyscale) for file in files), key=len)


def stripped(file: bytes, name: str, quality: int, size: Size, greyscale: bool) -> bytes:
    """A file's payload, or the file itself where it has none."""
    payload = CODECS[name].payload(file, quality, size, greyscale)
    if not payload or is_file(payload, name):
        return file
    return payload if file_of(payload, name, quality, size, greyscale) == file else file


def file_of(data: bytes, name: str, quality: int, size: Size, greyscale: bool) -> bytes:
    """The whole file of a payload; what is a whole file already is returned as it is.

    A payload that no encoder has written gives a file that does not decode, or shows anything.
    """
    return data if is_file(data, name) else CODECS[name].file(data, quality, size, greyscale)


def reduced(height: int, width: int, side: int | None) -> tuple[int, int]:
    """(height, width) with the shorter side at most `side`; the longer one is rounded."""
    scale = min(1.0, side / min(height, width)) if side else 1.0
    return max(1, round(height * scale)), max(1, round(width * scale))


def is_file(data: bytes, name: str) -> bool:
    """Whether these bytes are a whole file, and not a payload."""
    offset, magic = CODECS[name].magic
    return data[offset : offset + len(magic)] == magic


def check_codec(name: str) -> None:
    """Raises UserError where the codec is not installed."""
    if name == "jxl":
        try:
            import pillow_jxl  # noqa: F401  (which tells Pillow about it)
        except ImportError:
            raise UserError("JPEG XL needs a plugin of Pillow: pip install pillow-jxl-plugin.") from None
    elif name != "jpeg" and not features.check(name):
        raise UserError(f"this Pillow has no {CODECS[name].kind} encoder: install a release of Pillow that has one.")


def version(name: str) -> str | None:
    """The encoder's, where payloads can be read by that one alone."""
    return f"pillow-jxl-plugin {metadata.version('pillow-jxl-plugin')}" if name == "jxl" else None


def _written(image: np.ndarray, name: str, quality: int, options: Mapping[str, Any]) -> bytes:
    """The file that Pillow writes."""
    file = io.BytesIO()
    colours = {"subsampling": "4:0:0"} if name == "avif" and image.ndim == 2 else {}
    Image.fromarray(image).save(file, CODECS[name].kind, quality=quality, **options, **colours)
    return file.getvalue()


# Numbers of as few bytes as they need


def varint(number: int) -> bytes:
    """A number from 0 on in groups of 7 bits, lowest first; the top bit of a byte says that more follow (LEB128)."""
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def read_varint(data: bytes, start: int = 0) -> tuple[int, int]:
    """(the number, the offset after it).  Raises ValueError where the data end before, and for more than 35 bits."""
    number = 0
    for index in range(start, min(start + 5, len(data))):
        number |= (data[index] & 127) << 7 * (index - start)
        if data[index] < 128:
            return number, index + 1
    raise ValueError("the data end within a number" if start + 5 > len(data) else "a number of more than 35 bits")


# JPEG

_SEGMENTS = b"\xff\xc4", b"\xff\xda"
"""Tables and scan headers begin so; coded data do not, in which 0xff is followed by 0."""


@cache
def _jpeg_head(quality: int, greyscale: bool, progressive: bool) -> tuple[bytes, bytes]:
    """(what is before, what is after the four bytes of the size), up to the payload."""
    blank = np.zeros((16, 16) if greyscale else (16, 16, 3), np.uint8)
    file = _written(blank, "jpeg", quality, {"optimize": False, "progressive": progressive})
    ends = {kind: (start, end) for kind, start, end in _segments(file)}
    start, end = ends[0xC2 if progressive else 0xC0]
    return file[: start + 5], file[start + 9 : end if progressive else ends[0xDA][1]]


def _segments(file: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, start, end) of each segment of a JPEG up to its first scan header (ITU-T T.81, B.1.1)."""
    kind, end = None, 2
    while kind != 0xDA:
        kind, start = file[end + 1], end
        end = start + 2 + int.from_bytes(file[start + 2 : start + 4])
        yield kind, start, end


def _jpeg_start(quality: int, size: Size, greyscale: bool, progressive: bool) -> bytes:
    before, after = _jpeg_head(quality, greyscale, progressive)
    return before + size[0].to_bytes(2) + size[1].to_bytes(2) + after


def _jpeg_payload(file: bytes, quality: int, size: Size, greyscale: bool) -> bytes | None:
    starts = [_jpeg_start(quality, size, greyscale, progressive) for progressive in (False, True)]
    return next((file[len(start) : -2] for start in starts if file.startswith(start)), None)


def _jpeg_file(payload: bytes, quality: int, size: Size, greyscale: bool) -> bytes:
    return _jpeg_start(quality, size, greyscale, payload[:2] in _SEGMENTS) + payload + b"\xff\xd9"


# WebP

_VP8_START = b"\x9d\x01\x2a"


def _webp_payload(file: bytes, quality: int, size: Size, greyscale: bool) -> bytes | None:
    if len(file) < 30 or file[12:16] != b"VP8 " or file[20] & 31 != 16:  # a key frame of version 0 that is shown
        return None
    length = int.from_bytes(file[16:20], "little")
    return varint(int.from_bytes(file[20:23], "little") >> 5) + file[30 : 20 + length]


def _webp_file(payload: bytes, quality: int, size: Size, greyscale: bool) -> bytes:
    first, start = read_varint(payload)
    frame = ((first << 5 | 16) & 0xFFFFFF).to_bytes(3, "little") + _VP8_START
    frame += size[1].to_bytes(2, "little") + size[0].to_bytes(2, "little") + payload[start:]
    chunk = b"VP8 " + len(frame).to_bytes(4, "little") + frame + b"\0" * (len(frame) % 2)
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


# AVIF

_LEVELS = (
    *((0, 147_456, 2048, 1152), (1, 278_784, 2816, 1584), (4, 665_856, 4352, 2448), (5, 1_065_024, 5504, 3096)),
    *((8, 2_359_296, 6144, 3456), (12, 8_912_896, 8192, 4352), (16, 35_651_584, 16_384, 8704)),
)
"""(number, most pixels, longest width, longest height) of AV1's levels (Annex A.3); larger pictures have number 31."""


def _level(size: Size) -> int:
    height, width = size
    fits = (n for n, pixels, w, h in _LEVELS if width * height <= pixels and width <= w and height <= h)
    return next(fits, 31)


def _sequence_header(quality: int, size: Size, greyscale: bool) -> bytes:
    """Of an AV1 still picture as libaom writes it (section 5.5): 8 bits, full range, BT.709 primaries, sRGB transfer,
    BT.601 matrix, 4:2:0 or greyscale; blocks of 64, all tools but superresolution and, in what is lossless,
    directional enhancement."""
    height, width = size
    columns, rows = (max(1, (side - 1).bit_length()) for side in (width, height))
    bits = f"00011{_level(size):05b}{columns - 1:04b}{rows - 1:04b}{width - 1:0{columns}b}{height - 1:0{rows}b}"
    bits += f"0110{int(quality < 100)}10{int(greyscale)}1{1:08b}{13:08b}{6:08b}1{'' if greyscale else '000'}01"
    nb_bytes = -(-len(bits) // 8)
    return int(bits.ljust(8 * nb_bytes, "0"), 2).to_bytes(nb_bytes)


def _stream_start(quality: int, size: Size, greyscale: bool) -> bytes:
    """Temporal delimiter, sequence header, and the byte that a frame begins with."""
    header = _sequence_header(quality, size, greyscale)
    return b"\x12\0\x0a" + bytes([len(header)]) + header + b"\x32"


def _box(kind: bytes, *parts: bytes) -> bytes:
    """A box of ISO/IEC 14496-12."""
    content = b"".join(parts)
    return (8 + len(content)).to_bytes(4) + kind + content


def _avif_payload(file: bytes, quality: int, size: Size, greyscale: bool) -> bytes | None:
    before, stream_start, after = file.partition(_stream_start(quality, size, greyscale))
    if not stream_start or before[-4:] != b"mdat":
        return None
    try:
        length, start = read_varint(after)
    except ValueError:
        return None
    return after[start:] if start + length == len(after) else None


def _avif_file(payload: bytes, quality: int, size: Size, greyscale: bool) -> bytes:
    """The boxes are those that libavif writes (AV1 Image File Format, section 2; ISO/IEC 23008-12)."""
    stream = _stream_start(quality, size, greyscale) + varint(len(payload)) + payload
    channels, level = (1 if greyscale else 3), _level(size)
    start = _box(b"ftyp", b"avif\0\0\0\0avifmif1miaf", b"" if greyscale else b"MA1B")
    properties = [
        _box(b"ispe", bytes(4), size[1].to_bytes(4), size[0].to_bytes(4)),
        _box(b"pixi", bytes(4), bytes([channels, *[8] * channels])),
        _box(b"av1C", bytes([0x81, level, 0x1C if greyscale else 0x0C, 0])),
        _box(b"colr", b"nclx\0\x01\0\x0d\0\x06\x80"),
    ]

    def meta(offset: int) -> bytes:
        return _box(
            b"meta",
            bytes(4),
            _box(b"hdlr", bytes(8) + b"pict" + bytes(13)),
            _box(b"pitm", bytes(4) + b"\0\x01"),
            _box(b"iloc", bytes(4) + b"\x44\0\0\x01\0\x01\0\0\0\x01", offset.to_bytes(4), len(stream).to_bytes(4)),
            _box(b"iinf", bytes(4) + b"\0\x01", _box(b"infe", b"\x02\0\0\0\0\x01\0\0av01Color\0")),
            _box(b"iprp", _box(b"ipco", *properties), _box(b"ipma", bytes(7) + b"\x01\0\x01\x04\x01\x02\x83\x04")),
        )

    return start + meta(len(start) + len(meta(0)) + 8) + _box(b"mdat", stream)


# JPEG XL


def _jxl_entry(length: int) -> bytes:
    """A table of contents of one section of at most 17,407 bytes (ISO/IEC 18181-1, F.3)."""
    return ((length << 2) if length < 1024 else (length - 1024 << 2 | 1)).to_bytes(2, "little")


@lru_cache(64)
def _jxl_shared(quality: int, size: Size, greyscale: bool) -> tuple[bytes, bytes]:
    """(the headers up to the table of contents, the section's beginning) that smooth pictures of this size share.

    They are the encoder's, whose version is one of the form's settings.  Empty for pictures of several sections.
    """
    if max(size) > 256:
        return b"", b""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [128 + 100 * np.sin(x / k) * np.cos(y / (k + 1)) for k in range(1, 6)]
    pictures = [wave.astype(np.uint8) for wave in [*waves, 128 + (x + 2 * y) % 64]]
    if not greyscale:
        pictures = [np.stack([picture, picture // 2, 255 - picture], axis=2) for picture in pictures]
    files = [_written(picture, "jxl", quality, CODECS["jxl"].options) for picture in pictures]
    heads, sections = zip(*(_jxl_parts(file) for file in files), strict=True)
    return (heads[0] if len(set(heads)) == 1 else b""), os.path.commonprefix(sections)[:-3]  # noqa: RUF071


def _jxl_parts(file: bytes) -> tuple[bytes, bytes]:
    """(the headers, the section): what is before and after a table of contents that says how much is after it.

    (the file, b"") where there is none, as in a picture of several sections.
    """
    for offset in range(2, min(24, len(file) - 2)):
        length = len(file) - offset - 2
        if length < 17_408 and file[offset : offset + 2] == _jxl_entry(length):
            return file[:offset], file[offset + 2 :]
    return file, b""


def _jxl_payload(file: bytes, quality: int, size: Size, greyscale: bool) -> bytes | None:
    (shared, beginning), (head, section) = _jxl_shared(quality, size, greyscale), _jxl_parts(file)
    is_like_others = section and head == shared and section.startswith(beginning)
    return section[len(beginning) :] if is_like_others else None


def _jxl_file(payload: bytes, quality: int, size: Size, greyscale: bool) -> bytes:
    head, beginning = _jxl_shared(quality, size, greyscale)
    return head + _jxl_entry(min(len(beginning + payload), 17_407)) + beginning + payload


_PROGRESSIVE = {"optimize": True, "progressive": True}
_BASELINE = {"optimize": False, "progressive": False}

CODECS = {
    "jpeg": Codec("JPEG", ".jpg", _PROGRESSIVE, (0, b"\xff\xd8"), _jpeg_payload, _jpeg_file, also=_BASELINE),
    "webp": Codec("WebP", ".webp", {"method": 6}, (0, b"RIFF"), _webp_payload, _webp_file),
    "avif": Codec("AVIF", ".avif", {"speed": 4}, (4, b"ftyp"), _avif_payload, _avif_file),
    "jxl": Codec("JXL", ".jxl", {"effort": 7}, (0, b"\xff\x0a"), _jxl_payload, _jxl_file),
}
