"""Pictures as forms take and return them."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.data.images import image_bits, read_image

PICTURES = ("WEBP", "PNG", "BMP", "JPEG", "AVIF", "JXL")
"""Pillow's names of the formats that are kept; the last one is a plugin's."""


def pixels(image: Path) -> np.ndarray:
    """A train image as forms take it: HxWx3 uint8, HxW for a greyscale one.  Raises OSError with the path."""
    picture = np.asarray(read_image(image))
    return picture if image_bits(image)[2] == 24 else np.ascontiguousarray(picture[:, :, 0])


def decoded(kept: bytes) -> np.ndarray:
    """A kept picture (HxWx3 uint8).  Raises OSError for bytes that are none."""
    try:
        with Image.open(io.BytesIO(kept), formats=[kind for kind in PICTURES if kind in Image.OPEN]) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # a broken file makes decoders raise anything
        reason = "not a picture that Pillow reads" if kept else "the file is empty"
        raise OSError(reason if isinstance(error, Image.UnidentifiedImageError) else str(error)) from error


def resize_back(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A generated picture (HxWx3 uint8) at its image's size, height x width.

    The published rule: Lanczos where the generated picture's shorter side is at most the image's, else by area.
    """
    enlarge = min(picture.shape[:2]) <= min(height, width)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LANCZOS4 if enlarge else cv2.INTER_AREA)
