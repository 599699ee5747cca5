"""Text alone: nothing is kept of an image, and Stable Diffusion generates copies from its class's text.

Shows what the generator knows without any exemplar.  A copy's noise depends on the image's name and the copy's number,
so that the copies of a class differ; it has its image's size, which is not counted.
"""

from pathlib import Path
from typing import Any

import numpy as np

from compress.forms import OTHERWISE, Condition, Form, Spec
from compress.presets import Preset
from utils.errors import UserError


class Text(Form):
    """The kept files are empty: they mark what has been done."""

    name, noun = "text", "empty file"
    kept_endings = (".txt",)
    seeded_by_name = True

    def settings(self) -> dict[str, Any]:
        return {}

    def copy_settings(self) -> dict[str, Any]:
        return {"form": self.name, **super().copy_settings()}  # in the order of records so far

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        return b""

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        return Condition(self.preset.generated_size(*size))

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int:
        return 0

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        return (OTHERWISE, "it is not empty") if kept else None


def text(spec: Spec, preset: Preset) -> Text:
    if spec != Spec("text"):
        raise UserError("the form 'text' takes no argument.")
    return Text(preset)


FORMS = {"text": text}
