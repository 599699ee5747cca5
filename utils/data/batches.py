"""Which items make up each batch of an epoch, and datasets that make a whole batch at a time.

Every random choice is a function of (model_seed, phase, epoch, item).  Samplers and datasets keep no random state: keys
contain the epoch, so results depend neither on the number of workers or processes, nor on where a run resumed, nor on
the rest of the batch.
"""

import abc
import gc
import logging
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.cli import NOTICES
from utils.data.augment import SmallTest, TestTransform, TrainTransform, random_bits, uniform
from utils.data.cache import PictureCache
from utils.data.classes import NEW, REAL, Item
from utils.data.images import read_prepared
from utils.data.paths import DatasetPaths
from utils.errors import UserError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
"""(indices: B, images: B x 3 x S x S of uint8, targets: B)."""

_AMPLE_SHARED_MEMORY = 2 << 30  # bytes that are enough for all workers
_PREFETCHED = 2  # batches that a worker prepares in advance: DataLoader's default
_SECONDS_AFTER_SIGTERM = 20
_ORDER = 0  # the stream of random numbers for an epoch's order
_VIEW = 2**40  # added to the epoch in the key of an item's second view, so that its random numbers are others
_ITSELF = -1  # instead of a copy's number: the image


def seed_sequence(model_seed: int, phase: int, epoch: int, *stream: int) -> np.random.SeedSequence:
    """Source of the random numbers of an epoch's training data, independent for each stream."""
    return np.random.SeedSequence((model_seed, phase, epoch), spawn_key=stream)


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for a `TrainingSet`.

    `set_epoch(e)` sets the epoch of the next iteration, `set_epoch(e, step)` skips its first `step` batches.
    Each (model_seed, phase, epoch) has one permutation of all items, cut into batches of `batch_size` items over all
    processes; the last batch may be smaller.  Rank r takes items r, r + world_size, ... of each batch; in a last batch
    of fewer items than ranks, ranks without an item repeat one, which `sizes` does not count, or training would hang.

    views: how often a batch has its items, one after another, with random numbers of their own.
    Raises UserError for a batch_size below world_size.
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
        views: int = 1,
    ):
        if batch_size < world_size:
            raise UserError(f"batch_size {batch_size} is less than one image for each of {world_size} processes.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.nb_items, self.batch_size = nb_items, batch_size
        self.rank, self.world_size = rank, world_size
        self.views = views
        self._seeds = (model_seed, phase)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-self.nb_items // self.batch_size)

    def sizes(self, step: int) -> tuple[int, int]:
        """(items of this rank, items of all ranks) in a batch, each as often as it has views; 0 for a rank that repeats
        another's item."""
        total = min(self.batch_size, self.nb_items - step * self.batch_size)
        return self.views * len(range(self.rank, total, self.world_size)), self.views * total

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        rng = np.random.default_rng(seed_sequence(*self._seeds, epoch, _ORDER))
        order = rng.permutation(self.nb_items).tolist()
        for step in range(self.first_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            own = batch[self.rank :: self.world_size] or [batch[self.rank % len(batch)]]
            yield [(epoch + view * _VIEW, index) for view in range(self.views) for index in own]


def path_table(paths: Iterable[Path]) -> np.ndarray:
    """The paths as bytes, in one block of memory.

    Worker processes share their parent's memory until it is written to, and reading a Python object writes its
    reference count: a list of Path objects would be copied into each worker, 200 MB for ImageNet.
    """
    return np.array([os.fsencode(path) for path in paths], np.bytes_)


class Batched(Dataset, abc.ABC):
    """A dataset that makes a whole batch at a time, for `batch_loader`."""

    @abc.abstractmethod
    def __getitems__(self, keys: Sequence) -> Batch:
        """The batch of these keys.  Raises UserError, naming the file, for a picture that can't be read."""

    def __getitem__(self, key) -> tuple[int, Tensor, int]:
        """(index, image: 3 x S x S, target) of one key, the same as in any batch."""
        (index,), (image,), (target,) = self.__getitems__([key])
        return int(index), image, int(target)


class TrainingSet(Batched):
    """The training set of a phase, augmented differently in each epoch.  Keys are (epoch, index).

    An exemplar that is not kept as an image is read as one of its K copies, each equally often.  An image is replaced
    by one of its K copies with probability p: new images and real exemplars for scope "all", only real exemplars for
    "exemplars".
    augmentation_prob: p; augmentations_per_image: K; pixels: cache of decoded pictures, None to decode each time.
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
        self.images, self.paths = path_table(item.image for item in items), paths
        self.transform, self.pixels = transform, pixels
        self.augmentations_per_image = augmentations_per_image
        chances = {NEW: augmentation_prob if augmentation_scope == "all" else 0.0, REAL: augmentation_prob}
        self._copy_prob = np.array([chances.get(item.role, 1.0) for item in items])
        self._targets = np.array([item.target for item in items], np.int64)
        self._seeds = (model_seed, phase)
        self._seen: dict[tuple[int, int], np.ndarray] = {}
        copied = {item.image.parent: item.image for item in items if chances.get(item.role, 1.0) > 0}
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
        image = os.fsdecode(self.images[index])
        path = image if number == _ITSELF else self.paths.copy(Path(image), number)
        if self.pixels is None:
            return read_prepared(path, self.transform.prepare)
        picture, is_cached = self.pixels.read(path)
        if is_cached:
            self._seen[index, number] = picture
        return picture


class ImageSet(Batched):
    """Images under the test transform, for evaluation and features.  Keys are indices.

    pixels: cache of decoded pictures.  Small ones are added to it, as decoding takes most of their batches' time; large
    ones, which are read once per phase, are not.
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
        self.images, self.targets = path_table(images), np.array(targets, np.int64)
        self.transform, self.pixels = transform, pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        pictures = [self._picture(os.fsdecode(self.images[index])) for index in keys]
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
        collate_fn=tuple,  # the batch as it is
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )


def _fitting_workers(dataset: Batched, batches: Iterable[Sequence], workers: int) -> int:
    """The number of workers; 0 where /dev/shm (64 MB in Docker) can't hold their batches, as SIGBUS would kill them."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return workers
    if not workers or free >= _AMPLE_SHARED_MEMORY or not (first := next(iter(batches), [])):
        return workers
    needed = workers * (_PREFETCHED + 1) * len(first) * dataset[first[0]][1].nbytes
    if needed <= free:
        return workers
    log.warning(
        f"num_workers: {workers} workers need up to {needed >> 20} MB of shared memory, /dev/shm has {free >> 20} MB: "
        "continuing without workers. Enlarge it (docker run --shm-size=2g), or lower batch_size or num_workers."
    )
    return 0


def _start_worker(worker: int) -> None:
    """Share memory with the main process: the garbage collector must not write to, and so copy, its objects.  Outlive
    Ctrl-C and a scheduler's notice, after which training wants a few more batches; multiprocessing ends workers by
    SIGTERM, after which they live for some seconds at most.
    """
    gc.freeze()
    for notice in NOTICES:
        signal.signal(notice, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_SECONDS_AFTER_SIGTERM))


@lru_cache(maxsize=64)
def _epoch_state(model_seed: int, phase: int, epoch: int) -> int:
    """64 bits from which the states of an epoch's items are derived."""
    return int(seed_sequence(model_seed, phase, epoch).generate_state(1, np.uint64)[0])
