"""What is known of datasets: their transforms, statistics and presets of compress/run.py, and published class lists.

Any folder in the layout of `utils.data.paths` is a dataset; the size of its images selects the transforms.  `KNOWN`
adds what the size does not tell; a dataset need not be in it.

A class list that the field has fixed is a text file, `published/NAME.txt`: comments, which begin with "# ", say what
the list is and where it comes from; then a line a class, in the published order: its label, and after a tab its text
for prompts.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from utils.data.augment import Normalise, TestTransform, TrainTransform

Augmentation = Literal["pescr", "pycil", "autoaugment", "none"]
ImageKind = Literal["small", "large"]
Resolution = Literal["high", "low"]

SMALL_SIDE = 64
"""Images whose shorter side has at most this many pixels get the transforms of small images."""

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


@dataclass(frozen=True)
class Known:
    """Defaults by a dataset's name.

    flip: whether training mirrors images; small_statistics: mean and standard deviation of each channel, for small
    images (large ones have ImageNet's); resolution: the preset of compress/run.py, None to choose by the images' size;
    pycil_jitter: whether PyCIL jitters the brightness of this dataset's large images.
    """

    flip: bool = True
    small_statistics: tuple[tuple[float, ...], tuple[float, ...]] = CIFAR100_STATISTICS
    resolution: Resolution | None = None
    pycil_jitter: bool = False


KNOWN = {
    "Food101": Known(resolution="high"),
    "Caltech256": Known(resolution="low"),
    "Places100": Known(resolution="high"),
    "ImageNet100": Known(resolution="high"),
    "ImageNet1000": Known(resolution="high", pycil_jitter=True),
    "Imagenette224": Known(resolution="low"),
    "CIFAR10": Known(small_statistics=CIFAR10_STATISTICS, resolution="low"),
    "CIFAR100": Known(resolution="low"),
    "MNIST": Known(flip=False, resolution="high"),  # edge maps at 28x28, 1/8 of an image; "low" makes them 256x256
}


@dataclass(frozen=True)
class DatasetDefaults:
    """image_kind: "small" or "large"; the transforms turn pictures into B x 3 x S x S (uint8), S = 32 for small images
    and 224 for large ones; `normalise` turns these into a network's input.
    """

    image_kind: ImageKind
    train_transform: "TrainTransform"
    test_transform: "TestTransform"
    normalise: "Normalise"


class NetworkInput(Protocol):
    """What a network of a library takes.

    side: of its square pictures; resize: of a picture's shorter side before its centre is cropped; mean, std: of each
    channel; mode: of resizing, "bilinear" or "bicubic".
    """

    @property
    def side(self) -> int: ...
    @property
    def resize(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def mode(self) -> str: ...


def known(name: str) -> Known:
    """The row of a dataset's name, in any case of letters; the defaults of `Known` for an unknown name."""
    return next((entry for key, entry in KNOWN.items() if key.lower() == name.lower()), Known())


def default_resolution(name: str, sample_image_size: tuple[int, int]) -> Resolution:
    """A dataset's preset of compress/run.py, by its name or else by (width, height) of a typical image."""
    return known(name).resolution or ("low" if min(sample_image_size) < 256 else "high")


def dataset_defaults(
    name: str,
    sample_image_size: tuple[int, int],
    augmentation: Augmentation = "pescr",
    network_input: NetworkInput | None = None,
) -> DatasetDefaults:
    """The defaults of a dataset.

    name: the dataset's folder name; sample_image_size: (width, height) of a typical image in pixels; augmentation: in
    training.  Large images: "pescr" (ESCORT's published code) and "autoaugment": random resized crop, flip, brightness,
    AutoAugment; "pycil": crop and flip, as PyCIL does for ImageNet-100, and brightness for ImageNet1000.  Small ones:
    crop, flip and brightness, and with "autoaugment" also AutoAugment and Cutout, as PyCIL's cifar100_aa.  "none": the
    test transform.
    network_input: of a backbone with a size of its own, to which images of all sizes are brought.
    """
    # These import torch, whose import takes seconds: the size and the preset are known before.
    from utils.data import augment

    entry, autoaugment = known(name), augmentation == "autoaugment"
    train: TrainTransform
    test: TestTransform
    if min(sample_image_size) <= SMALL_SIDE and network_input is None:
        kind: ImageKind = "small"
        test, statistics = augment.SmallTest(), entry.small_statistics
        train = augment.SmallAutoAugment(entry.flip) if autoaugment else augment.SmallTrain(entry.flip)
    else:
        kind, side, statistics = "large", augment.SIDE, IMAGENET_STATISTICS
        test = augment.LargeTest()
        if network_input is not None:
            side, statistics = network_input.side, (network_input.mean, network_input.std)
            test = augment.LargeTest(side, network_input.resize, network_input.mode)
        train = augment.LargeTrain(entry.flip, side=side)
        if augmentation == "pycil":
            brightness = augment.BRIGHTNESS if entry.pycil_jitter else 0.0
            train = augment.LargeTrain(entry.flip, brightness, autoaugment=False, side=side)
    if augmentation == "none":
        train = test
    return DatasetDefaults(kind, train, test, augment.Normalise(*statistics))


# Published class lists

FOLDER = Path(__file__).parent / "published"
FETCHED = {"CIFAR10": "CIFAR10", "CIFAR100": "CIFAR100", "Food101": "Food101", "Caltech256": "Caltech256"}
FETCHED |= {"MNIST": "digits"}
"""Datasets that `python -m utils.curate WHAT` makes from what it downloads or brings, and WHAT."""


def curate_command(name: str) -> str | None:
    """The command that makes a dataset of this name, in any case of letters; None where there is none."""
    if what := {dataset.lower(): what for dataset, what in FETCHED.items()}.get(name.lower()):
        return f"python -m utils.curate {what}"
    listed = find_list(name)
    return f"python -m utils.curate {listed.stem} --source DIR" if listed else None


def class_lists() -> list[str]:
    """The names of the lists."""
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def find_list(name: str) -> Path | None:
    """The file of a list by its name, in any case and with or without hyphens; None for an unknown one."""
    files = {_plain(file.stem): file for file in FOLDER.glob("*.txt")}
    return files.get(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def published_labels(name: str) -> list[str] | None:
    """The labels of a list in the published order; None for an unknown name."""
    if (file := find_list(name)) is None:
        return None
    return [line.partition("\t")[0] for line in without_comments(file.read_text(encoding="utf-8").splitlines())]


def without_comments(lines: Iterable[str]) -> list[str]:
    """The lines of a list of classes, stripped, without empty ones and comments ("# ...")."""
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("# ")]
