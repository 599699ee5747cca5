"""An edge map and a small picture in one file ("edges+webp:10@32"): the one has the lines, the other the colours.

Copies are generated image to image: they start from the picture, resized to the generated size and noised, under the
edge map's control.  `Sampling.start_strength` is the share of the steps that change it (Meng et al. 2022, "SDEdit:
Guided Image Synthesis and Editing with Stochastic Differential Equations").
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.forms import Condition, Form, Spec, files_named, form_named, resize_back
from compress.forms.edges import Edges, edges
from compress.forms.picture import Picture
from compress.presets import Preset
from utils.data.codecs import CODECS
from utils.data.varint import read_varint, varint
from utils.errors import UserError

_EARLIER = struct.Struct("<I")
"""Earlier versions wrote the edge map's length in four bytes, and whole files of edge map and picture."""


@dataclass(frozen=True)
class EdgesAndPicture(Form):
    """edges, picture: the two forms whose files are kept together."""

    name: str
    edges: Edges
    picture: Picture
    noun = "file of edge map and picture"
    has_start = True

    @property
    def files(self):
        return files_named(self.name, (".bin",), ".jpg")

    def settings(self) -> dict[str, Any]:
        return {**self.edges.settings(), "picture": self.picture.name, "picture_settings": self.picture.settings()}

    def copy_settings(self) -> dict[str, Any]:
        return {**super().copy_settings(), "form": self.name}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        return joined(self.edges.encode(image), self.picture.encode(image))

    def payload(self, kept: bytes, size: tuple[int, int], greyscale: bool) -> bytes:
        edge_map, picture = parts(kept)
        return joined(self.edges.payload(edge_map, size, greyscale), self.picture.payload(picture, size, greyscale))

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        edge_map, picture = parts(kept)
        condition = self.edges.condition(edge_map, size, greyscale)
        start = self.picture.picture(picture, size, greyscale)
        return Condition(condition.size, condition.hint, resize_back(start, *condition.size))

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        edge_map, picture = parts(kept)
        return self.edges.check(edge_map, image) or self.picture.check(picture, image)


def joined(edge_map: bytes, picture: bytes) -> bytes:
    """The length of the edge map, the edge map, and the picture."""
    return varint(len(edge_map)) + edge_map + picture


def parts(kept: bytes) -> tuple[bytes, bytes]:
    """What is kept of the edge map and of the picture.  Raises OSError for bytes that are not those two."""
    if kept[4:8] in (b"RIFF", b"\x89PNG"):
        length, start = _EARLIER.unpack_from(kept)[0], _EARLIER.size
    else:
        try:
            length, start = read_varint(kept)
        except ValueError:
            length, start = 0, 0
    end = start + length
    if not length or end >= len(kept):
        raise OSError("not an edge map and a picture" if kept else "the file is empty")
    return kept[start:end], kept[end:]


def edges_and_picture(spec: Spec, preset: Preset) -> EdgesAndPicture:
    if spec.plus.head not in CODECS:
        raise UserError(f"after 'edges+' comes a picture, such as edges+webp:10@32, not {spec.plus.name!r}.")
    alone = edges(Spec(spec.head, spec.argument, spec.side), preset)
    return EdgesAndPicture(preset, spec.name, alone, form_named(spec.plus.name, preset))


EXAMPLES = ["edges+webp:Q@SIDE"]
FORMS = {"edges+": edges_and_picture}
