"""Pictures: JPEG, WebP or AVIF at a quality, as large as the image or smaller ("webp:10", "jpeg:30@64").

The decoded picture at its image's size is the only copy; no model is involved.
"""

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, features

from compress.forms import OTHERWISE, WRONG_SIZE, Form, Spec, decoded, files_named, reduced
from compress.presets import Preset
from utils.data.paths import FormFiles
from utils.errors import UserError

CODECS = {
    "jpeg": ("JPEG", ".jpg", {"optimize": True, "progressive": True}),
    "webp": ("WebP", ".webp", {"method": 6}),
    "avif": ("AVIF", ".avif", {"speed": 4}),
}
"""Form -> Pillow's name of the format, ending, and what else Pillow's encoder is told."""

MOST_DIFFERENT = 6.0
"""Levels of 255, on average, that two encoders of one format and quality may be apart; another image is farther."""


@dataclass(frozen=True)
class Picture(Form):
    """codec: in CODECS; quality: Pillow's, 0 to 100; side: the shorter side in pixels, None or more than the image's
    for its own size."""

    name: str
    codec: str
    quality: int
    side: int | None
    noun: str
    files: FormFiles
    needs_model = False
    deterministic = True

    def settings(self) -> dict[str, Any]:
        return {"codec": self.codec, "codec_quality": self.quality, "side": self.side, **CODECS[self.codec][2]}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        size = reduced(*image.shape[:2], self.side)
        return compressed(shrunk(image, size), self.codec, self.quality)

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """Another version of the encoder may give other bytes, but hardly another picture."""
        found, expected = decoded(kept), reduced(*image.shape[:2], self.side)
        if found.shape[:2] != expected:
            return WRONG_SIZE, f"{found.shape[1]} x {found.shape[0]} instead of {expected[1]} x {expected[0]} pixels"
        fresh = self.encode(image)
        if kept != fresh and np.abs(found - decoded(fresh).astype(np.float32)).mean() > MOST_DIFFERENT:
            return OTHERWISE, "the image gives another picture"
        return None


def compressed(image: np.ndarray, codec: str, quality: int) -> bytes:
    """An image (HxWx3 or HxW uint8) as a file of a codec of CODECS.  Raises OSError where a side is too long for it."""
    file, (kind, _, options) = io.BytesIO(), CODECS[codec]
    try:
        Image.fromarray(image).save(file, kind, quality=quality, **options)
    except (OSError, ValueError, RuntimeError) as error:  # which of them depends on the codec
        height, width = image.shape[:2]
        raise OSError(f"{width} x {height} pixels can't be written as {kind} ({error})") from error
    return file.getvalue()


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (HxWx3 or HxW uint8) at a smaller or equal size (height, width)."""
    return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def picture(spec: Spec, preset: Preset) -> Picture:
    codec, quality = spec.head, spec.argument or ""
    kind, ending, _ = CODECS[codec]
    if not quality.isdecimal() or not 0 <= int(quality) <= 100 or spec.plus:
        raise UserError(f"the form {codec!r} needs a quality, 0 to 100; a side may follow: {codec}:30, {codec}:30@64.")
    if codec != "jpeg" and not features.check(codec):
        raise UserError(f"this Pillow has no {kind} encoder: install a release of Pillow that has one.")
    files = files_named(spec.name, (ending,), ".png")
    return Picture(preset, spec.name, codec, int(quality), spec.side, f"{kind} picture", files)


EXAMPLES = [f"{codec}:Q{side}" for codec in CODECS for side in ("", "@SIDE")]
FORMS = dict.fromkeys(CODECS, picture)
