"""Text alone: nothing is kept of an image, and Stable Diffusion generates copies from its class's text.

Shows what the generator knows without any exemplar.  A copy's noise depends on the image's name and the copy's number,
so that the copies of a class differ; it has its image's size, which is not counted.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.forms import OTHERWISE, Condition, Form, Spec, files_named
from compress.presets import Preset
from utils.data.paths import FormFiles
from utils.errors import UserError

FILES = files_named("text", (".txt",), ".jpg")


@dataclass(frozen=True)
class Text(Form):
    """The kept files are empty: they mark what has been done."""

    name: str = "text"
    noun: str = "empty file"
    files: FormFiles = FILES

    def settings(self) -> dict[str, Any]:
        return {}

    def copy_settings(self) -> dict[str, Any]:
        return {"form": self.name, **super().copy_settings()}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        return b""

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        return Condition(self.preset.generated_size(*size))

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int:
        return 0

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        return (OTHERWISE, "it is not empty") if kept else None

    def seed(self, image: Path, copy_number: int) -> int:
        return seed_by_name(image, copy_number)


def seed_by_name(image: Path, copy_number: int) -> int:
    """A seed that differs between images and between copies, in 32 bits: torch's generator ignores the higher ones."""
    return zlib.crc32(bytes(f"{image.stem}/{copy_number}", "utf-8", "surrogateescape"))


def text(spec: Spec, preset: Preset) -> Text:
    if spec != Spec("text"):
        raise UserError("the form 'text' takes no argument.")
    return Text(preset)


FORMS = {"text": text}
