"""Tables as text: the one writer of Markdown, and of "mean ± deviation"."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from utils.results.records import Spread


def mean_std(value: Spread | None, digits: int = 1, missing: str = "-") -> str:
    """Such as "71.3 ± 0.4"; without the deviation where there is none, as of one class order."""
    if value is None:
        return missing
    return f"{value.mean:,.{digits}f}" + (f" ± {value.std:,.{digits}f}" if value.std else "")


class Paired(NamedTuple):
    """Differences of scores over the class orders that two runs share.

    differences: by seed; mean; error: standard error of the mean, None for fewer than two class orders.
    """

    differences: dict[int, float]
    mean: float
    error: float | None

    def __str__(self) -> str:
        """Such as "+4.3 (0.8)"."""
        return f"{self.mean:+.1f}" if self.error is None else f"{self.mean:+.1f} ({self.error:.1f})"


def paired(scores: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """scores - reference for each seed that both have; None where they share none."""
    differences = {seed: scores[seed] - reference[seed] for seed in sorted(scores.keys() & reference.keys())}
    if not differences:
        return None
    values = np.array(list(differences.values()))
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Paired(differences, float(values.mean()), error)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
