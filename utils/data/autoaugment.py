"""AutoAugment with its ImageNet policy (Cubuk et al. 2019), as the published ESCORT code applies it.

torchvision's AutoAugment has the same sub-policies, probabilities and levels.  Three details differ: rotations and
shears fill the uncovered corners with grey (128) instead of black, shears interpolate bicubically, and Solarize's
thresholds count down from 256, not from 255.
"""

from collections.abc import Callable, Sequence

from PIL import Image, ImageEnhance, ImageOps
from torchvision import transforms

GREY = (128, 128, 128)
NUMBERS = 5
"""Uniform random numbers needed for one picture."""

IMAGENET_POLICY = tuple(transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET).policies)
"""25 sub-policies of two operations each: (name, probability, level 0 ... 9 or None)."""

# Operation -> (picture, level / 9, sign) -> picture.
_OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "AutoContrast": lambda picture, *_: ImageOps.autocontrast(picture),
    "Color": lambda picture, level, sign: ImageEnhance.Color(picture).enhance(1 + sign * 0.9 * level),
    "Contrast": lambda picture, level, sign: ImageEnhance.Contrast(picture).enhance(1 + sign * 0.9 * level),
    "Equalize": lambda picture, *_: ImageOps.equalize(picture),
    "Invert": lambda picture, *_: ImageOps.invert(picture),
    "Posterize": lambda picture, level, _: ImageOps.posterize(picture, round(8 - 4 * level)),
    "Rotate": lambda picture, level, sign: picture.rotate(sign * 30 * level, fillcolor=GREY),
    "Sharpness": lambda picture, level, sign: ImageEnhance.Sharpness(picture).enhance(1 + sign * 0.9 * level),
    "ShearX": lambda picture, level, sign: picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        (1, sign * 0.3 * level, 0, 0, 1, 0),
        Image.Resampling.BICUBIC,
        fillcolor=GREY,
    ),
    "Solarize": lambda picture, level, _: ImageOps.solarize(picture, 256 * (1 - level)),
}


def auto_augment(picture: Image.Image, numbers: Sequence[float]) -> Image.Image:
    """Apply one sub-policy to an RGB picture.

    numbers: five in [0, 1): the choice of sub-policy; whether each of its two operations is applied; their signs.
    """
    policy = IMAGENET_POLICY[int(numbers[0] * len(IMAGENET_POLICY))]
    for (name, probability, level), chance, direction in zip(policy, numbers[1:3], numbers[3:5], strict=True):
        if chance < probability:
            picture = _OPERATIONS[name](picture, (level or 0) / 9, 1 if direction < 0.5 else -1)
    return picture
