"""Tables as text: the one writer of Markdown, of columns on a screen, and of "mean ± deviation"."""

import math
import shutil
import textwrap
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


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None, left: int = 1) -> str:
    """Columns under their titles, the first `left` ones flush left.

    What is wider than `width` (default: the terminal) goes on below, with the first column again, whose texts are
    broken where they take more than two fifths of the width.
    """
    width = width or shutil.get_terminal_size().columns
    cells = [list(header), *map(list, rows)]
    if sum(max(map(len, column)) + 2 for column in zip(*cells, strict=True)) - 2 > width:
        first = [textwrap.wrap(row[0], max(12, 2 * width // 5)) or [""] for row in cells]
    else:
        first = [[row[0]] for row in cells]
    widths = [max(len(part) for parts in first for part in parts)]
    widths += [max(map(len, column)) for column in list(zip(*cells, strict=True))[1:]]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(header)):
        if blocks[-1] and widths[0] + sum(widths[i] + 2 for i in [*blocks[-1], column]) > width:
            blocks.append([])
        blocks[-1].append(column)
    texts = []
    for block in blocks:
        lines = []
        for parts, row in zip(first, cells, strict=True):
            padded = [row[i].ljust(widths[i]) if i < left else row[i].rjust(widths[i]) for i in block]
            lines += ["  ".join([parts[0].ljust(widths[0]), *padded]).rstrip(), *parts[1:]]
        head = len(first[0])
        rule = "-" * (widths[0] + sum(widths[i] + 2 for i in block))
        texts.append("\n".join([*lines[:head], rule, *lines[head:]]))
    return "\n\n".join(texts)
