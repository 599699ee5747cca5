"""Pictures: JPEG, WebP, AVIF or JPEG XL at a quality, as large as the image or smaller ("webp:10", "jpeg:30@64").

The decoded picture at its image's size is the only copy; no model is involved.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from compress.forms import OTHERWISE, WRONG_SIZE, Condition, Form, Spec, decoded, files_named, reduced
from compress.presets import Preset
from utils.data import codecs
from utils.data.codecs import CODECS
from utils.data.paths import FormFiles
from utils.errors import UserError

MOST_DIFFERENT = 6.0
"""Levels of 255, on average, that two encoders of one format and quality may be apart; another image is farther."""


@dataclass(frozen=True)
class Picture(Form):
    """codec: in CODECS; quality: Pillow's, 0 to 100; side: the shorter side in pixels, None or more than the image's
    for its own size.

    Kept is the codec's payload (`utils.data.codecs`), or a whole file of earlier versions.
    """

    name: str
    codec: str
    quality: int
    side: int | None
    noun: str
    files: FormFiles
    needs_model = False
    deterministic = True

    def settings(self) -> dict[str, Any]:
        encoder = codecs.version(self.codec)
        about = {"codec": self.codec, "codec_quality": self.quality, "side": self.side, **CODECS[self.codec].options}
        return about | ({"encoder": encoder} if encoder else {})

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        height, width = image.shape[:2]
        size = reduced(height, width, self.side)
        return codecs.encoded(shrunk(image, size), self.codec, self.quality)

    def payload(self, kept: bytes, size: tuple[int, int], greyscale: bool) -> bytes:
        if not codecs.is_file(kept, self.codec):
            return kept
        return codecs.stripped(kept, self.codec, self.quality, reduced(*size, self.side), greyscale)

    def picture(self, kept: bytes, size: tuple[int, int], greyscale: bool) -> np.ndarray:
        """The picture that is kept of an image of this (height, width): HxWx3 uint8.  Raises OSError."""
        if not kept:
            raise OSError("the file is empty")
        try:
            file = codecs.file_of(kept, self.codec, self.quality, reduced(*size, self.side), greyscale)
        except (ValueError, OverflowError) as error:  # what is no payload, or a size that no such file has
            raise OSError(f"no {self.noun} ({error})") from error
        return decoded(file)

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        picture = self.picture(kept, size, greyscale)
        return Condition(picture.shape[:2], start=picture)

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """Another version of the encoder may give other bytes, but hardly another picture."""
        (height, width), greyscale = image.shape[:2], image.ndim == 2
        size, expected = (height, width), reduced(height, width, self.side)
        decoded_picture = self.picture(kept, size, greyscale)
        if decoded_picture.shape[:2] != expected:
            made = f"{decoded_picture.shape[1]} x {decoded_picture.shape[0]}"
            return WRONG_SIZE, f"{made} instead of {expected[1]} x {expected[0]} pixels"
        fresh = self.encode(image)
        if kept != fresh:
            difference = np.abs(decoded_picture - self.picture(fresh, size, greyscale).astype(np.float32)).mean()
            if difference > MOST_DIFFERENT:
                return OTHERWISE, "the image gives another picture"
        return None


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (HxWx3 or HxW uint8) at a smaller or equal size (height, width)."""
    return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)


def picture(spec: Spec, preset: Preset) -> Picture:
    codec, quality, best = spec.head, spec.argument or "", 99 if spec.head == "jxl" else 100
    if not quality.isdecimal() or not 0 <= int(quality) <= best or spec.plus:
        raise UserError(
            f"the form {codec!r} needs a quality, 0 to {best}; a side may follow: {codec}:30, {codec}:30@64."
        )
    codecs.check_codec(codec)
    files = files_named(spec.name, (".bin", CODECS[codec].ending), ".png")
    return Picture(preset, spec.name, codec, int(quality), spec.side, f"{CODECS[codec].kind} picture", files)


EXAMPLES = [f"{codec}:Q{side}" for codec in CODECS for side in ("", "@SIDE")]
FORMS = dict.fromkeys(CODECS, picture)
