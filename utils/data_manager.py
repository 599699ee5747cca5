"""From folders of images to the order of an epoch: class order, phases, and which items make a batch.

Every random choice here is a function of (model_seed, phase, epoch, item) alone (DESIGN section 6).  Datasets and
samplers therefore keep no random state: the epoch travels inside each index, so that neither the number of workers,
nor where a run was resumed, nor how many processes share a batch changes what is drawn.
"""

import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from utils.augment import Normalise, TestTransform, TrainTransform
from utils.datasets import DatasetDefaults, ImageKind, dataset_defaults
from utils.errors import UserError
from utils.images import image_bits
from utils.paths import DatasetPaths
from utils.pixels import PixelCache, UnreadableImage

Role = Literal["new", "real", "synthetic"]

_ORDER, _GROUPS = 0, 2  # one stream of random numbers each, apart for the same seed


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a phase's training set.

    image: the train image; target: its class's place in the class order; role: "new" for an image of the phase's new
    classes, "real" for a real exemplar, "synthetic" for an exemplar of which only the prompt is kept.
    """

    image: Path
    target: int
    role: Role


class DataManager:
    """A dataset's classes in the order in which they arrive, and the images of each.

    paths: the dataset's folders; shuffle: whether the order is `np.random.seed(seed); np.random.permutation(n)` over
    the sorted class labels, or the sorted labels themselves; init_cls: number of classes of phase 0; increment: number
    of classes of every later phase, of which the last one has what is left.

    Raises UserError for a missing folder, a class without images, train and test classes that differ, or a split
    into phases that the classes don't allow.  All folders are listed here, once.
    """

    pixels: PixelCache | None = None
    """Where decoded pictures are kept, for all phases; None: nowhere."""

    def __init__(self, paths: DatasetPaths, *, shuffle: bool, seed: int, init_cls: int, increment: int):
        self.paths = paths
        labels = paths.classes("train")
        _check_same_classes(paths, labels, paths.classes("test"))
        n = len(labels)
        if not 1 <= init_cls <= n:
            raise UserError(f"init_cls is {init_cls}, but dataset {paths.dataset!r} has {n} classes: choose 1 to {n}.")
        if init_cls < n and increment < 1:
            raise UserError(
                f"increment is {increment}, with {n - init_cls} classes left after phase 0: choose at least 1."
            )
        self.class_order: list[int] = list(range(n))
        if shuffle:
            # The numbers of np.random.seed(seed); np.random.permutation(n), without touching the global generator.
            self.class_order = np.random.RandomState(seed).permutation(n).tolist()
        self.class_names: list[str] = [labels[i] for i in self.class_order]
        self._starts = [0, *range(init_cls, n, max(increment, 1)), n]
        self._train = [paths.images(label, "train") for label in self.class_names]
        self._test = [paths.images(label, "test") for label in self.class_names]
        self._check_no_class_is_empty()

    @property
    def nb_classes(self) -> int:
        return len(self.class_names)

    @property
    def nb_phases(self) -> int:
        return len(self._starts) - 1

    def phase_targets(self, phase: int) -> range:
        """The targets of the classes that are new in a phase (0, 1, ...)."""
        if not 0 <= phase < self.nb_phases:
            raise IndexError(f"phase {phase} of {self.nb_phases}")
        return range(self._starts[phase], self._starts[phase + 1])

    def seen_targets(self, phase: int) -> range:
        """The targets of all classes seen by the end of a phase."""
        return range(self.phase_targets(phase).stop)

    def train_images(self, target: int) -> list[Path]:
        """All train images of a class, sorted."""
        return self._train[target]

    def test_images(self, target: int) -> list[Path]:
        """All test images of a class, sorted."""
        return self._test[target]

    def new_items(self, phase: int) -> list[Item]:
        """Every train image of a phase's new classes, as items of role "new"."""
        return [Item(image, target, "new") for target in self.phase_targets(phase) for image in self._train[target]]

    @property
    def image_kind(self) -> ImageKind:
        """ "small" (32 x 32 inputs) or "large" (224 x 224 inputs)."""
        return self.defaults.image_kind

    @property
    def train_transform(self) -> TrainTransform:
        return self.defaults.train_transform

    @property
    def test_transform(self) -> TestTransform:
        return self.defaults.test_transform

    @property
    def normalise(self) -> Normalise:
        """From pictures as the transforms leave them to what networks take."""
        return self.defaults.normalise

    @cached_property
    def defaults(self) -> DatasetDefaults:
        """What fits this dataset's name and the typical size of its images (the median of a few, by their headers)."""
        return dataset_defaults(self.paths.dataset, _typical_size([images[0] for images in self._train]))

    def _check_no_class_is_empty(self) -> None:
        empty = [
            self.paths.folder(mode) / label
            for mode, listing in (("train", self._train), ("test", self._test))
            for label, images in zip(self.class_names, listing, strict=True)
            if not images
        ]
        if empty:
            more = f" (and {len(empty) - 1} more class folders)" if len(empty) > 1 else ""
            raise UserError(f"no images in {min(empty)}{more}: every class needs train and test images.")


def _check_same_classes(paths: DatasetPaths, train: list[str], test: list[str]) -> None:
    for mode, here, other_mode, there in (("train", train, "test", test), ("test", test, "train", train)):
        only = sorted(set(here) - set(there))
        if only:
            raise UserError(
                f"{len(only)} classes of {paths.folder(mode)} have no folder in {paths.folder(other_mode)}, "
                f"the first is {only[0]!r}: train and test need the same class folders."
            )


def _typical_size(images: Sequence[Path]) -> tuple[int, int]:
    """(width, height) of the image whose shorter side is the median of up to nine, spread over `images`."""
    sizes = []
    for i in np.linspace(0, len(images) - 1, min(len(images), 9)).round().astype(int):
        try:
            width, height, _ = image_bits(images[i])
        except OSError as error:
            raise UnreadableImage(f"cannot read image {error}. Replace the file or take it away.") from error
        sizes.append((width, height))
    return sorted(sizes, key=min)[len(sizes) // 2]


def seed_sequence(model_seed: int, phase: int, epoch: int, *stream: int) -> np.random.SeedSequence:
    """Where the random numbers of an epoch's training data come from, apart for each stream."""
    return np.random.SeedSequence((model_seed, phase, epoch), spawn_key=stream)


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for a `TrainingSet`; `set_epoch(e)` chooses the epoch of the next iteration,
    `set_epoch(e, step)` the rest of it after that many batches.

    One permutation of all items for each (model_seed, phase, epoch), cut into batches of `batch_size`, the number of
    items of all processes together.  Each batch is dealt out to the ranks in turn, so that the ranks' batches together
    are the one process's batch.  The last batch has what is left, or is dropped with `drop_last`.

    groups: ranges of further indices, beyond nb_items; to each batch up to `per_group` of each group are added, drawn
    anew without repetition, and dealt out with it.

    Every rank takes the same number of steps, else distributed training would hang: where the last batch has fewer
    items than there are ranks, the ranks that would get none repeat one of its items, which `sizes` does not count.
    """

    def __init__(
        self,
        nb_items: int,
        batch_size: int,
        model_seed: int,
        phase: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        groups: Sequence[range] = (),
        per_group: int = 0,
    ):
        if batch_size < world_size:
            raise UserError(f"batch_size {batch_size} is less than one image for each of {world_size} processes.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.nb_items = nb_items
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.groups = groups
        self.per_group = per_group
        self.epoch = self.first_step = 0
        self._seeds = (model_seed, phase)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(self.nb_items, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def sizes(self, step: int) -> tuple[int, int]:
        """(items of this rank, items of all ranks) in a batch; 0 for a rank whose one item repeats another's."""
        of_all = min(self.batch_size, self.nb_items - step * self.batch_size)
        of_all += sum(min(self.per_group, len(group)) for group in self.groups)
        return len(range(self.rank, of_all, self.world_size)), of_all

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        rng = np.random.default_rng(seed_sequence(*self._seeds, epoch, _ORDER))
        order = rng.permutation(self.nb_items).tolist()
        for step in range(self.first_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size] + self._from_groups(epoch, step)
            own = batch[self.rank :: self.world_size] or [batch[self.rank % len(batch)]]
            yield [(epoch, index) for index in own]

    def _from_groups(self, epoch: int, step: int) -> list[int]:
        if not self.groups:
            return []
        rng = np.random.default_rng(seed_sequence(*self._seeds, epoch, _GROUPS, step))
        drawn = [rng.permutation(len(group))[: self.per_group] + group.start for group in self.groups]
        return np.concatenate(drawn).tolist()


def check_copies(paths: DatasetPaths, images: Iterable[Path], augmentations_per_image: int) -> None:
    """Raises UserError where one of the copies 0 ... K-1 of `images` is not on disk, with the command that makes them.

    Lists the folder of each class once, and looks at no file itself.
    """
    on_disk: dict[str, frozenset[str]] = {}
    wanted, missing, first = 0, 0, None
    for image in images:
        label = image.parent.name
        if label not in on_disk:
            folder = paths.copies_folder(label)
            on_disk[label] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        wanted += augmentations_per_image
        gaps = [
            k for k, name in enumerate(paths.copy_names(image, augmentations_per_image)) if name not in on_disk[label]
        ]
        missing += len(gaps)
        if gaps and first is None:
            first = (image, gaps[0])
    if first is None:
        return
    image, k = first
    resolution = dataset_defaults(paths.dataset, _typical_size([image])).resolution
    raise UserError(
        f"{missing} of {wanted} copies are missing, the first is {paths.copy(image, k)}. Make them with:\n"
        f"python compress/run.py --data-dir {shlex.quote(str(paths.data_dir))} --dataset {shlex.quote(paths.dataset)} "
        f"--resolution {resolution} --seeds {augmentations_per_image}"
        + (f" --keep-apart {paths.variant}" if paths.variant else "")
    )
