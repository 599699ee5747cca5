"""Which exemplars herding picks (utils/memory/selection.py)."""

import tracemalloc

import numpy as np
import pytest
import torch

from utils.errors import UserError
from utils.memory.selection import herding


def herding_by_hand(features, m):
    """iCaRL's Algorithm 4, one candidate after another."""
    rows = [np.asarray(row, dtype=np.float64) for row in features]
    rows = [row / np.linalg.norm(row) if np.linalg.norm(row) > 0 else row for row in rows]
    mean = sum(rows) / len(rows)
    chosen = []
    for _ in range(m):
        best, best_distance = None, np.inf
        for i, row in enumerate(rows):
            if i in chosen:
                continue
            mean_with_i = (sum((rows[j] for j in chosen), np.zeros_like(mean)) + row) / (len(chosen) + 1)
            distance = np.linalg.norm(mean - mean_with_i)
            if distance < best_distance - 1e-12:
                best, best_distance = i, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["normal", "relu", "float32", "scaled"])
def test_herding_agrees_with_the_algorithm_written_out(seed, kind):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(int(rng.integers(5, 40)), int(rng.integers(2, 20))))
    if kind == "relu":
        features = np.maximum(features, 0)  # as a ResNet's are; some rows may be all zero
    if kind == "float32":
        features = features.astype(np.float32)
    if kind == "scaled":
        features *= rng.uniform(0.01, 100, size=(len(features), 1))
    m = int(rng.integers(1, len(features) + 1))
    assert herding(features, m) == herding_by_hand(features, m)


def test_herding_does_not_mind_how_long_the_features_are():
    features = np.random.default_rng(0).normal(size=(30, 6))
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(30, 1))
    assert herding(features, 12) == herding(features * lengths, 12)
    assert herding(features * 1e-6, 12) == herding(features * 1e6, 12)


def test_herding_picks_each_row_once_and_a_shorter_pick_is_the_start_of_a_longer():
    features = np.random.default_rng(0).normal(size=(25, 4))
    everything = herding(features, 25)
    assert sorted(everything) == list(range(25))
    for m in (0, 1, 7, 24):
        assert herding(features, m) == everything[:m]


@pytest.mark.parametrize("shape", [(5, 11), (6, 33), (7, 63), (37, 513)])
def test_of_equal_rows_the_first_is_picked(shape):
    """Odd shapes: products of equal rows then differ by rounding, from row to row."""
    row = np.random.default_rng(0).normal(size=shape[1])
    assert herding(np.tile(row, (shape[0], 1)).astype(np.float32), shape[0]) == list(range(shape[0]))


def test_of_equal_pairs_the_first_is_picked():
    pair = np.random.default_rng(1).normal(size=(6, 11))
    assert [i % 6 for i in herding(np.concatenate([pair, pair]), 2)] == [
        i % 6 for i in herding_by_hand([*pair, *pair], 2)
    ]
    assert herding(np.concatenate([pair, pair]), 1)[0] < 6


def test_the_first_pick_is_the_row_nearest_to_the_mean():
    angles = np.array([0.0, 0.1, 0.35, 0.5, 0.9])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert herding(features, 1) == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_herding_takes_tensors(dtype):
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert herding(features.clone().requires_grad_(), 9) == herding_by_hand(features.double().numpy(), 9)


def test_herding_holds_no_more_than_a_few_times_the_features():
    features = np.random.default_rng(0).normal(size=(2000, 128))
    tracemalloc.start()
    herding(features, 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * features.nbytes  # n x m x d would be 300 times


@pytest.mark.parametrize("m", [-1, 6])
def test_herding_can_not_pick_more_than_there_are(m):
    with pytest.raises(ValueError, match=f"{m} of 5"):
        herding(np.ones((5, 2)), m)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_features_are_a_message(value):
    features = np.ones((5, 2))
    features[3, 1] = value
    with pytest.raises(UserError, match="diverged"):
        herding(features, 2)
