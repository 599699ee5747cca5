"""The transforms of large pictures: training crops of any size and AutoAugment, evaluation the middle.

Each picture has another size and another fate, so they are made one by one; what the whole batch shares, its random
numbers, comes at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms

from utils.data.augment import BRIGHTNESS, as_images, brightness_factors, middle, random_bits, uniform
from utils.data.cache import Form, load

SIDE = 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""RandomResizedCrop's: which part of the area, and width over height."""
_TRIES = 10
_NUMBERS = 4 * _TRIES + 2


@dataclass(frozen=True)
class Whole:
    """All of a picture; a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves `at_least` pixels of
    the shorter side: then even the smallest crop of it is not enlarged.

    RandomResizedCrop's smallest crop has 8 % of the area, at a ratio of 3:4: 0.245 of the side of a square.
    """

    at_least: int = math.ceil(SIDE / math.sqrt(SCALE[0] * RATIO[0]))

    @property
    def name(self) -> str:
        return repr(self)

    @property
    def source(self) -> Form:
        return self

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image)

    def read(self, path: Path) -> np.ndarray:
        return self(load(path, self.at_least))

    def of(self, picture: np.ndarray) -> np.ndarray:
        return picture


@dataclass(frozen=True)
class Middle:
    """The picture with its shorter side scaled to `resize`, then the middle side x side: Resize and CenterCrop.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves enough to scale down.
    """

    side: int = SIDE
    resize: int = 256
    source: Whole = Whole()

    @property
    def name(self) -> str:
        return repr(self)

    def __call__(self, image: Image.Image) -> np.ndarray:
        return self._middle(np.asarray(image))

    def read(self, path: Path) -> np.ndarray:
        return self(load(path, self.resize))

    def of(self, picture: np.ndarray) -> np.ndarray | None:
        return None if min(picture.shape[:2]) >= 2 * self.resize else self._middle(picture)

    def _middle(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        if height <= width:
            height, width = self.resize, int(self.resize * width / height)
        else:
            height, width = int(self.resize * height / width), self.resize
        return middle(resized(picture, height, width), self.side)


@dataclass(frozen=True)
class LargeTrain:
    """torchvision's RandomResizedCrop(side), RandomHorizontalFlip where `flip` says so, ColorJitter and AutoAugment
    with the policy of ImageNet."""

    flip: bool
    form: Whole
    side: int = SIDE
    brightness: float = BRIGHTNESS
    policy: str = transforms.AutoAugmentPolicy.IMAGENET.value

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        numbers = uniform(states, _NUMBERS)
        seeds = (random_bits(states, 1, _NUMBERS)[:, 0] >> np.uint64(1)).tolist()
        sizes = np.array([picture.shape[:2] for picture in pictures])
        boxes = random_boxes(sizes, numbers[:, : 4 * _TRIES]).tolist()
        mirrored = (numbers[:, -2] < 0.5) & self.flip
        factors = brightness_factors(numbers[:, -1], self.brightness)
        tables = np.minimum(np.arange(256, dtype=np.float32) * factors[:, None], 255).astype(np.uint8)
        augment = transforms.AutoAugment(transforms.AutoAugmentPolicy(self.policy))
        out = np.empty((len(pictures), self.side, self.side, 3), np.uint8)
        with torch.random.fork_rng(devices=[]):  # AutoAugment draws from torch's own generator
            for i, (picture, (top, left, height, width)) in enumerate(zip(pictures, boxes, strict=True)):
                view = resized(picture[top : top + height, left : left + width], self.side, self.side)
                view = cv2.LUT(cv2.flip(view, 1) if mirrored[i] else view, tables[i])
                torch.default_generator.manual_seed(seeds[i])
                out[i] = augment(Image.fromarray(view))
        return as_images(out)


@dataclass(frozen=True)
class LargeTest:
    """What `Middle` reads."""

    form: Middle

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return as_images(np.stack(pictures))


def random_boxes(sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """RandomResizedCrop's boxes: N x 4 of (top, left, height, width), from N x (height, width) and N x 4 tries of
    uniform numbers.

    The area is uniform in SCALE of the picture's, the logarithm of width / height uniform in that of RATIO; of so many
    tries the first one that fits in the picture is taken, else the largest box in the middle of a fitting ratio.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    tries = numbers.reshape(len(sizes), -1, 4)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * tries[..., 0])
    low, high = np.log(RATIO)
    shape = np.exp(low + (high - low) * tries[..., 1])
    w, h = np.sqrt(area * shape).round().astype(int), np.sqrt(area / shape).round().astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = (
        ((room + 1) * part).astype(int) for room, part in ((height - h, tries[..., 2]), (width - w, tries[..., 3]))
    )
    row = np.arange(len(sizes)), fits.argmax(axis=1)
    boxes = np.stack([top[row], left[row], h[row], w[row]], axis=1)
    for i in np.flatnonzero(~fits.any(axis=1)):
        boxes[i] = middle_box(*sizes[i].tolist())
    return boxes


def middle_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest box in the middle whose width / height lies within RATIO: (top, left, height, width)."""
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """H x W x 3 -> height x width x 3, bilinear; where it shrinks, of all pixels, as Pillow does it."""
    images = torch.tensor(picture)[None].permute(0, 3, 1, 2)
    scaled = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
