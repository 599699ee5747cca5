"""What the trainer assumes about a dataset: its transforms (DESIGN section 6).

Any folder in the layout of `utils.paths` is a dataset, and the size of its images picks the transforms.  A known name
only adds what the size can't tell, so a dataset that is missing from `KNOWN` needs no code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

ImageKind = Literal["small", "large"]
Transform = Callable[[Image.Image], Tensor]

SMALL_SIDE = 64
"""Images whose shorter side is at most this many pixels take the small-image transforms."""

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_BRIGHTNESS = 63 / 255


@dataclass(frozen=True)
class Known:
    """What a dataset's name adds.

    flip: whether a mirrored picture still shows its class; small_statistics: mean and standard deviation per channel
    for the small-image transforms; resolution: the preset of compress/run.py, None to go by the size of the images.
    """

    flip: bool = True
    small_statistics: tuple[tuple[float, ...], tuple[float, ...]] = CIFAR100_STATISTICS
    resolution: Literal["high", "low"] | None = None


KNOWN = {
    "Food101": Known(resolution="high"),
    "Caltech256": Known(resolution="low"),
    "Places100": Known(resolution="high"),
    "ImageNet100": Known(resolution="high"),
    "Imagenette224": Known(resolution="low"),
    "CIFAR10": Known(small_statistics=CIFAR10_STATISTICS, resolution="low"),
    "CIFAR100": Known(resolution="low"),
    "MNIST": Known(flip=False, resolution="high"),  # edge maps at 28x28, 1/8 of an image; "low" makes them 256x256
}


@dataclass(frozen=True)
class DatasetDefaults:
    """image_kind: "small" or "large"; the transforms turn an RGB picture into a normalised 3 x S x S float tensor,
    S = 32 for small images and 224 for large ones; resolution: the fitting preset of compress/run.py."""

    image_kind: ImageKind
    train_transform: Transform
    test_transform: Transform
    resolution: Literal["high", "low"]


class FitSmall:
    """Brings a small picture close to `side` x `side`, for a crop to finish: at least `side` both ways.

    A picture up to an eighth smaller keeps its pixels and gets a black margin (a 28 x 28 digit: 2 pixels a side); any
    other is scaled until its shorter side fits.
    """

    def __init__(self, side: int = 32):
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        if not self.side * 7 // 8 <= min(image.size) <= self.side:
            image = functional.resize(image, self.side)
        missing_x, missing_y = (max(self.side - length, 0) for length in image.size)
        if missing_x or missing_y:
            left, top = missing_x // 2, missing_y // 2
            image = functional.pad(image, [left, top, missing_x - left, missing_y - top])
        return image

    def __repr__(self) -> str:
        return f"FitSmall(side={self.side})"


def known(name: str) -> Known:
    """What a dataset's name adds, whatever its case; an unknown name adds nothing."""
    return next((entry for key, entry in KNOWN.items() if key.lower() == name.lower()), Known())


def dataset_defaults(name: str, sample_image_size: tuple[int, int]) -> DatasetDefaults:
    """The transforms of a dataset.

    name: the dataset's folder name; sample_image_size: (width, height) in pixels of a typical image.
    """
    entry = known(name)
    shorter = min(sample_image_size)
    kind: ImageKind = "small" if shorter <= SMALL_SIDE else "large"
    flip = [transforms.RandomHorizontalFlip()] if entry.flip else []
    jitter = transforms.ColorJitter(brightness=_BRIGHTNESS)
    if kind == "small":
        train = [FitSmall(), transforms.RandomCrop(32, padding=4), *flip, jitter]
        test = [FitSmall(), transforms.CenterCrop(32)]
        statistics = entry.small_statistics
    else:
        policy = transforms.AutoAugment(transforms.AutoAugmentPolicy.IMAGENET)
        train = [transforms.RandomResizedCrop(224), *flip, jitter, policy]
        test = [transforms.Resize(256), transforms.CenterCrop(224)]
        statistics = IMAGENET_STATISTICS
    to_tensor = [transforms.ToTensor(), transforms.Normalize(*statistics)]
    return DatasetDefaults(
        image_kind=kind,
        train_transform=transforms.Compose([*train, *to_tensor]),
        test_transform=transforms.Compose([*test, *to_tensor]),
        resolution=entry.resolution or ("low" if shorter < 256 else "high"),
    )
