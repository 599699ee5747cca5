"""An edge map and a small picture in one file: the one has the lines, the other the colours.

"edges+webp:10@32" keeps a codec's picture; "edges+colour@16" keeps a tiny picture's low frequencies in 10 to 40 bytes,
in one code with the edge map (`compress.coding.colour`).  Either edge map may be smaller or a sketch:
"edges:1.5@64+colour@16".  Copies are generated image to image: they start from the picture, resized to the generated
size and noised, under the edge map's control.  `Sampling.start_strength` is the share of the steps that change it (Meng
et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations").
"""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.coding import colour, edge_maps
from compress.coding.arithmetic import Decoder, encoded
from compress.forms import OTHERWISE, Condition, Form, Spec, form_named, reduced, resize_back, resized
from compress.forms.edges import SKETCH, Edges, edges, is_picture
from compress.forms.picture import Picture
from compress.presets import Preset
from utils.data.codecs import CODECS, read_varint, varint
from utils.errors import UserError

_EARLIER = struct.Struct("<I")
"""Earlier versions wrote the edge map's length in four bytes, and whole files of edge map and picture."""


@dataclass(frozen=True)
class _EdgesAndStart(Form):
    """edges: the form of the edge map."""

    name: str
    edges: Edges
    has_start = True
    hint = "edges"

    def copy_settings(self) -> dict[str, Any]:
        settings = super().copy_settings()
        name = settings.pop("form")
        return {**settings, **(SKETCH if self.edges.sigma else {}), "form": name}

    def under(self, condition: Condition, start: np.ndarray) -> Condition:
        """An edge map's condition, with a picture of any size to start from."""
        return Condition(condition.size, condition.hint, resize_back(start, *condition.size))


@dataclass(frozen=True)
class EdgesAndPicture(_EdgesAndStart):
    """picture: the form of the picture.  A kept file is the length of the edge map's code (seven bits a byte, the
    lowest first, the eighth tells that more follow), that code, and what the picture's form keeps."""

    picture: Picture
    noun = "file of edge map and picture"

    def settings(self) -> dict[str, Any]:
        return {**self.edges.settings(), "picture": self.picture.name, "picture_settings": self.picture.settings()}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        return _joined(self.edges.encode(image), self.picture.encode(image))

    def payload(self, kept: bytes, size: tuple[int, int], greyscale: bool) -> bytes:
        edge_map, picture = parts(kept)
        return _joined(self.edges.payload(edge_map, size, greyscale), self.picture.payload(picture, size, greyscale))

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        edge_map, picture = parts(kept)
        start = self.picture.picture(picture, size, greyscale)
        return self.under(self.edges.condition(edge_map, size, greyscale), start)

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        edge_map, picture = parts(kept)
        return self.edges.check(edge_map, image) or self.picture.check(picture, image)


def _joined(edge_map: bytes, picture: bytes) -> bytes:
    return varint(len(edge_map)) + edge_map + picture


@dataclass(frozen=True)
class EdgesAndColour(_EdgesAndStart):
    """side: shorter side of the tiny picture in pixels.  A kept file is one code, of the picture and the edge map."""

    side: int
    noun = "edge-and-colour code"

    def settings(self) -> dict[str, Any]:
        return {**self.edges.settings(), "colour_side": self.side}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        height, width = image.shape[:2]
        small = resized(image, reduced(height, width, self.side))
        coded = [colour.bits_of(small), edge_maps.bits_of(self.edges.edges(image))]
        return encoded(*(first + second for first, second in zip(*coded, strict=True)))

    def decoded(self, kept: bytes, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(the tiny picture, HxWx3 uint8; the edge map, HxW uint8) of an image of size (height, width)."""
        decoder = Decoder(kept)
        parts = colour.read(decoder, *reduced(*size, self.side)), edge_maps.read(decoder, *self.edges.edge_size(*size))
        decoder.check_end()
        return parts

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        picture, edge_map = self.decoded(kept, size)
        return self.under(self.edges.shown(edge_map, size), picture)

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        if kept == self.encode(image):
            return None
        self.decoded(kept, image.shape[:2])
        return OTHERWISE, "the image gives other edges or colours"


def parts(kept: bytes) -> tuple[bytes, bytes]:
    """What is kept of the edge map and of the picture.  Raises OSError for bytes that are not those two."""
    if is_picture(kept[_EARLIER.size :]):
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


def edges_and(spec: Spec, preset: Preset) -> Form:
    alone, plus = edges(Spec(spec.head, spec.argument, spec.side), preset), spec.plus
    assert plus is not None  # the head ends in "+"
    if plus.head == "colour" and plus.argument is None and plus.side:
        return EdgesAndColour(preset, spec.name, alone, plus.side)
    if plus.head not in CODECS:
        raise UserError(
            f"after 'edges+' comes a picture, such as edges+colour@16 or edges+webp:10@32, not {plus.name!r}."
        )
    picture = form_named(plus.name, preset)
    assert isinstance(picture, Picture)
    return EdgesAndPicture(preset, spec.name, alone, picture)


EXAMPLES = ["edges+colour@SIDE", "edges+webp:Q@SIDE"]
FORMS = {"edges+": edges_and}
