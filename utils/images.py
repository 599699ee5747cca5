"""Reading and writing image files: the one place where Pillow meets the disk."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

Image.init()
IMAGE_ENDINGS = frozenset(
    ending
    for ending, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("PDF", "MPEG")
)
"""Lower-case file endings that Pillow can read, with their dot."""

# What Pillow and its codecs raise for a file that is no picture, or a broken one.
_UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
_BITS_PER_PIXEL = {"1": 1, "L": 8, "I;16": 16, "I;16L": 16, "I;16B": 16, "I": 32, "F": 32}


def is_image(path: Path) -> bool:
    """Whether the file's ending, in any case, is one that Pillow reads.  Hidden files are never images."""
    return path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")


def read_image(path: Path) -> Image.Image:
    """The picture as RGB, fully decoded, so that a truncated file fails here and not later.

    Raises OSError, with the path in its message, for whatever is wrong with the file or its content.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits at 255 and leave a white picture
                return image.convert("I").point(lambda level: level * (1 / 256)).convert("L").convert("RGB")
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise OSError(f"{path}: {error}") from error


def image_bits(path: Path) -> tuple[int, int, int]:
    """(width, height, bits per pixel) of a picture, from its header alone.

    8 bits per pixel for greyscale, 24 for anything that becomes RGB, 1 for a bilevel picture.
    Raises OSError as `read_image` does.
    """
    try:
        with Image.open(path) as image:
            return image.width, image.height, _BITS_PER_PIXEL.get(image.mode, 24)
    except _UNREADABLE as error:
        raise OSError(f"{path}: {error}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file in the target's folder, then move it into place.

    A killed process leaves the old file or the new one, never a half one.  The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{os.getpid()}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
