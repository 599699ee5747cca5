"""Which items make up each batch of an epoch.

Every random choice is a function of (model_seed, phase, epoch, item).  The sampler keeps no random state and passes the
epoch along with each index, so results depend neither on the number of workers or processes nor on where a run resumed.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError

_ORDER = 0
"""The stream of random numbers for the order."""
VIEW = 2**40
"""What is added to the epoch in the key of an item's second view, so that its random numbers are others."""


def seed_sequence(model_seed: int, phase: int, epoch: int, *stream: int) -> np.random.SeedSequence:
    """Source of the random numbers of an epoch's training data, independent for each stream."""
    return np.random.SeedSequence((model_seed, phase, epoch), spawn_key=stream)


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for a `TrainingSet`.

    `set_epoch(e)` sets the epoch of the next iteration, `set_epoch(e, step)` skips its first `step` batches.
    Each (model_seed, phase, epoch) has one permutation of all items, cut into batches of `batch_size` items over all
    processes; the last batch may be smaller.  Rank r takes items r, r + world_size, ... of each batch.

    All ranks take the same number of steps, or distributed training would hang: where the last batch has fewer items
    than there are ranks, the ranks without an item repeat one, which `sizes` does not count.

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
        self.nb_items = nb_items
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.views = views
        self.epoch = self.first_step = 0
        self._seeds = (model_seed, phase)

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
            yield [(epoch + view * VIEW, index) for view in range(self.views) for index in own]
