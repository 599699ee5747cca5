"""What training reads and writes: pictures within bounds, paths of a user, files that are whole or not there.

The project has the same in `utils`, from which nothing here is imported: this folder also works on its own.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ControlNet.cldm.model import ModelError

MAX_PIXELS = 90_000_000
LONGEST_SIDE = 32767
"""OpenCV's maps take no longer one."""


class UnreadableImage(ModelError):
    """A DataLoader re-raises its workers' errors with their traceback as the message; only its last line is kept."""

    def __init__(self, message: str):
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def read_picture(file: Path) -> np.ndarray:
    """A picture as RGB.  Raises UnreadableImage, which names the file, also for one of more pixels than memory has."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS or max(image.size) >= LONGEST_SIDE:
                raise OSError(f"{image.width} x {image.height} pixels are too many to train on")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise anything for a broken file
        raise UnreadableImage(f"cannot read image {file}: {error}") from error


def user_path(text: str) -> Path:
    """~ is the home folder."""
    return Path(text).expanduser()


def move_into_place(path: Path, temporary: Path) -> None:
    """Move a written file into place, so that a power failure leaves the old one or the new one."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
