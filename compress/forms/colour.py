"""Tiny pictures in a codec of the project's own ("colour@16", 34 bytes a photograph): low frequencies, static tables.

The picture, reduced to SIDE pixels, is kept as quantised cosine coefficients under the arithmetic coder of
`compress.coding.colour`, which has no header.  Enlarged to its image's size it is the only copy; no model is involved.
At these sizes the code takes fewer bytes than any codec of `compress.forms.picture`: it is the codec that prompts of
10 to 40 bytes are to be compared with.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.coding import colour
from compress.coding.arithmetic import Decoder, encoded
from compress.forms import OTHERWISE, Condition, Form, Spec, files_named, reduced
from compress.forms.picture import shrunk
from compress.presets import Preset
from utils.data.paths import FormFiles
from utils.errors import UserError


@dataclass(frozen=True)
class Colour(Form):
    """side: the shorter side in pixels."""

    name: str
    side: int
    files: FormFiles
    noun = "tiny picture"
    needs_model = False
    deterministic = True

    def settings(self) -> dict[str, Any]:
        return {"side": self.side}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        height, width = image.shape[:2]
        return encoded(*colour.bits_of(shrunk(image, reduced(height, width, self.side))))

    def picture(self, kept: bytes, size: tuple[int, int]) -> np.ndarray:
        """The tiny picture of an image of this (height, width): HxWx3 uint8.  Raises OSError."""
        if not kept:
            raise OSError("the file is empty")
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
        self.picture(kept, (image.shape[0], image.shape[1]))
        return OTHERWISE, "the image gives other colours"


def tiny(spec: Spec, preset: Preset) -> Colour:
    if spec.argument is not None or spec.plus or not spec.side:
        raise UserError("the form 'colour' needs a side in pixels and nothing else: colour@16.")
    return Colour(preset, spec.name, spec.side, files_named(spec.name, (".bin",), ".png"))


EXAMPLES = ["colour@SIDE"]
FORMS = {"colour": tiny}
