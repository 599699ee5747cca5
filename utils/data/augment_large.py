"""Transforms of large pictures: random resized crops for training, the resized centre for evaluation.

Pictures differ in size, so they are processed one by one; only the random numbers are drawn for the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from utils.data.augment import BRIGHTNESS, as_images, brightness_factors, centre, uniform
from utils.data.autoaugment import NUMBERS, auto_augment

SIDE = 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""RandomResizedCrop's ranges: area of the crop over area of the picture, and its width over height."""
_TRIES = 10


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

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return as_images(np.stack([self._centre(picture) for picture in pictures]))

    def _centre(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        if height <= width:
            height, width = self.resize, int(self.resize * width / height)
        else:
            height, width = int(self.resize * height / width), self.resize
        return centre(resized(picture, height, width, self.mode), self.side)


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
