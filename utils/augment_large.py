"""The transforms of large pictures: training crops of any size and AutoAugment, evaluation the middle.

Each picture has another size and another fate, so they are made one by one; what the whole batch shares, its random
numbers, comes at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional

from utils.augment import BRIGHTNESS, as_images, brightness_factors, middle, random_bits, uniform
from utils.pixels import load

_TRIES = 10
_NUMBERS = 4 * _TRIES + 3


class Whole:
    """All of a picture."""

    name = "whole"

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image)

    def read(self, path: Path) -> np.ndarray:
        return self(load(path))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Middle:
    """The picture with its shorter side scaled to `resize`, then the middle side x side: Resize and CenterCrop."""

    side: int = 224
    resize: int = 256

    @property
    def name(self) -> str:
        return repr(self)

    def __call__(self, image: Image.Image) -> np.ndarray:
        return middle(np.asarray(functional.resize(image, self.resize)), self.side)

    def read(self, path: Path) -> np.ndarray:
        return self(load(path))


@dataclass(frozen=True)
class LargeTrain:
    """torchvision's RandomResizedCrop(side), RandomHorizontalFlip where `flip` says so, ColorJitter and AutoAugment
    with the policy of ImageNet."""

    flip: bool
    form: Whole
    side: int = 224
    brightness: float = BRIGHTNESS
    policy: str = transforms.AutoAugmentPolicy.IMAGENET.value

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        numbers = uniform(states, _NUMBERS)
        seeds = (random_bits(states, 1, _NUMBERS)[:, 0] >> np.uint64(1)).tolist()
        sizes = np.array([picture.shape[:2] for picture in pictures])
        boxes = random_boxes(sizes, numbers[:, : 4 * _TRIES]).tolist()
        mirrored = (numbers[:, -3] < 0.5) & self.flip
        factors = brightness_factors(numbers[:, -2], self.brightness)
        tables = np.minimum(np.arange(256, dtype=np.float32) * factors[:, None], 255).astype(np.uint8)
        augment = transforms.AutoAugment(transforms.AutoAugmentPolicy(self.policy))
        out = np.empty((len(pictures), self.side, self.side, 3), np.uint8)
        with torch.random.fork_rng(devices=[]):  # AutoAugment draws from torch's own generator
            for i, (picture, (top, left, height, width)) in enumerate(zip(pictures, boxes, strict=True)):
                scaled = resized(picture[top : top + height, left : left + width], self.side)
                scaled = scaled[:, ::-1] if mirrored[i] else scaled
                torch.default_generator.manual_seed(seeds[i])
                out[i] = augment(Image.fromarray(tables[i][scaled]))
        return as_images(out)


@dataclass(frozen=True)
class LargeTest:
    """What `Middle` reads."""

    form: Middle

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return as_images(np.stack(pictures))


def random_boxes(
    sizes: np.ndarray,
    numbers: np.ndarray,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """RandomResizedCrop's boxes: N x 4 of (top, left, height, width), from N x (height, width) and N x 4 tries of
    uniform numbers.

    The area is uniform in `scale` of the picture's, the logarithm of width / height uniform in that of `ratio`; of so
    many tries the first one that fits in the picture is taken, else the largest box in the middle of a fitting ratio.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    tries = numbers.reshape(len(sizes), -1, 4)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = np.log(ratio)
    shape = np.exp(low + (high - low) * tries[..., 1])
    w, h = np.sqrt(area * shape).round().astype(int), np.sqrt(area / shape).round().astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = (
        ((room + 1) * part).astype(int) for room, part in ((height - h, tries[..., 2]), (width - w, tries[..., 3]))
    )
    row = np.arange(len(sizes)), fits.argmax(axis=1)
    boxes = np.stack([top[row], left[row], h[row], w[row]], axis=1)
    for i in np.flatnonzero(~fits.any(axis=1)):
        boxes[i] = middle_box(*sizes[i].tolist(), ratio)
    return boxes


def middle_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest box in the middle whose width / height lies within `ratio`: (top, left, height, width)."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """H x W x 3 -> side x side x 3, bilinear, with every pixel taken into account where it shrinks, as Pillow does."""
    images = torch.from_numpy(np.ascontiguousarray(picture))[None].permute(0, 3, 1, 2)
    scaled = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
