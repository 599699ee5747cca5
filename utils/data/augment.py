"""Transforms of whole batches.

Pictures are H x W x 3 arrays of uint8.  They stay uint8, a quarter of float32's bytes, until they are on the training
device, where `Normalise` is applied last.
"""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional

from utils.data.autoaugment import CIFAR10_POLICY, NUMBERS, auto_augment

BRIGHTNESS = 63 / 255
"""ColorJitter's: brightness changes by a factor between 1 - BRIGHTNESS and 1 + BRIGHTNESS."""
SIDE = 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""RandomResizedCrop's ranges: area of the crop over area of the picture, and its width over height."""
_TRIES = 10

_GAMMA, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


# Random numbers


def random_bits(states: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """Outputs first ... first + count - 1 of SplitMix64 seeded with each state: N (uint64) -> N x count (uint64).

    Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".  Output i is a function of the seed and
    i, so the numbers of a whole batch are computed at once.
    """
    steps = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GAMMA
    z = states[:, None] + steps
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def uniform(states: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """The same as numbers in [0, 1): N x count (float64)."""
    return (random_bits(states, count, first) >> np.uint64(11)) * 2.0**-53


# The interface of transforms

Prepare = Callable[[Image.Image], np.ndarray]
"""The deterministic first part of a transform: RGB picture -> H x W x 3, uint8.  A cache keeps its result, with `repr`
of the function in the key."""


class TrainTransform(Protocol):
    """Prepared pictures -> uint8, B x 3 x S x S in channels_last layout."""

    @property
    def prepare(self) -> Prepare: ...

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        """pictures: B; states: B, uint64, the seed of each picture's random numbers (`random_bits`)."""


class TestTransform(TrainTransform, Protocol):
    """The same without random numbers."""

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Normalise:
    """uint8 -> float32, B x 3 x H x W on any device: (x / 255 - mean) / std for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (self.mean, self.std))
        scale, shift = (numbers.float().to(images.device) for numbers in (1 / (255 * std), -mean / std))
        return images.float().mul_(scale).add_(shift)


# Small pictures


@dataclass(frozen=True)
class FitSmall:
    """Make both sides at least `side` pixels, for a crop of side x side.

    A picture whose shorter side is between 7/8 of `side` and `side` keeps its pixels and is padded with black (28 x 28
    digits: 2 pixels on each side); any other is resized (bilinear) so that its shorter side is `side`.
    """

    side: int = 32

    def __call__(self, image: Image.Image) -> np.ndarray:
        if not self.side * 7 // 8 <= min(image.size) <= self.side:
            image = functional.resize(image, self.side)
        missing_x, missing_y = (max(self.side - length, 0) for length in image.size)
        if missing_x or missing_y:
            left, top = missing_x // 2, missing_y // 2
            image = functional.pad(image, [left, top, missing_x - left, missing_y - top])
        return np.asarray(image)


@dataclass(frozen=True)
class SmallTrain:
    """torchvision's RandomCrop(side, padding), RandomHorizontalFlip if `flip`, and ColorJitter(brightness)."""

    flip: bool
    prepare: FitSmall = FitSmall()
    padding: int = 4
    brightness: float = BRIGHTNESS

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        side, padding = self.prepare.side, self.padding
        numbers = uniform(states, 4)
        room = np.array([picture.shape[:2] for picture in pictures]) + 2 * padding - side + 1
        corners = ((numbers[:, :2] * room).astype(int) - padding).tolist()
        mirrored = (numbers[:, 2] < 0.5).tolist() if self.flip else [False] * len(pictures)
        out = np.zeros((len(pictures), side, side, 3), np.uint8)
        for picture, (y, x), mirror, target in zip(pictures, corners, mirrored, out, strict=True):
            top, left = max(y, 0), max(x, 0)
            part = picture[top : y + side, left : x + side]
            target = target[:, ::-1] if mirror else target
            target[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] = part
        return as_images(brightened(out, brightness_factors(numbers[:, 3], self.brightness)))


@dataclass(frozen=True)
class SmallAutoAugment(SmallTrain):
    """SmallTrain, then AutoAugment's CIFAR-10 policy, and Cutout: a black square of `hole` pixels about any pixel."""

    hole: int = 16

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        plain = super().__call__(pictures, states).permute(0, 2, 3, 1).numpy()
        numbers, side = uniform(states, NUMBERS + 2, first=4), self.prepare.side
        policy = [auto_augment(Image.fromarray(x), row, CIFAR10_POLICY) for x, row in zip(plain, numbers, strict=True)]
        out = np.stack([np.asarray(picture) for picture in policy])
        for picture, (y, x) in zip(out, (numbers[:, NUMBERS:] * side).astype(int).tolist(), strict=True):
            half = self.hole // 2
            picture[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return as_images(out)


@dataclass(frozen=True)
class SmallTest:
    """torchvision's CenterCrop(side)."""

    prepare: FitSmall = FitSmall()

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray | None = None) -> Tensor:
        return as_images(np.stack([centre(picture, self.prepare.side) for picture in pictures]))


# Large pictures, which differ in size and are processed one by one


@dataclass(frozen=True)
class FullSize:
    """The picture at its own size."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image)


@dataclass(frozen=True)
class LargeTrain:
    """RandomResizedCrop(side), RandomHorizontalFlip if `flip`, ColorJitter(brightness) and AutoAugment with the
    ImageNet policy if `autoaugment`.

    The crop is torchvision's, but torch resizes the pixels, which differ from Pillow's by at most one level of 255.
    """

    flip: bool
    brightness: float = BRIGHTNESS
    autoaugment: bool = True
    side: int = SIDE
    prepare: FullSize = FullSize()

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        numbers = uniform(states, 4 * _TRIES + 2 + NUMBERS)
        sizes = np.array([picture.shape[:2] for picture in pictures])
        boxes = random_boxes(sizes, numbers[:, : 4 * _TRIES]).tolist()
        mirror, brightness, *policies = numbers[:, 4 * _TRIES :].T
        mirrored = (mirror < 0.5) & self.flip
        factors = brightness_factors(brightness, self.brightness)
        tables = np.minimum(np.arange(256, dtype=np.float32) * factors[:, None], 255).astype(np.uint8)
        policies = np.transpose(policies).tolist()
        out = np.empty((len(pictures), self.side, self.side, 3), np.uint8)
        for i, (picture, (top, left, height, width)) in enumerate(zip(pictures, boxes, strict=True)):
            view = resized(picture[top : top + height, left : left + width], self.side, self.side)
            view = cv2.LUT(cv2.flip(view, 1) if mirrored[i] else view, tables[i])
            out[i] = np.asarray(auto_augment(Image.fromarray(view), policies[i])) if self.autoaugment else view
        return as_images(out)


@dataclass(frozen=True)
class LargeTest:
    """Resize(resize) of the shorter side, by `mode` ("bilinear" or "bicubic"), and CenterCrop(side)."""

    side: int = SIDE
    resize: int = 256
    mode: str = "bilinear"
    prepare: FullSize = FullSize()

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray | None = None) -> Tensor:
        return as_images(np.stack([self._centre(picture) for picture in pictures]))

    def _centre(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        if height <= width:
            height, width = self.resize, int(self.resize * width / height)
        else:
            height, width = int(self.resize * height / width), self.resize
        return centre(resized(picture, height, width, self.mode), self.side)


# Parts of both


def brightness_factors(numbers: np.ndarray, strength: float) -> np.ndarray:
    """Uniform numbers in [0, 1) -> factors in [1 - strength, 1 + strength), float32."""
    return (1 + strength * (2 * numbers - 1)).astype(np.float32)


def brightened(pictures: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Pictures (B x H x W x 3) times their factors (B), rounded down and clipped as Pillow's `blend` does."""
    product = np.multiply(pictures, factors[:, None, None, None], dtype=np.float32)
    return np.minimum(product, 255, out=product).astype(np.uint8)


def centre(picture: np.ndarray, side: int) -> np.ndarray:
    """The central side x side of a picture that is at least that large."""
    top, left = (round((length - side) / 2) for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def as_images(pictures: np.ndarray) -> Tensor:
    """B x H x W x 3 -> B x 3 x H x W in channels_last layout, without a copy."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def random_boxes(sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """RandomResizedCrop's boxes: N x 4 of (top, left, height, width).

    sizes: N x (height, width); numbers: N x 4 * tries, uniform in [0, 1).  Each try draws the area (uniform in SCALE of
    the picture's), the ratio width / height (log-uniform in RATIO) and the position.  The first try that fits in the
    picture is used, else `centre_box`.
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
        boxes[i] = centre_box(*sizes[i].tolist())
    return boxes


def centre_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest centred box whose width / height lies within RATIO: (top, left, height, width)."""
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resized(picture: np.ndarray, height: int, width: int, mode: str = "bilinear") -> np.ndarray:
    """H x W x 3 -> height x width x 3, bilinear with antialiasing, as Pillow's Resize."""
    images = torch.tensor(picture)[None].permute(0, 3, 1, 2)
    scaled = F.interpolate(images, size=(height, width), mode=mode, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
