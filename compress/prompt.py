"""A prompt: what the memory keeps of an image, its edge map and the text of its class."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from compress.presets import Preset
from ControlNet.annotator.canny import CannyDetector
from ControlNet.annotator.util import HWC3
from utils.data.images import read_image, write_atomically

_find_edges = CannyDetector()


@dataclass(frozen=True)
class Prompt:
    """edge_map: HxW uint8, 255 on an edge and 0 elsewhere; text: what the class is called, "" for nothing."""

    edge_map: np.ndarray
    text: str


def extract(image: np.ndarray, text: str, preset: Preset) -> Prompt:
    """The prompt of an image (HxWx3 RGB or HxW, uint8) whose class is called `text`."""
    image = HWC3(image)
    if preset.edges_of_generated_size:
        height, width = preset.generated_size(*image.shape[:2])
        enlarge = height * width >= image.shape[0] * image.shape[1]
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LANCZOS4 if enlarge else cv2.INTER_AREA)
    return Prompt(_find_edges(image, preset.low_threshold, preset.high_threshold), text)


WEBP_SIDE = 16_383
"""The longest side, in pixels, that a WebP holds."""


def save(prompt: Prompt, path: Path) -> None:
    """Write the edge map to `path`, losing nothing.

    The text is the class's: its folder's name, or what class_names.json says.
    """
    write_atomically(path, lambda file: write(prompt, file))


def write(prompt: Prompt, file: BinaryIO) -> None:
    """The edge map as `save` writes it, into an open file.

    A lossless WebP, which packs two colours into one bit a pixel: the smallest form that Pillow writes (figures:
    tests/bench/bench_edge_maps.py).  Where a side is too long for that, a 1-bit PNG, under the same name: readers go by
    the content.
    """
    edges = Image.fromarray(prompt.edge_map > 0)
    if max(edges.size) <= WEBP_SIDE:
        edges.save(file, "WEBP", lossless=True, method=4, quality=100)
    else:
        edges.save(file, "PNG", optimize=True)


def load(path: Path, text: str) -> Prompt:
    """The prompt whose edge map lies at `path`: a file of `save`'s, or an 8-bit .bmp of the published scripts.

    Raises OSError, with the path in its message, where the file can't be read.
    """
    return Prompt(np.where(np.asarray(read_image(path))[:, :, 0] > 127, np.uint8(255), np.uint8(0)), text)


def hint(prompt: Prompt, height: int, width: int) -> np.ndarray:
    """The edge map at the generated size (height x width uint8, 0 or 255), by nearest neighbour."""
    if prompt.edge_map.shape == (height, width):
        return prompt.edge_map
    return cv2.resize(prompt.edge_map, (width, height), interpolation=cv2.INTER_NEAREST)
