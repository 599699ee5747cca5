"""Which images of a class become its exemplars, in which order."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Features: TypeAlias = "np.ndarray | Tensor"

_TIE = 1e-10  # scores closer than this are the same: rounding differs between equal rows, and between machines


def herding(features: Features, m: int) -> list[int]:
    """Indices of m rows in the order in which iCaRL's herding picks them (Rebuffi et al. 2017, Algorithm 4).

    features: n x d, one row per image of a class; rows are L2-normalised here.  Each pick brings the mean of the
    picked rows closest to the mean of all; of equals, the first.

    Raises ValueError for m outside 0 ... n, and UserError for features that aren't finite.
    """
    n = len(features)
    if not 0 <= m <= n:
        raise ValueError(f"can't pick {m} of {n}")
    x, norms = _unit_rows(features)
    # |mean - (picked + x_i)/k| is smallest where 2 x_i.(k mean - picked) - |x_i|^2 is largest: one product per pick,
    # and nothing larger than the features is held.  vecdot instead of BLAS's matrix-vector product, which would start
    # threads for a fraction of a millisecond's work and round differently with another number of them.
    twice_along_mean = 2 * np.vecdot(x, x.mean(axis=0))
    score = -(norms > 0).astype(np.float64)
    chosen = []
    for _ in range(m):
        score += twice_along_mean
        best = int(np.argmax(score >= score.max() - _TIE))
        chosen.append(best)
        score -= 2 * np.vecdot(x, x[best])
        score[best] = -np.inf
    return chosen


def closest_to_mean(features: Features, m: int) -> list[int]:
    """Indices of the m rows nearest to the mean of all (L2-normalised) rows, nearest first; of equals, the first.

    features and errors as for `herding`.
    """
    if not 0 <= m <= len(features):
        raise ValueError(f"can't pick {m} of {len(features)}")
    x, _ = _unit_rows(features)
    distances = np.linalg.norm(x - x.mean(axis=0), axis=1)
    return np.argsort((distances / _TIE).round(), kind="stable")[:m].tolist()


def _unit_rows(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """(rows of unit length, their lengths before) in float64; a row of zeros stays one."""
    if hasattr(features, "detach"):  # a tensor: torch, which takes seconds, is not imported to ask
        features = features.detach().cpu().double().numpy()
    x = np.asarray(features, dtype=np.float64)
    if not np.isfinite(x).all():
        raise UserError("features are not finite numbers: training has diverged. Lower the learning rate.")
    norms = np.linalg.norm(x, axis=1)
    return x / np.where(norms > 0, norms, 1)[:, None], norms


SELECTIONS = ("herding", "random", "closest")
"""How a class's exemplars are chosen: `herding`, at random, or by the distance to the class mean."""


def select(name: str, features: Features, m: int, *, seed: Sequence[int]) -> list[int]:
    """Indices of m rows in order of choice, by one of `SELECTIONS`; seed: of "random"."""
    if name == "random":
        return np.random.default_rng(seed).permutation(len(features))[:m].tolist()
    return {"herding": herding, "closest": closest_to_mean}[name](features, m)
