"""The order of an epoch: which items make a batch.

Every random choice is a function of (model_seed, phase, epoch, item) alone.  The sampler keeps no random state: the
epoch travels inside each index, so neither the number of workers, nor where a run was resumed, nor how many processes
share a batch changes what is drawn.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError

_ORDER, _GROUPS = 0, 2  # one stream of random numbers each, apart for the same seed


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
