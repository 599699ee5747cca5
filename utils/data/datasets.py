"""What the trainer assumes about a dataset: its transforms (DESIGN section 6; they are in `utils.augment`).

Any folder in the layout of `utils.paths` is a dataset, and the size of its images picks the transforms.  A known name
only adds what the size can't tell, so a dataset that is missing from `KNOWN` needs no code.
"""

from dataclasses import dataclass
from typing import Literal

from utils.data.augment import FitSmall, Normalise, SmallTest, SmallTrain, TestTransform, TrainTransform
from utils.data.augment_large import LargeTest, LargeTrain, Middle, Whole

ImageKind = Literal["small", "large"]

SMALL_SIDE = 64
"""Images whose shorter side is at most this many pixels take the small-image transforms."""

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


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
    """image_kind: "small" or "large"; the transforms turn RGB pictures into B x 3 x S x S (uint8), S = 32 for small
    images and 224 for large ones, and `normalise` that into what networks take; resolution: the fitting preset of
    compress/run.py."""

    image_kind: ImageKind
    train_transform: TrainTransform
    test_transform: TestTransform
    normalise: Normalise
    resolution: Literal["high", "low"]


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
    if kind == "small":
        form = FitSmall(32)
        train, test = SmallTrain(entry.flip, form), SmallTest(form)
    else:
        train, test = LargeTrain(entry.flip, Whole()), LargeTest(Middle())
    return DatasetDefaults(
        image_kind=kind,
        train_transform=train,
        test_transform=test,
        normalise=Normalise(*(entry.small_statistics if kind == "small" else IMAGENET_STATISTICS)),
        resolution=entry.resolution or ("low" if shorter < 256 else "high"),
    )
