"""An edge map and a small picture in one file ("edges+webp:10@32"): the one has the lines, the other the colours.

Copies are generated image to image: they start from the picture, resized to the generated size and noised, under the
edge map's control.  `Sampling.start_strength` is the share of the steps that change it (Meng et al. 2022, "SDEdit:
Guided Image Synthesis and Editing with Stochastic Differential Equations").
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.forms import Condition, Form, Spec, decoded, files_named, form_named, resize_back
from compress.forms.edges import Edges, edges
from compress.forms.picture import CODECS, Picture
from compress.presets import Preset
from utils.errors import UserError

LENGTH = struct.Struct("<I")
"""The first bytes of a kept file: how many of those that follow are the edge map's.  The picture's are the rest."""


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
        edge_map = self.edges.encode(image)
        return LENGTH.pack(len(edge_map)) + edge_map + self.picture.encode(image)

    def condition(self, kept: bytes, size: tuple[int, int]) -> Condition:
        edge_map, picture = parts(kept)
        condition = self.edges.condition(edge_map, size)
        return Condition(condition.size, condition.hint, resize_back(decoded(picture), *condition.size))

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        edge_map, picture = parts(kept)
        return self.edges.check(edge_map, image) or self.picture.check(picture, image)


def parts(kept: bytes) -> tuple[bytes, bytes]:
    """The files of the edge map and of the picture.  Raises OSError for bytes that are not those two."""
    length = LENGTH.unpack_from(kept)[0] if len(kept) > LENGTH.size else 0
    end = LENGTH.size + length
    if not length or end >= len(kept):
        raise OSError("not an edge map and a picture" if kept else "the file is empty")
    return kept[LENGTH.size : end], kept[end:]


def edges_and_picture(spec: Spec, preset: Preset) -> EdgesAndPicture:
    if spec.plus.head not in CODECS:
        raise UserError(f"after 'edges+' comes a picture, such as edges+webp:10@32, not {spec.plus.name!r}.")
    alone = edges(Spec(spec.head, spec.argument, spec.side), preset)
    return EdgesAndPicture(preset, spec.name, alone, form_named(spec.plus.name, preset))


EXAMPLES = ["edges+webp:Q@SIDE"]
FORMS = {"edges+": edges_and_picture}
