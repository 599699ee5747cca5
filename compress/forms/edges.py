"""Edge maps: a 1-bit Canny edge map and the class's text, from which ControlNet generates copies (the paper's form)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from compress.forms import OTHERWISE, WRONG_SIZE, Condition, Form, Spec, decoded, files_named, reduced
from compress.presets import Preset
from ControlNet.annotator.canny import CannyDetector
from ControlNet.annotator.util import HWC3
from utils.data.images import image_bits
from utils.data.paths import FormFiles
from utils.errors import UserError

WEBP_SIDE = 16_383
"""The longest side, in pixels, that a WebP holds."""

FILES = FormFiles()

THRESHOLDS = ("low_threshold", "high_threshold")

_find_edges = CannyDetector()


@dataclass(frozen=True)
class Edges(Form):
    """The edge map has the image's own size, the generated size where the preset says so, or a smaller one.

    side: shorter side of the smaller edge map in pixels, None for the preset's size.
    """

    name: str = "edges"
    noun: str = "edge map"
    files: FormFiles = FILES
    side: int | None = None

    def settings(self) -> dict[str, Any]:
        if self.side is not None:
            return {"side": self.side, **{name: getattr(self.preset, name) for name in THRESHOLDS}}
        names = ["edges_of_generated_size", *THRESHOLDS]
        names += ["shorter_side", "small_shorter_side", "max_pixels"] * self.preset.edges_of_generated_size
        return {name: getattr(self.preset, name) for name in names}

    def encode(self, image: np.ndarray, text: str = "") -> bytes:
        return written(self.edges(image))

    def edges(self, image: np.ndarray) -> np.ndarray:
        """The edge map: HxW uint8, 255 on an edge and 0 elsewhere."""
        image = HWC3(image)
        height, width = self.edge_size(*image.shape[:2])
        if (height, width) != image.shape[:2]:
            enlarge = height * width >= image.shape[0] * image.shape[1]
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LANCZOS4 if enlarge else cv2.INTER_AREA)
        return _find_edges(image, self.preset.low_threshold, self.preset.high_threshold)

    def edge_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the edge map of an image of this height and width."""
        if self.side is not None:
            return reduced(height, width, self.side)
        return self.preset.generated_size(height, width) if self.preset.edges_of_generated_size else (height, width)

    def copy_settings(self) -> dict[str, Any]:
        return super().copy_settings() | ({} if self.side is None else {"form": self.name, "side": self.side})

    def condition(self, kept: bytes, size: tuple[int, int], greyscale: bool = False) -> Condition:
        """The edge map at the generated size, by nearest neighbour."""
        edges, (height, width) = read(kept), self.preset.generated_size(*size)
        if edges.shape != (height, width):
            edges = cv2.resize(edges, (width, height), interpolation=cv2.INTER_NEAREST)
        return Condition((height, width), hint=edges)

    def raw_bits(self, height: int, width: int, kept: Path | None = None) -> int:
        """One a pixel of the edge map, also where an older file spends eight on it."""
        map_height, map_width = self.edge_size(height, width) if kept is None else image_bits(kept)[1::-1]
        return map_height * map_width

    def check(self, kept: bytes, image: np.ndarray) -> tuple[str, str] | None:
        """Bit for bit; a published script's .bmp, whose image decoder is unknown, by its size alone."""
        found, size = read(kept), self.edge_size(*image.shape[:2])
        if found.shape != size:
            return WRONG_SIZE, f"{found.shape[1]} x {found.shape[0]} instead of {size[1]} x {size[0]} pixels"
        if not kept.startswith(b"BM") and not np.array_equal(found, self.edges(image)):
            return OTHERWISE, "its edges are not those of the image"
        return None

    def fits_by_size(self, kept: Path, size: tuple[int, int], kinds: Sequence[Mapping[str, Any]]) -> bool | None:
        if any(kind[name] != kinds[0][name] for kind in kinds for name in THRESHOLDS):
            return None
        return image_bits(kept)[1::-1] == self.edge_size(*size)


def written(edges: np.ndarray) -> bytes:
    """A lossless file of an edge map.

    A lossless WebP packs its two colours into one bit a pixel: the smallest that Pillow writes (measured by
    tests/bench/bench_edge_maps.py).  Where a side is too long for WebP, a 1-bit PNG: readers go by the content.
    """
    file, image = io.BytesIO(), Image.fromarray(edges > 0)
    if max(image.size) <= WEBP_SIDE:
        image.save(file, "WEBP", lossless=True, method=4, quality=100)
    else:
        image.save(file, "PNG", optimize=True)
    return file.getvalue()


def read(kept: bytes) -> np.ndarray:
    """The edge map (HxW uint8, 0 or 255) of `written`'s bytes, or of an 8-bit .bmp of the published scripts."""
    return np.where(decoded(kept)[:, :, 0] > 127, np.uint8(255), np.uint8(0))


def edges(spec: Spec, preset: Preset) -> Edges:
    if spec.argument:
        raise UserError("the form 'edges' takes a side alone: edges, edges@64.")
    if spec.side is None:
        return Edges(preset)
    return Edges(preset, spec.name, files=files_named(spec.name, (".webp",), ".jpg"), side=spec.side)


EXAMPLES = ["edges", "edges@SIDE"]
FORMS = {"edges": edges}
