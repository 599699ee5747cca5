"""The classes of a run: their order, their division into phases, and the images of each."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from utils.data.datasets import Augmentation, NetworkInput
from utils.data.images import UnreadableImage, image_bits
from utils.data.items import Item
from utils.data.labels import check_phase_sizes, class_labels, indices_of
from utils.data.paths import DatasetPaths
from utils.data.phases import PhasedClasses, phase_starts
from utils.errors import UserError


class DataManager(PhasedClasses):
    """A dataset's classes in the order of a run, and their images.  A class's target is its index in that order.

    paths: the dataset's folders; shuffle: order the sorted class labels by `np.random.seed(seed);
    np.random.permutation(n)`, else keep them sorted; init_cls: number of classes of phase 0; increment: number of
    classes of each later phase, or a list of numbers of which the last repeats; the last phase gets the remainder.
    class_order: labels, or indices of the sorted labels, instead of shuffle; class_sort: "text", or "number" to sort
    labels by the numbers in them; val_per_class: train images of each class that are held out and take the place of its
    test images; old_may_be_gone: classes may have no train images (see `check_phases`).

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
        self.augmentation = augmentation
        self.network_input: NetworkInput | None = None  # assigned before the transforms are asked for
        labels = class_labels(paths, class_sort, old_may_be_gone)
        n = len(labels)
        check_phase_sizes(paths.dataset, n, init_cls, increment)
        self.class_order: list[int] = list(range(n))
        if class_order is not None:
            self.class_order = indices_of(class_order, labels)
        elif shuffle:
            # The same as np.random.seed(seed); np.random.permutation(n), but leaves the global generator alone.
            self.class_order = np.random.RandomState(seed).permutation(n).tolist()
        self.class_names: list[str] = [labels[i] for i in self.class_order]
        self.phase_starts = phase_starts(n, init_cls, increment)
        self._train = [paths.images(label, "train") for label in self.class_names]
        self._test = [paths.images(label, "test") for label in self.class_names]
        self._check_no_class_is_empty(n if old_may_be_gone else 0)
        if val_per_class:
            self._hold_out(val_per_class)
        paths.warn_of_nested(labels)

    def _hold_out(self, number: int) -> None:
        """Part the train images of each class into those that stay and `number` that are evaluated.

        Which ones is a function of the class's label and its images, the same in all runs.  Raises UserError.
        """
        for target, (label, images) in enumerate(zip(self.class_names, self._train, strict=True)):
            if len(images) <= number:
                where = self.paths.folder("train") / label
                raise UserError(f"val_per_class is {number}, but {where} has {len(images)} images: none would be left.")
            held_out = set(np.random.default_rng([*label.encode()]).permutation(len(images))[:number].tolist())
            self._train[target] = [image for i, image in enumerate(images) if i not in held_out]
            self._test[target] = [image for i, image in enumerate(images) if i in held_out]

    def reordered(self, seed: int) -> "DataManager":
        """The same classes in the order of another seed; the folders are not listed again."""
        listed = dict(zip(self.class_order, zip(self.class_names, self._train, self._test, strict=True), strict=True))
        other = copy.copy(self)
        other.class_order = np.random.RandomState(seed).permutation(self.nb_classes).tolist()
        names, train, test = zip(*(listed[index] for index in other.class_order), strict=True)
        other.class_names, other._train, other._test = list(names), list(train), list(test)
        return other

    def train_images(self, target: int) -> list[Path]:
        """All train images of a class, sorted."""
        return self._train[target]

    def test_images(self, target: int) -> list[Path]:
        """All test images of a class, sorted."""
        return self._test[target]

    def new_items(self, phase: int) -> list[Item]:
        """All train images of a phase's new classes, as items of role "new"."""
        return [Item(image, target, "new") for target in self.phase_targets(phase) for image in self._train[target]]

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
        """Make sure that there are train images of the classes of a phase and of those after it.

        Returns whether those of a class of an earlier phase are gone.  Raises UserError.
        """
        self._check_no_class_is_empty(self.phase_starts[first])
        return not all(self._train)

    def _check_no_class_is_empty(self, first: int) -> None:
        """Raises UserError.  first: the target from which on classes need train images."""
        empty = [
            self.paths.folder(mode) / label
            for mode, listing, start in (("train", self._train, first), ("test", self._test, 0))
            for label, images in zip(self.class_names[start:], listing[start:], strict=True)
            if not images
        ]
        if empty:
            more = f" (and {len(empty) - 1} more class folders)" if len(empty) > 1 else ""
            raise UserError(f"no images in {min(empty)}{more}: every class needs train and test images.")


def typical_size(images: Mapping[str, Sequence[Path]]) -> tuple[int, int]:
    """(width, height) of a dataset's typical image, by headers.

    images: of each class, by label.  Takes the first image of up to nine classes, evenly spread over the sorted labels
    so that the order of the classes does not matter, and of these the one with the median shorter side.
    At least one class must have an image.  Raises UnreadableImage.
    """
    first = [images[label][0] for label in sorted(images) if images[label]]
    sizes = []
    for i in np.linspace(0, len(first) - 1, min(len(first), 9)).round().astype(int):
        try:
            width, height, _ = image_bits(first[i])
        except OSError as error:
            raise UnreadableImage(f"cannot read image {error}. Replace the file or take it away.") from error
        sizes.append((width, height))
    return sorted(sizes, key=min)[len(sizes) // 2]
