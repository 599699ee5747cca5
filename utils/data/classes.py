"""The classes of a run: their order, their division into phases, and the images of each.  torch is not needed."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from utils.data.datasets import (
    Augmentation,
    DatasetDefaults,
    NetworkInput,
    Resolution,
    dataset_defaults,
    default_resolution,
)
from utils.data.images import UnreadableImage, image_bits
from utils.data.paths import DatasetPaths
from utils.errors import UserError

NEW, REAL = "new", "real"
"""Roles of items that are read from their own image file."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a phase's training set.

    image: the train image; target: the index of its class in the class order; role: "new" for an image of the phase's
    new classes, else the form in which the exemplar is kept: "real" for the image itself, "edges", ...
    """

    image: Path
    target: int
    role: str

    @property
    def regenerated(self) -> bool:
        """Whether the image itself is not kept, so that training reads its copies only."""
        return self.role not in (NEW, REAL)


@dataclass(eq=False)
class PhasedClasses:
    """What a trained network's user needs to know of its data, without the data.

    dataset: its name; class_names: in the order in which they arrive; phase_starts: see the function of that name;
    picture_size: (width, height) of a typical picture; augmentation: of large pictures in training;
    network_input: where the backbone takes a size of its own; assigned before the transforms are asked for.
    """

    dataset: str
    class_names: list[str]
    phase_starts: list[int]
    picture_size: tuple[int, int]
    augmentation: Augmentation = "pescr"
    network_input: NetworkInput | None = None

    @property
    def nb_classes(self) -> int:
        return len(self.class_names)

    @property
    def nb_phases(self) -> int:
        return len(self.phase_starts) - 1

    def phase_targets(self, phase: int) -> range:
        """The targets of the classes that are new in a phase (0, 1, ...)."""
        if not 0 <= phase < self.nb_phases:
            raise IndexError(f"phase {phase} of {self.nb_phases}")
        return range(self.phase_starts[phase], self.phase_starts[phase + 1])

    def seen_targets(self, phase: int) -> range:
        """The targets of all classes seen by the end of a phase."""
        return range(self.phase_targets(phase).stop)

    @property
    def resolution(self) -> Resolution:
        """The preset of compress/run.py."""
        return default_resolution(self.dataset, self.picture_size)

    @cached_property
    def defaults(self) -> DatasetDefaults:
        """What fits the dataset's name and the typical size of its pictures."""
        return self.defaults_with(self.augmentation)

    def defaults_with(self, augmentation: Augmentation) -> DatasetDefaults:
        return dataset_defaults(self.dataset, self.picture_size, augmentation, self.network_input)


class DataManager(PhasedClasses):
    """A dataset's classes in the order of a run, and their images.  A class's target is its index in that order.

    paths: the dataset's folders; shuffle: order the sorted class labels by `np.random.seed(seed);
    np.random.permutation(n)`, else keep them sorted; init_cls, increment: see `phase_starts`; class_order: labels, or
    indices of the sorted labels, instead of shuffle; class_sort: "text", or "number" to sort labels by the numbers in
    them; val_per_class: train images of each class that are held out and take the place of its test images;
    old_may_be_gone: classes may have no train images (see `check_phases`).

    Raises UserError for a missing folder, a class without images, train and test classes that differ, or impossible
    phases.  All folders are listed once, here.
    """

    def __init__(
        self,
        paths: DatasetPaths,
        *,
        shuffle: bool,
        seed: int,
        init_cls: int,
        increment: int | Sequence[int],
        class_order: Sequence[int | str] | None = None,
        class_sort: Literal["text", "number"] = "text",
        augmentation: Augmentation = "pescr",
        val_per_class: int = 0,
        old_may_be_gone: bool = False,
    ):
        self.paths, self.dataset = paths, paths.dataset
        self.augmentation, self.network_input = augmentation, None
        labels = _class_labels(paths, old_may_be_gone)
        if class_sort == "number":
            labels.sort(key=_by_numbers)
        n = len(labels)
        self.phase_starts = phase_starts(n, init_cls, increment)
        self.class_order: list[int] = list(range(n))
        if class_order is not None:
            self.class_order = _indices_of(class_order, labels)
        elif shuffle:
            # The same as np.random.seed(seed); np.random.permutation(n), but leaves the global generator alone.
            self.class_order = np.random.RandomState(seed).permutation(n).tolist()
        self.class_names = [labels[i] for i in self.class_order]
        self._train = [paths.images(label, "train") for label in self.class_names]
        self._test = [paths.images(label, "test") for label in self.class_names]
        self._check_no_class_is_empty(n if old_may_be_gone else 0)
        if val_per_class:
            self._hold_out(val_per_class)
        paths.warn_of_nested(labels)

    def _hold_out(self, number: int) -> None:
        """Evaluate on `number` train images of each class, a function of its label and images.  Raises UserError."""
        for target, (label, images) in enumerate(zip(self.class_names, self._train, strict=True)):
            if len(images) <= number:
                where = self.paths.folder("train") / label
                raise UserError(f"val_per_class is {number}, but {where} has {len(images)} images: none would be left.")
            held_out = set(np.random.default_rng([*label.encode()]).permutation(len(images))[:number].tolist())
            self._train[target] = [image for i, image in enumerate(images) if i not in held_out]
            self._test[target] = [image for i, image in enumerate(images) if i in held_out]

    def reordered(self, seed: int) -> "DataManager":
        """The same classes in the order of another seed; the folders are not listed again."""
        other = copy.copy(self)
        other.class_order = np.random.RandomState(seed).permutation(self.nb_classes).tolist()
        targets = [self.class_order.index(index) for index in other.class_order]
        other.class_names = [self.class_names[target] for target in targets]
        other._train = [self._train[target] for target in targets]
        other._test = [self._test[target] for target in targets]
        return other

    def train_images(self, target: int) -> list[Path]:
        """All train images of a class, sorted."""
        return self._train[target]

    def test_images(self, target: int) -> list[Path]:
        """All test images of a class, sorted."""
        return self._test[target]

    def new_items(self, phase: int) -> list[Item]:
        """All train images of a phase's new classes, as items of role "new"."""
        return [Item(image, target, NEW) for target in self.phase_targets(phase) for image in self._train[target]]

    @property
    def folders(self) -> list[list[Path]]:
        """The images of each class's train and test folder."""
        return [*self._train, *self._test]

    @cached_property
    def picture_size(self) -> tuple[int, int]:  # type: ignore[override]  # it may be assigned too
        """(width, height) of a typical image (`typical_size`), the same in every class order."""
        return typical_size(dict(zip(self.class_names, self._train, strict=True)))

    @property
    def decoded_bytes(self) -> int:
        """Of all train images, decoded; an estimate."""
        width, height = self.picture_size if self.defaults.image_kind == "large" else (32, 32)
        return 3 * width * height * sum(map(len, self._train))

    def check_phases(self, first: int) -> bool:
        """Whether train images of classes of earlier phases are gone.  Raises UserError where later ones' are."""
        self._check_no_class_is_empty(self.phase_starts[first])
        return not all(self._train)

    def _check_no_class_is_empty(self, first: int) -> None:
        """Raises UserError.  first: the target from which on classes need train images."""
        names, train, test = self.class_names, self.paths.folder("train"), self.paths.folder("test")
        empty = [train / names[i] for i in range(first, len(names)) if not self._train[i]]
        empty += [test / label for label, images in zip(names, self._test, strict=True) if not images]
        if empty:
            more = f" (and {len(empty) - 1} more class folders)" if len(empty) > 1 else ""
            raise UserError(f"no images in {min(empty)}{more}: every class needs train and test images.")


def phase_starts(nb_classes: int, init_cls: int, increment: int | Sequence[int]) -> list[int]:
    """The number of classes seen before phase 0 (none), phase 1, ..., and after the last phase.

    init_cls: classes of phase 0; increment: of each later phase, or a list of numbers of which the last repeats; the
    last phase has what is left.  Raises UserError for phases that are impossible with so many classes.
    """
    if not 1 <= init_cls <= nb_classes:
        raise UserError(f"init_cls is {init_cls}, but the dataset has {nb_classes} classes: choose 1 to {nb_classes}.")
    increments = [increment] if isinstance(increment, int) else increment
    if init_cls < nb_classes and min(increments, default=0) < 1:
        left = nb_classes - init_cls
        raise UserError(f"increment is {increment}, with {left} classes left after phase 0: choose at least 1.")
    starts = [0, init_cls]
    while starts[-1] < nb_classes:
        size = increments[min(len(starts) - 2, len(increments) - 1)]
        starts.append(min(starts[-1] + size, nb_classes))
    return starts


def typical_size(images: Mapping[str, Sequence[Path]]) -> tuple[int, int]:
    """(width, height) of a dataset's typical image, by headers.

    images: of each class, by label; at least one.  Of the first images of up to nine classes, evenly spread over the
    sorted labels so that the classes' order does not matter, the one with the median shorter side.
    Raises UnreadableImage.
    """
    first = [images[label][0] for label in sorted(images) if images[label]]
    chosen = np.linspace(0, len(first) - 1, min(len(first), 9)).round().astype(int)
    try:
        sizes = [image_bits(first[i])[:2] for i in chosen]
    except OSError as error:
        raise UnreadableImage(f"cannot read image {error}. Replace the file or take it away.") from error
    return sorted(sizes, key=min)[len(sizes) // 2]


def _class_labels(paths: DatasetPaths, old_may_be_gone: bool) -> list[str]:
    """The sorted labels of the train classes; of all classes, where train folders may be gone.

    Raises UserError where train and test differ.
    """
    try:
        train = set(paths.classes("train"))
    except UserError:
        if not old_may_be_gone:
            raise
        train = set()  # not one is left
    test = set(paths.classes("test"))
    if old_may_be_gone:
        train |= test
    for mode, other, only in (("train", "test", train - test), ("test", "train", test - train)):
        if only:
            raise UserError(
                f"{len(only)} classes of {paths.folder(mode)} have no folder in {paths.folder(other)}, the first is "
                f"{min(only)!r}: train and test need the same class folders."
            )
    return sorted(train)


def _indices_of(class_order: Sequence[int | str], labels: Sequence[str]) -> list[int]:
    """A class order as indices of the labels.  Raises UserError unless it has each class once."""
    index = {label: i for i, label in enumerate(labels)}
    texts = [str(entry) for entry in class_order]
    if sorted(texts) == sorted(labels):
        return [index[text] for text in texts]
    if sorted(texts) == sorted(map(str, range(len(labels)))):
        return [int(text) for text in texts]
    unknown = [text for text in texts if text not in index]
    raise UserError(
        f"class_order must hold each of the {len(labels)} classes once, as labels or numbers 0 to {len(labels) - 1}; "
        + (f"{unknown[0]!r} is no label." if unknown else f"it has {len(texts)} entries.")
    )


def _by_numbers(label: str) -> list[tuple[int, str]]:
    """Sorts "2" before "10", and "a2" before "a10"."""
    parts = re.findall(r"\d+|\D+", label)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
