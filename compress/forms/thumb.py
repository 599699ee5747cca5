"""Thumbnails that ControlNet fills in ("thumb:40@8"): a picture of a few pixels as the hint of copies.

An AVIF of quality Q whose shorter side has SIDE pixels is kept.  Enlarged to the generated size, in colour, it is what
the control network sees, so that copies keep its layout and differ in detail.  The control network must have been
trained on such hints: control_v11f1e_sd15_tile with Stable Diffusion 1.5, or a small one by ControlNet/train.py with
hint=thumb@SIDE.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from compress.forms import Condition, Spec, files_named
from compress.forms.picture import Picture, picture
from compress.presets import Preset
from utils.errors import UserError

CODEC = "avif"
"""What takes the fewest bytes at these sizes."""


@dataclass(frozen=True)
class Thumb(Picture):
    needs_model = True
    hint = "thumb"
    deterministic = False

    def copy_settings(self) -> dict[str, Any]:
        return {**super().copy_settings(), "form": self.name}

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        small, (height, width) = self.picture(kept, size, greyscale), self.preset.generated_size(*size)
        return Condition((height, width), hint=enlarged(small, height, width))


def enlarged(small: np.ndarray, height: int, width: int) -> np.ndarray:
    """The hint of a thumbnail: HxWx3 uint8, as ControlNet/train.py makes it."""
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def thumb(spec: Spec, preset: Preset) -> Thumb:
    if spec.side is None or spec.plus or not (spec.argument or "").isdecimal():
        raise UserError("the form 'thumb' needs a quality, 0 to 100, and a side: thumb:40@8.")
    kept = picture(Spec(CODEC, spec.argument, spec.side), preset)
    files = files_named(spec.name, kept.files.kept_endings, ".jpg")
    return Thumb(preset, spec.name, kept.codec, kept.quality, kept.side, "thumbnail", files)


EXAMPLES = ["thumb:Q@SIDE"]
FORMS = {"thumb": thumb}
