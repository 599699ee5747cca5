"""The pictures of a batch, all of it at once: a phase's training set, and pictures as they are.

What a picture shows in an epoch is a function of (model_seed, phase, epoch, item) alone (DESIGN section 6).  Datasets
keep no random state: the epoch travels inside each index, so that neither the number of workers, nor where a run was
resumed, nor what else is in a batch changes what is drawn.
"""

import abc
import logging
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.augment import TestTransform, TrainTransform, random_bits, uniform
from utils.data.cache import PictureCache
from utils.data.images import read_prepared
from utils.data.items import NEW, REAL, Item
from utils.data.paths import DatasetPaths
from utils.data.sampler import seed_sequence
from utils.errors import UserError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
"""(indices: B, images: B x 3 x S x S of uint8, targets: B)."""

AMPLE_SHARED_MEMORY = 2 << 30
"""Bytes of free shared memory from which on nobody asks how much the workers need."""
PREFETCHED = 2
"""Batches that a worker makes ahead: DataLoader's default."""

_ITSELF = -1  # in place of a copy's number


class Batched(Dataset, abc.ABC):
    """A dataset that makes a whole batch at a time; `batch_loader` knows about that."""

    @abc.abstractmethod
    def __getitems__(self, keys: Sequence) -> Batch:
        """The batch of some keys."""

    def __getitem__(self, key) -> tuple[int, Tensor, int]:
        """(index, image: 3 x S x S, target) of one key, as it is in any batch."""
        (index,), (image,), (target,) = self.__getitems__([key])
        return int(index), image, int(target)


class TrainingSet(Batched):
    """The training set of a phase; what an item shows is drawn anew in each epoch.

    An exemplar that is not kept as an image becomes its copy number k, uniform in 0 ... K-1.  An image is replaced by
    one of its K copies with probability p: new images and real exemplars with scope "all", real exemplars alone with
    "exemplars".

    items: what is trained on; augmentation_prob: p; augmentations_per_image: K; pixels: where decoded pictures are
    kept, None to decode them each time.

    Keys are (epoch, index).  Stateless: whoever asks and in whatever order gets the same.
    Raises UserError naming the file of a picture that can't be read.
    """

    def __init__(
        self,
        items: Sequence[Item],
        paths: DatasetPaths,
        transform: TrainTransform,
        augmentation_prob: float,
        augmentations_per_image: int,
        augmentation_scope: Literal["all", "exemplars"],
        model_seed: int,
        phase: int,
        pixels: PictureCache | None = None,
    ):
        if not 0 <= augmentation_prob <= 1:
            raise UserError(f"augmentation_prob is a probability, 0 to 1, not {augmentation_prob}.")
        if augmentation_scope not in ("all", "exemplars"):
            raise UserError(f'augmentation_scope is "all" or "exemplars", not {augmentation_scope!r}.')
        self.items = items
        self.paths = paths
        self.transform = transform
        self.augmentations_per_image = augmentations_per_image
        self.pixels = pixels
        chances = {NEW: augmentation_prob if augmentation_scope == "all" else 0.0, REAL: augmentation_prob}
        self._copy_prob = np.array([chances.get(item.role, 1.0) for item in items])
        self._targets = np.array([item.target for item in items], np.int64)
        self._seeds = (model_seed, phase)
        self._seen: dict[tuple[int, int], np.ndarray] = {}
        copied = {item.image.parent: item.image for item in items if chances.get(item.role, 1.0) > 0}
        if copied and augmentations_per_image < 1:
            raise UserError("augmentations_per_image is 0, but exemplars are to be regenerated: it needs at least 1.")
        for image in copied.values():
            paths.copy(image, 0)  # lists the class's folder here once, not in each worker

    def __len__(self) -> int:
        return len(self.items)

    def __getstate__(self):
        return {**self.__dict__, "_seen": {}}

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        index = np.array([index for _, index in keys], np.int64)
        of_epochs = np.array([_epoch_state(*self._seeds, epoch) for epoch, _ in keys], np.uint64)
        # Each item has a state of its own, and of that one for each purpose.
        states = random_bits(random_bits(of_epochs + index.astype(np.uint64), 1)[:, 0], 2)
        replaced, number = uniform(states[:, 0], 2).T
        number = (number * self.augmentations_per_image).astype(int)
        shown = np.where(replaced < self._copy_prob[index], number, _ITSELF)
        pictures = [self._picture(*place) for place in zip(index.tolist(), shown.tolist(), strict=True)]
        images = self.transform(pictures, states[:, 1])
        return torch.from_numpy(index), images, torch.from_numpy(self._targets[index])

    def _picture(self, index: int, number: int) -> np.ndarray:
        """The picture of an item, or one of its copies, as the transform takes it."""
        if (picture := self._seen.get((index, number))) is not None:
            return picture
        image = self.items[index].image
        path = image if number == _ITSELF else self.paths.copy(image, number)
        if self.pixels is None:
            return read_prepared(path, self.transform.prepare)
        picture, kept = self.pixels.read(path)
        if kept:
            self._seen[index, number] = picture
        return picture


class ImageSet(Batched):
    """Pictures as they are, for evaluation and features.  Keys are indices.

    pixels: pictures that training has decoded, where some are the same.  None are added: these are read once a phase.
    Raises UserError naming the file of a picture that can't be read.
    """

    def __init__(
        self,
        images: Sequence[Path],
        targets: Sequence[int],
        transform: TestTransform,
        pixels: PictureCache | None = None,
    ):
        if len(images) != len(targets):
            raise ValueError(f"{len(images)} images, {len(targets)} targets")
        self.images = images
        self.targets = targets
        self.transform = transform
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        pictures = [self._picture(self.images[index]) for index in keys]
        targets = torch.tensor([self.targets[index] for index in keys])
        return torch.tensor(keys), self.transform(pictures), targets

    def _picture(self, path: Path) -> np.ndarray:
        prepare = self.transform.prepare
        picture = None if self.pixels is None else self.pixels.find(path)
        return read_prepared(path, prepare) if picture is None else picture


def batch_loader(
    dataset: Batched, batches: Iterable[Sequence], workers: int = 0, *, pin_memory: bool = False
) -> DataLoader:
    """The dataset's batches, of the keys that `batches` lists (each time it is gone through).

    workers: processes, which stay for as long as the loader does; 0: the batches are made when they are asked for, as
    also, with a warning, where the batches of all workers don't fit in the machine's shared memory.
    """
    workers = _fitting_workers(dataset, batches, workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )


def _fitting_workers(dataset: Batched, batches: Iterable[Sequence], workers: int) -> int:
    """The number of workers, or 0 where a small /dev/shm (Docker's has 64 MB) can't hold their batches.

    A worker that finds it full dies of SIGBUS.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return workers
    first = next(iter(batches), None) if workers and free < AMPLE_SHARED_MEMORY else None
    if first is None:
        return workers
    needed = workers * (PREFETCHED + 1) * len(first) * dataset[first[0]][1].nbytes
    if needed <= free:
        return workers
    log.warning(
        "num_workers: %d workers need up to %d MB of shared memory, /dev/shm has %d: going on without workers. "
        "Enlarge it (docker run --shm-size=2g), or lower batch_size or num_workers.",
        workers,
        needed >> 20,
        free >> 20,
    )
    return 0


def _as_it_is(batch: Batch) -> Batch:
    return batch


@lru_cache(maxsize=64)
def _epoch_state(model_seed: int, phase: int, epoch: int) -> int:
    """What the states of an epoch's items come from: 64 bits."""
    return int(seed_sequence(model_seed, phase, epoch).generate_state(1, np.uint64)[0])
