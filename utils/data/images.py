"""Reading image files with Pillow, as viewers show them: rotated by their EXIF orientation, on white where they are
transparent, and the first frame of several.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from utils.errors import UserError

Image.init()
# Pillow has Ghostscript or Windows execute EPS and WMF files; the others are no pictures.
_LEFT_OUT = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
_FORMATS = tuple(sorted(Image.OPEN.keys() - _LEFT_OUT, key=lambda kind: (kind not in ("JPEG", "PNG", "WEBP"), kind)))
"""Formats that files are tried as, frequent ones first: formats without a magic number take time to rule out."""
_PICTURES_NOT_READ = {".eps", ".heic", ".heif", ".jxl", ".svg", ".wmf"}  # they are reported, and not ignored
IMAGE_ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in _FORMATS}
IMAGE_ENDINGS |= _PICTURES_NOT_READ
"""Lower-case file endings of images, with the dot."""

MAX_PIXELS = 90_000_000
"""Larger pictures are refused as decompression bombs: these take a quarter of a GiB as RGB."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this, and raises above twice as many
warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd files that it can read

_BITS_PER_PIXEL = {"1": 1, "L": 8, "LA": 8, "I": 32, "F": 32}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright (Exif 2.32, 4.6.4 A)."""


def is_image(path: PurePath) -> bool:
    """Whether the file's ending, in any case, is that of an image.  Hidden files are no images."""
    return path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")


def read_image(path: str | Path) -> Image.Image:
    """The picture as RGB, fully decoded: a truncated file fails here and not later.

    Raises OSError, with the path in its message, for anything that is wrong with the file or its content, more than
    MAX_PIXELS, and 32 bits a channel, whose range is unknown.
    """
    with _opened(path) as image:
        turn = _TURNS.get(_orientation(image))
        picture = _as_rgb(image)
        return picture if turn is None else picture.transpose(turn)


def image_bits(path: Path) -> tuple[int, int, int]:
    """(width, height, bits per pixel) of the upright picture, from its header alone.

    Bits per pixel: 1 for bilevel, 8 for greyscale, 16 and 32 for deeper greyscale, 24 for anything else.
    Raises OSError as `read_image` does.
    """
    with _opened(path) as image:
        width, height = image.size
        if _orientation(image) >= 5:
            width, height = height, width
        return width, height, 16 if _is_sixteen_bit_grey(image) else _BITS_PER_PIXEL.get(image.mode, 24)


class UnreadableImage(UserError):
    """A picture that can't be decoded; the message names the file."""

    def __init__(self, message: str):
        # A DataLoader re-raises its workers' errors with their traceback as the message: its last line is enough.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_prepared(path: str | Path, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """A picture, decoded and prepared for a transform: H x W x 3, uint8.

    Raises UnreadableImage, also where the picture with its shorter side resized to 256 would exceed MAX_PIXELS.
    """
    try:
        image = read_image(path)
        shorter, longer = sorted(image.size)
        if longer / shorter * 256**2 > MAX_PIXELS:
            raise OSError(f"{path}: {image.width} x {image.height} pixels are too elongated to be resized")
        return prepare(image)
    except OSError as error:
        raise UnreadableImage(f"cannot read image {error}. Replace the file or take it away.") from error


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture with its header read.  Any error, also in the `with` body, becomes an OSError with the path."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device may never end
            raise OSError("not a file, but a folder, pipe or device")
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except Exception as error:  # decoders raise anything for a broken file
        raise OSError(f"{path}: {_reason(error, path)}") from error


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow reads" if os.path.getsize(path) else "the file is empty"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 ... 8, where it precedes the pixels; 1 for broken or no metadata."""
    if image.format == "TIFF":
        return 1  # Pillow rotates these itself
    try:
        # The base class's method: PngImageFile's would decode the picture first.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        return orientation if orientation in _TURNS else 1
    except Exception:
        return 1


def _is_sixteen_bit_grey(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _as_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if _is_sixteen_bit_grey(image):  # Pillow's convert("L") would clip it at 255
        return image.convert("I").point(lambda level: level * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise OSError("32 bits a channel, whose range is unknown: save it with 8 or 16")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")
