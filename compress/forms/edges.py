"""Edge maps: a 1-bit Canny edge map and the class's text, from which ControlNet generates copies (the paper's form).

The map is kept as `compress.coding.edge_maps` codes it, without its size, which follows from the image's and the
settings.  Maps of earlier versions (.webp, .png) and of the published scripts (.bmp) are pictures with a header.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from compress.coding.edge_maps import coder_digest, decode, encode
from compress.forms import OTHERWISE, WRONG_SIZE, Condition, Form, Spec, decoded, reduced, resized
from compress.presets import Preset
from ControlNet.annotator.canny import CannyDetector
from ControlNet.annotator.util import HWC3
from utils.data.images import image_bits
from utils.data.paths import FormFiles
from utils.errors import UserError

SKETCH = {"low_threshold": 60, "high_threshold": 120, "smallest_fragment": 30}
"""Settings of sketches: Canny's thresholds, and the pixels of the smallest fragment of a map whose shorter side is 224;
of other maps, in proportion to the side, as a line's length is."""

_find_edges = CannyDetector()


@dataclass(frozen=True)
class Edges(Form):
    """The edge map has the image's own size, the generated size where the preset says so, or a smaller one.

    side: shorter side of the smaller edge map in pixels, None for the preset's size; sigma: of the blur of a sketch
    (`sketched`), in pixels of the edge map, None for the preset's Canny of the image as it is.
    """

    name: str = "edges"
    side: int | None = None
    sigma: float | None = None
    noun = "edge map"
    kept_endings = (".edges", ".webp")
    hint = "edges"

    @property
    def files(self) -> FormFiles:
        return FormFiles() if self.name == "edges" else super().files

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"edge_coder": coder_digest()}
        names = ["low_threshold", "high_threshold"]
        if self.sigma is not None:
            names, settings = [], {**settings, "sigma": self.sigma, **SKETCH}
        if self.side is not None:
            settings = {"side": self.side, **settings}
        else:
            names.append("edges_of_generated_size")
            if self.preset.edges_of_generated_size:
                names += ["shorter_side", "small_shorter_side", "max_pixels"]
        return settings | {name: getattr(self.preset, name) for name in names}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        return encode(self.edges(image))

    def edges(self, image: np.ndarray) -> np.ndarray:
        """The edge map: HxW uint8, 255 on an edge and 0 elsewhere."""
        image = resized(HWC3(image), self.edge_size(*image.shape[:2]))
        if self.sigma is not None:
            return sketched(image, self.sigma)
        return _find_edges(image, self.preset.low_threshold, self.preset.high_threshold)

    def edge_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the edge map of an image of this height and width."""
        if self.side is not None:
            return reduced(height, width, self.side)
        return self.preset.generated_size(height, width) if self.preset.edges_of_generated_size else (height, width)

    def copy_settings(self) -> dict[str, Any]:
        settings = super().copy_settings()
        if self.sigma is not None:
            settings |= {"sigma": self.sigma, **SKETCH}
        return settings if self.side is None else {**settings, "side": self.side}

    def payload(self, kept: bytes, size: tuple[int, int], greyscale: bool) -> bytes:
        """The code, also of a map that an earlier version or a published script wrote as a picture."""
        if not is_picture(kept):
            return kept
        edges = read(kept, size)
        return encode(edges) if edges.shape == self.edge_size(*size) else kept

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        return self.shown(read(kept, self.edge_size(*size)), size)

    def shown(self, edges: np.ndarray, size: tuple[int, int]) -> Condition:
        """An edge map (HxW uint8) at the generated size of an image of this size, by nearest neighbour."""
        height, width = self.preset.generated_size(*size)
        if edges.shape != (height, width):
            edges = cv2.resize(edges, (width, height), interpolation=cv2.INTER_NEAREST)
        return Condition((height, width), hint=edges)

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int:
        """One a pixel of the edge map, also where an older file spends eight on it."""
        if kept is not None and kept.suffix != self.kept_endings[0]:
            width, height, _ = image_bits(kept)
            return height * width
        return math.prod(self.edge_size(height, width))

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """Bit for bit; a published script's .bmp, whose image decoder is unknown, by its size alone."""
        size, edges = self.edge_size(*image.shape[:2]), self.edges(image)
        if kept == encode(edges):
            return None  # in less time than it takes to decode it
        kept_edges = read(kept, size)
        if kept_edges.shape != size:
            return WRONG_SIZE, f"{kept_edges.shape[1]} x {kept_edges.shape[0]} instead of {size[1]} x {size[0]} pixels"
        of_published_scripts = is_picture(kept) and kept.startswith(b"BM")
        is_same = of_published_scripts or np.array_equal(kept_edges, edges)
        return None if is_same else (OTHERWISE, "its edges are not those of the image")

    def recoded(self, kept: bytes, image: np.ndarray) -> bytes | None:
        """Of the published scripts' maps those alone that are this version's too, to be checked bit for bit then."""
        edges = self.edges(image)
        return encode(edges) if np.array_equal(read(kept, edges.shape), edges) else None


def sketched(image: np.ndarray, sigma: float) -> np.ndarray:
    """The edge map (HxW uint8, 0 or 255) of a blurred image (HxWx3 uint8), without small fragments.

    Fragments are sets of edge pixels that touch, diagonally too.
    """
    blurred = cv2.GaussianBlur(image, (0, 0), sigma)
    edges = _find_edges(blurred, SKETCH["low_threshold"], SKETCH["high_threshold"])
    _, fragments, stats, _ = cv2.connectedComponentsWithStats(edges, connectivity=8)
    least = round(SKETCH["smallest_fragment"] * min(edges.shape) / 224)
    kept = stats[:, cv2.CC_STAT_AREA] >= least
    kept[0] = False  # the background
    return np.where(kept[fragments], np.uint8(255), np.uint8(0))


def read(kept: bytes, size: tuple[int, int]) -> np.ndarray:
    """A kept edge map: HxW uint8, 0 or 255.

    size: (height, width) of a coded one; a picture of earlier versions or of the published scripts has its own.
    Raises OSError for broken bytes.
    """
    if not is_picture(kept):
        return decode(kept, *size)
    return np.where(decoded(kept)[:, :, 0] > 127, np.uint8(255), np.uint8(0))


def is_picture(kept: bytes) -> bool:
    """Whether the bytes begin as a WebP, PNG or BMP does, which no code does but by a chance of less than 2^-47."""
    webp, bmp = kept[:4] == b"RIFF" and kept[8:12] == b"WEBP", kept[:2] == b"BM" and kept[6:10] == bytes(4)
    return webp or bmp or kept.startswith(b"\x89PNG\r\n\x1a\n")


def edges(spec: Spec, preset: Preset) -> Edges:
    sigma = None
    if spec.argument is not None:
        if not re.fullmatch(r"\d{1,2}(\.\d{1,2})?", spec.argument) or not float(spec.argument):
            raise UserError(
                "the form 'edges' takes the sigma of a blur in pixels (at most 99.99), a side, or both: "
                "edges:1.5, edges@64, edges:1.5@64."
            )
        sigma = float(spec.argument)
    return Edges(preset, spec.name, spec.side, sigma)


EXAMPLES = ["edges", "edges@SIDE", "edges:SIGMA", "edges:SIGMA@SIDE"]
FORMS = {"edges": edges}
