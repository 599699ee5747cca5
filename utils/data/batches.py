"""Datasets that make a whole batch at a time: a phase's training set, and images without augmentation.

How an item is augmented is a function of (model_seed, phase, epoch, item).  Datasets keep no random state: keys contain
the epoch, so results depend neither on the number of workers, nor on where a run resumed, nor on the rest of the batch.
"""

import abc
import gc
import logging
import shutil
import signal
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.cli import NOTICES
from utils.data.augment import SmallTest, TestTransform, TrainTransform, random_bits, uniform
from utils.data.cache import PictureCache
from utils.data.images import read_prepared
from utils.data.items import NEW, REAL, Item, PathTable
from utils.data.paths import DatasetPaths
from utils.data.sampler import seed_sequence
from utils.errors import UserError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
"""(indices: B, images: B x 3 x S x S of uint8, targets: B)."""

AMPLE_SHARED_MEMORY = 2 << 30
"""Bytes of free shared memory that are taken to be enough without computing what the workers need."""
PREFETCHED = 2
"""Batches that a worker prepares in advance: DataLoader's default."""

_SECONDS_AFTER_SIGTERM = 20

_ITSELF = -1  # instead of a copy's number: the image


class Batched(Dataset, abc.ABC):
    """A dataset that makes a whole batch at a time, for `batch_loader`."""

    @abc.abstractmethod
    def __getitems__(self, keys: Sequence) -> Batch:
        """The batch of these keys."""

    def __getitem__(self, key) -> tuple[int, Tensor, int]:
        """(index, image: 3 x S x S, target) of one key, the same as in any batch."""
        (index,), (image,), (target,) = self.__getitems__([key])
        return int(index), image, int(target)


class TrainingSet(Batched):
    """The training set of a phase, augmented differently in each epoch.

    An exemplar that is not kept as an image is read as one of its K copies, each equally often.  An image is replaced
    by one of its K copies with probability p: new images and real exemplars for scope "all", only real exemplars for
    "exemplars".

    augmentation_prob: p; augmentations_per_image: K; pixels: cache of decoded pictures, None to decode each time.

    Keys are (epoch, index); the result for a key does not depend on earlier calls.
    Raises UserError, naming the file, for a picture that can't be read.
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
        self.images = PathTable(item.image for item in items)
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
        return len(self.images)

    def __getstate__(self):
        return {**self.__dict__, "_seen": {}}

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        index = np.array([index for _, index in keys], np.int64)
        epoch_states = np.array([_epoch_state(*self._seeds, epoch) for epoch, _ in keys], np.uint64)
        # Each item has its own state, and from it one state for the choice of copy and one for the transform.
        states = random_bits(random_bits(epoch_states + index.astype(np.uint64), 1)[:, 0], 2)
        replaced, number = uniform(states[:, 0], 2).T
        number = (number * self.augmentations_per_image).astype(int)
        copy_numbers = np.where(replaced < self._copy_prob[index], number, _ITSELF)
        pictures = [self._picture(*choice) for choice in zip(index.tolist(), copy_numbers.tolist(), strict=True)]
        images = self.transform(pictures, states[:, 1])
        return torch.from_numpy(index), images, torch.from_numpy(self._targets[index])

    def _picture(self, index: int, number: int) -> np.ndarray:
        """The prepared picture of an item (number _ITSELF) or of one of its copies."""
        if (picture := self._seen.get((index, number))) is not None:
            return picture
        image = self.images[index]
        path = image if number == _ITSELF else self.paths.copy(Path(image), number)
        if self.pixels is None:
            return read_prepared(path, self.transform.prepare)
        picture, kept = self.pixels.read(path)
        if kept:
            self._seen[index, number] = picture
        return picture


class ImageSet(Batched):
    """Images under the test transform, for evaluation and features.  Keys are indices.

    pixels: cache of decoded pictures.  Small ones are added to it, as decoding takes most of their batches' time; large
    ones are not: they are read once per phase, and the cache is for training pictures.
    Raises UserError, naming the file, for a picture that can't be read.
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
        self.images = PathTable(images)
        self.targets = np.array(targets, np.int64)
        self.transform = transform
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        pictures = [self._picture(self.images[index]) for index in keys]
        index = np.array(keys, np.int64)
        return torch.from_numpy(index), self.transform(pictures), torch.from_numpy(self.targets[index])

    def _picture(self, path: str) -> np.ndarray:
        if self.pixels is not None and isinstance(self.transform, SmallTest):
            return self.pixels.read(path)[0]
        picture = None if self.pixels is None else self.pixels.find(path)
        return read_prepared(path, self.transform.prepare) if picture is None else picture


def batch_loader(
    dataset: Batched, batches: Iterable[list], workers: int = 0, *, pin_memory: bool = False
) -> DataLoader:
    """A loader of the dataset's batches; `batches` gives the keys of each.

    workers: worker processes, which live as long as the loader; 0 makes batches in this process.  Where the batches of
    all workers don't fit in shared memory, 0 is used, with a warning.
    """
    workers = _fitting_workers(dataset, batches, workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )


def _fitting_workers(dataset: Batched, batches: Iterable[Sequence], workers: int) -> int:
    """The number of workers; 0 where /dev/shm (64 MB in Docker) can't hold their batches, as SIGBUS would kill them."""
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
        "num_workers: %d workers need up to %d MB of shared memory, /dev/shm has %d MB: continuing without workers. "
        "Enlarge it (docker run --shm-size=2g), or lower batch_size or num_workers.",
        workers,
        needed >> 20,
        free >> 20,
    )
    return 0


def _start_worker(worker: int) -> None:
    """Share memory with the main process, and outlive the signals that it gets.

    The garbage collector must not write to, and so copy, the main process's objects.  Ctrl-C and a scheduler's notice
    reach the workers too, when training wants a few more batches.  The main process ends them, and multiprocessing does
    so by SIGTERM: after that they live for some seconds at most.
    """
    gc.freeze()
    for notice in NOTICES:
        signal.signal(notice, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))


def _unchanged(batch: Any) -> Any:
    return batch


@lru_cache(maxsize=64)
def _epoch_state(model_seed: int, phase: int, epoch: int) -> int:
    """64 bits from which the states of an epoch's items are derived."""
    return int(seed_sequence(model_seed, phase, epoch).generate_state(1, np.uint64)[0])
