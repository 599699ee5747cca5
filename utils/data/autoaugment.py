"""AutoAugment with its ImageNet and CIFAR-10 policies (Cubuk et al. 2019), as published ESCORT and PyCIL apply them.

torchvision's AutoAugment has the same sub-policies, probabilities and levels.  Three details differ: what rotations,
shears and translations uncover is filled with grey (128) instead of black, shears interpolate bicubically, and
Solarize's thresholds count down from 256, not from 255.
"""

import torchvision_compat  # noqa: F401  (before torchvision)

# isort: split
import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance, ImageOps
from torchvision import transforms

GREY = (128, 128, 128)
NUMBERS = 5
"""Uniform random numbers needed for one picture."""

Policy = Sequence[tuple[tuple[str, float, int | None], ...]]
"""25 sub-policies of two operations each: (name, probability, level 0 ... 9 or None)."""

IMAGENET_POLICY: Policy = tuple(transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET).policies)
CIFAR10_POLICY: Policy = tuple(transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies)


def _moved(picture: Image.Image, matrix: Sequence[float], resampling: Image.Resampling) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=GREY)


BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST

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
    "ShearX": lambda picture, level, sign: _moved(picture, (1, sign * 0.3 * level, 0, 0, 1, 0), BICUBIC),
    "ShearY": lambda picture, level, sign: _moved(picture, (1, 0, 0, sign * 0.3 * level, 1, 0), BICUBIC),
    "Solarize": lambda picture, level, _: ImageOps.solarize(picture, math.ceil(256 * (1 - level))),
    "TranslateX": lambda picture, level, sign: _moved(
        picture, (1, 0, sign * 150 / 331 * level * picture.width, 0, 1, 0), NEAREST
    ),
    "TranslateY": lambda picture, level, sign: _moved(
        picture, (1, 0, 0, 0, 1, sign * 150 / 331 * level * picture.height), NEAREST
    ),
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
