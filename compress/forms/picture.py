"""Pictures: what a codec keeps of an image, as large as the image or smaller.

"webp:10", "jpeg:30@64": JPEG, WebP, AVIF or JPEG XL at a quality.  The decoded picture at its image's size is the only
copy; no model is involved.
"colour@16" (34 bytes a photograph): quantised cosine coefficients under the arithmetic coder of
`compress.coding.colour`, which has no header, so it takes fewer bytes than any codec at these sizes: it is the codec
that prompts of 10 to 40 bytes are to be compared with.
"thumb:40@8": an AVIF of a few pixels that, enlarged to the generated size in colour, is what the control network sees,
so that copies keep its layout and differ in detail.  It must have been trained on such hints: control_v11f1e_sd15_tile
with Stable Diffusion 1.5, or a small one by ControlNet/train.py with hint=thumb@SIDE.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from compress.coding import colour
from compress.coding.arithmetic import Decoder, encoded
from compress.forms import OTHERWISE, WRONG_SIZE, Condition, Form, Spec, decoded, reduced, resized
from compress.presets import Preset
from utils.data import codecs
from utils.data.codecs import CODECS
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
    needs_model = False
    deterministic = True

    @property
    def noun(self) -> str:  # type: ignore[override]
        return f"{CODECS[self.codec].kind} picture"

    @property
    def kept_endings(self) -> tuple[str, ...]:  # type: ignore[override]
        return ".bin", CODECS[self.codec].ending

    def settings(self) -> dict[str, Any]:
        encoder = codecs.version(self.codec)
        about = {"codec": self.codec, "codec_quality": self.quality, "side": self.side, **CODECS[self.codec].options}
        return about | ({"encoder": encoder} if encoder else {})

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        height, width = image.shape[:2]
        return codecs.encoded(resized(image, reduced(height, width, self.side)), self.codec, self.quality)

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
        if kept == fresh:
            return None
        difference = np.abs(decoded_picture - self.picture(fresh, size, greyscale).astype(np.float32)).mean()
        return (OTHERWISE, "the image gives another picture") if difference > MOST_DIFFERENT else None


@dataclass(frozen=True)
class Thumb(Picture):
    noun = "thumbnail"
    needs_model = True
    hint = "thumb"
    deterministic = False

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        small, (height, width) = self.picture(kept, size, greyscale), self.preset.generated_size(*size)
        return Condition((height, width), hint=enlarged(small, height, width))


def enlarged(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """The hint of a thumbnail: HxWx3 uint8, as ControlNet/train.py makes it."""
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@dataclass(frozen=True)
class Colour(Form):
    """side: the shorter side in pixels."""

    name: str
    side: int
    noun = "tiny picture"
    needs_model = False
    deterministic = True

    def settings(self) -> dict[str, Any]:
        return {"side": self.side}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        height, width = image.shape[:2]
        return encoded(*colour.bits_of(resized(image, reduced(height, width, self.side))))

    def picture(self, kept: bytes, size: tuple[int, int]) -> np.ndarray:
        """The tiny picture of an image of this (height, width): HxWx3 uint8.  Raises OSError."""
        decoder = Decoder(kept)
        picture = colour.read(decoder, *reduced(*size, self.side))
        decoder.check_end()
        return picture

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        picture = self.picture(kept, size)
        return Condition(picture.shape[:2], start=picture)

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        if kept == self.encode(image):
            return None
        self.picture(kept, image.shape[:2])
        return OTHERWISE, "the image gives other colours"


def picture(spec: Spec, preset: Preset) -> Picture:
    codec, quality, best = spec.head, spec.argument or "", 99 if spec.head == "jxl" else 100
    if not quality.isdecimal() or not 0 <= int(quality) <= best or spec.plus:
        raise UserError(
            f"the form {codec!r} needs a quality, 0 to {best}; a side may follow: {codec}:30, {codec}:30@64."
        )
    codecs.check_codec(codec)
    return Picture(preset, spec.name, codec, int(quality), spec.side)


def thumb(spec: Spec, preset: Preset) -> Thumb:
    if spec.side is None or spec.plus or not (spec.argument or "").isdecimal():
        raise UserError("the form 'thumb' needs a quality, 0 to 100, and a side: thumb:40@8.")
    kept = picture(Spec("avif", spec.argument, spec.side), preset)  # the codec of the fewest bytes at these sizes
    return Thumb(preset, spec.name, kept.codec, kept.quality, kept.side)


def tiny(spec: Spec, preset: Preset) -> Colour:
    if spec.argument is not None or spec.plus or not spec.side:
        raise UserError("the form 'colour' needs a side in pixels and nothing else: colour@16.")
    return Colour(preset, spec.name, spec.side)


EXAMPLES = [*(f"{codec}:Q{side}" for codec in CODECS for side in ("", "@SIDE")), "colour@SIDE", "thumb:Q@SIDE"]
FORMS = {**dict.fromkeys(CODECS, picture), "colour": tiny, "thumb": thumb}
