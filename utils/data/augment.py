"""A batch's pictures as the network sees them: cropped, mirrored, made brighter, all pictures of a batch at once.

Pictures are H x W x 3 arrays of uint8 and stay uint8, a quarter of the bytes of floats, until they are on the device
where they are needed: `Normalise` is the last step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from utils.data.cache import Form, load

BRIGHTNESS = 63 / 255
"""A picture is made brighter or darker by a factor of 1 - BRIGHTNESS to 1 + BRIGHTNESS."""

_GAMMA, _MIX1, _MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


# Random numbers


def random_bits(states: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """Random bits number first ... first + count - 1 of each state: N (uint64) -> N x count (uint64).

    The outputs of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") seeded with
    each of the states.  As it counts, and does not carry on, the numbers of a whole batch come at once.
    """
    steps = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GAMMA
    z = states[:, None] + steps
    z = (z ^ (z >> np.uint64(30))) * _MIX1
    z = (z ^ (z >> np.uint64(27))) * _MIX2
    return z ^ (z >> np.uint64(31))


def uniform(states: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """As `random_bits`, as numbers in [0, 1): N x count (float64)."""
    return (random_bits(states, count, first) >> np.uint64(11)) * 2.0**-53


# What a dataset's transforms are


class TrainTransform(Protocol):
    """What training makes of pictures, at random: uint8, B x 3 x S x S, laid out as B x S x S x 3."""

    form: Form

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        """pictures: as `form` reads them; states: what the random numbers of each come from (`random_bits`)."""


class TestTransform(Protocol):
    """What evaluation makes of pictures: uint8, B x 3 x S x S, laid out as B x S x S x 3."""

    form: Form

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """pictures: as `form` reads them."""


@dataclass(frozen=True)
class Normalise:
    """uint8 -> float32 of mean 0 and deviation 1, B x 3 x H x W on any device: (x / 255 - mean) / std by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (self.mean, self.std))
        scale, shift = (numbers.float().to(images.device) for numbers in (1 / (255 * std), -mean / std))
        return images.float().mul_(scale).add_(shift)


# Small pictures


class FitSmall:
    """Brings a small picture close to `side` x `side`, for a crop to finish: at least `side` both ways.

    A picture up to an eighth smaller keeps its pixels and gets a black margin (a 28 x 28 digit: 2 pixels a side); any
    other is scaled until its shorter side fits.
    """

    def __init__(self, side: int = 32):
        self.side = side
        self.name = f"FitSmall({side})"

    def __call__(self, image: Image.Image) -> np.ndarray:
        if not self.side * 7 // 8 <= min(image.size) <= self.side:
            image = functional.resize(image, self.side)
        missing_x, missing_y = (max(self.side - length, 0) for length in image.size)
        if missing_x or missing_y:
            left, top = missing_x // 2, missing_y // 2
            image = functional.pad(image, [left, top, missing_x - left, missing_y - top])
        return np.asarray(image)

    def read(self, path: Path) -> np.ndarray:
        return self(load(path))

    @property
    def source(self) -> Form:
        return self

    def of(self, picture: np.ndarray) -> np.ndarray:
        return picture

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class SmallTrain:
    """A crop of side x side from the picture with `padding` black pixels around it, mirrored half of the time where
    `flip` says so, then made brighter or darker: torchvision's RandomCrop, RandomHorizontalFlip and ColorJitter."""

    flip: bool
    form: FitSmall
    padding: int = 4
    brightness: float = BRIGHTNESS

    def __call__(self, pictures: Sequence[np.ndarray], states: np.ndarray) -> Tensor:
        side, padding = self.form.side, self.padding
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
class SmallTest:
    """The middle side x side of a picture: torchvision's CenterCrop."""

    form: FitSmall

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return as_images(np.stack([middle(picture, self.form.side) for picture in pictures]))


def brightness_factors(numbers: np.ndarray, strength: float) -> np.ndarray:
    """Numbers of [0, 1) -> factors from 1 - strength to 1 + strength, float32."""
    return (1 + strength * (2 * numbers - 1)).astype(np.float32)


def brightened(pictures: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Pictures (B x H x W x 3), each times its factor (B), rounded down and clipped as Pillow's `blend` does it."""
    product = np.multiply(pictures, factors[:, None, None, None], dtype=np.float32)
    return np.minimum(product, 255, out=product).astype(np.uint8)


def middle(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle side x side of a picture that is at least as large."""
    top, left = (round((length - side) / 2) for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def as_images(pictures: np.ndarray) -> Tensor:
    """B x H x W x 3 -> B x 3 x H x W of the same memory: what torch calls channels_last."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)
