"""The sampler of batches: each item once an epoch, orders, parts of ranks."""

import numpy as np
import pytest

from tests.chance import CHI2_999, chi2
from utils.data.batches import EpochBatchSampler
from utils.errors import UserError


def flat(lists):
    return [index for indices in lists for index in indices]


def batches(nb_items, batch_size, epoch=0, model_seed=1, phase=0, **options):
    sampler = EpochBatchSampler(nb_items, batch_size, model_seed, phase, **options)
    sampler.set_epoch(epoch)
    result = list(sampler)
    assert len(sampler) == len(result)
    assert {key[0] for batch in result for key in batch} <= {epoch}
    return [[index for _, index in batch] for batch in result]


@pytest.mark.parametrize(("nb_items", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1), (0, 4)])
def test_an_epoch_shows_every_item_once(nb_items, batch_size):
    found = batches(nb_items, batch_size)
    assert sorted(flat(found)) == list(range(nb_items))
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)


def test_each_epoch_phase_and_seed_has_an_order_of_its_own():
    orders = [
        tuple(flat(batches(50, 8, epoch=epoch, phase=phase, model_seed=seed)))
        for epoch in range(3)
        for phase in range(3)
        for seed in range(3)
    ]
    assert len(set(orders)) == 27
    assert batches(50, 8, epoch=2) == batches(50, 8, epoch=2)


def test_every_place_in_the_order_is_as_likely_for_an_item():
    counts = np.zeros((5, 5))
    for epoch in range(1000):
        counts[np.arange(5), flat(batches(5, 2, epoch=epoch))] += 1
    assert chi2(counts, np.full((5, 5), 200)) < CHI2_999[24]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ranks_batches_together_are_the_one_rank_batches(world_size):
    nb_items, batch_size = 55, 8
    whole = batches(nb_items, batch_size, epoch=4)
    ranks = [batches(nb_items, batch_size, epoch=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert sorted(flat(shares)) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_rank_is_left_without_a_step():
    """Nine items in batches of 8: the last batch has one, both ranks read it."""
    whole = batches(9, 8)
    ranks = [batches(9, 8, rank=rank, world_size=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [2, 2]
    assert all(rank[1] == whole[1] for rank in ranks)


def test_a_batch_needs_an_image_for_each_process():
    with pytest.raises(UserError, match=r"batch_size 3.*4 processes"):
        EpochBatchSampler(10, 3, 1, 0, rank=0, world_size=4)
    with pytest.raises(ValueError, match="rank 2"):
        EpochBatchSampler(10, 4, 1, 0, rank=2, world_size=2)
