"""Transforms of whole batches.

Pictures are H x W x 3 arrays of uint8.  They stay uint8, a quarter of float32's bytes, until they are on the training
device, where `Normalise` is applied last.
"""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional

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


# AutoAugment (Cubuk et al. 2019), as published ESCORT and PyCIL apply it
#
# torchvision's has the same sub-policies, probabilities and levels.  Three details differ: what rotations, shears and
# translations uncover is filled with grey (128) instead of black, shears interpolate bicubically, and Solarize's
# thresholds count down from 256, not from 255.

GREY = (128, 128, 128)
SHIFT = 150 / 331  # the largest translation, over the picture's side
POLICY_NUMBERS = 5  # uniform random numbers for one picture

Policy = Sequence[tuple[tuple[str, float, int | None], ...]]
"""25 sub-policies of two operations each: (name, probability, level 0 ... 9 or None)."""

IMAGENET_POLICY: Policy = tuple(transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET).policies)
CIFAR10_POLICY: Policy = tuple(transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies)


def _moved(picture: Image.Image, matrix: Sequence[float], smooth: bool = False) -> Image.Image:
    resampling = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=GREY)


# Operation -> (picture, level / 9, sign) -> picture.
_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "AutoContrast": lambda picture, *_: ImageOps.autocontrast(picture),
    "Brightness": lambda picture, level, sign: ImageEnhance.Brightness(picture).enhance(1 + sign * 0.9 * level),
    "Color": lambda picture, level, sign: ImageEnhance.Color(picture).enhance(1 + sign * 0.9 * level),
    "Contrast": lambda picture, level, sign: ImageEnhance.Contrast(picture).enhance(1 + sign * 0.9 * level),
    "Equalize": lambda picture, *_: ImageOps.equalize(picture),
    "Invert": lambda picture, *_: ImageOps.invert(picture),
    "Posterize": lambda picture, level, _: ImageOps.posterize(picture, round(8 - 4 * level)),
    "Rotate": lambda picture, level, sign: picture.rotate(sign * 30 * level, fillcolor=GREY),
    "Sharpness": lambda picture, level, sign: ImageEnhance.Sharpness(picture).enhance(1 + sign * 0.9 * level),
    "ShearX": lambda picture, level, sign: _moved(picture, (1, sign * 0.3 * level, 0, 0, 1, 0), smooth=True),
    "ShearY": lambda picture, level, sign: _moved(picture, (1, 0, 0, sign * 0.3 * level, 1, 0), smooth=True),
    "Solarize": lambda picture, level, _: ImageOps.solarize(picture, math.ceil(256 * (1 - level))),
    "TranslateX": lambda picture, level, sign: _moved(picture, (1, 0, sign * SHIFT * level * picture.width, 0, 1, 0)),
    "TranslateY": lambda picture, level, sign: _moved(picture, (1, 0, 0, 0, 1, sign * SHIFT * level * picture.height)),
}


def auto_augment(picture: Image.Image, numbers: Sequence[float], policy: Policy = IMAGENET_POLICY) -> Image.Image:
    """Apply one sub-policy to an RGB picture.

    numbers: five in [0, 1): the choice of sub-policy; whether each of its two operations is applied; their signs.
    """
    pair = policy[int(numbers[0] * len(policy))]
    for (name, probability, level), chance, direction in zip(pair, numbers[1:3], numbers[3:5], strict=True):
        if chance < probability:
            picture = _OPERATIONS[name](picture, (level or 0) / 9, 1 if direction < 0.5 else -1)
    return picture


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
        mirrored = (numbers[:, 2] < 0.5) & self.flip
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
        numbers, side = uniform(states, POLICY_NUMBERS + 2, first=4), self.prepare.side
        policy = [auto_augment(Image.fromarray(x), row, CIFAR10_POLICY) for x, row in zip(plain, numbers, strict=True)]
        out = np.stack([np.asarray(picture) for picture in policy])
        for picture, (y, x) in zip(out, (numbers[:, POLICY_NUMBERS:] * side).astype(int).tolist(), strict=True):
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
        numbers = uniform(states, 4 * _TRIES + 2 + POLICY_NUMBERS)
        sizes = np.array([picture.shape[:2] for picture in pictures])
        boxes = random_boxes(sizes, numbers[:, : 4 * _TRIES]).tolist()
        mirror, brightness = numbers[:, 4 * _TRIES : 4 * _TRIES + 2].T
        mirrored = (mirror < 0.5) & self.flip
        factors = brightness_factors(brightness, self.brightness)
        tables = np.minimum(np.arange(256, dtype=np.float32) * factors[:, None], 255).astype(np.uint8)
        policies = numbers[:, 4 * _TRIES + 2 :].tolist()
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
        centres = []
        for picture in pictures:
            sides = picture.shape[:2]
            height, width = (int(self.resize * side / min(sides)) for side in sides)
            centres.append(centre(resized(picture, height, width, self.mode), self.side))
        return as_images(np.stack(centres))


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
    picture is used, else the largest centred box whose ratio lies within RATIO.
    """
    height, width = sizes[:, :1], sizes[:, 1:]
    tries = numbers.reshape(len(sizes), -1, 4)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * tries[..., 0])
    low, high = np.log(RATIO)
    shape = np.exp(low + (high - low) * tries[..., 1])
    w, h = np.sqrt(area * shape).round().astype(int), np.sqrt(area / shape).round().astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = ((height - h + 1) * tries[..., 2]).astype(int)
    left = ((width - w + 1) * tries[..., 3]).astype(int)
    row = np.arange(len(sizes)), fits.argmax(axis=1)
    boxes = np.stack([top[row], left[row], h[row], w[row]], axis=1)
    for i in np.flatnonzero(~fits.any(axis=1)):
        whole_height, whole_width = sizes[i].tolist()
        box_height = min(whole_height, round(whole_width / RATIO[0]))
        box_width = min(whole_width, round(whole_height * RATIO[1]))
        boxes[i] = (whole_height - box_height) // 2, (whole_width - box_width) // 2, box_height, box_width
    return boxes


def resized(picture: np.ndarray, height: int, width: int, mode: str = "bilinear") -> np.ndarray:
    """H x W x 3 -> height x width x 3, bilinear with antialiasing, as Pillow's Resize."""
    images = torch.tensor(picture)[None].permute(0, 3, 1, 2)
    scaled = F.interpolate(images, size=(height, width), mode=mode, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()
