"""Tables of runs: rows with their differences to others, what can be concluded from them, and the one writer of
Markdown and of "mean ± deviation"."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TextIO

import numpy as np

from exps.report.entries import REAL, Entry, Runs, entries, reference_of
from utils import cli
from utils.results.records import Classifier, Spread

WORDS: dict[Classifier, str] = {"cnn": "head", "nme": "nearest means", "student": "student", "svm": "SVM"}
"""Classifiers in the words of the table."""
LEGEND = (
    "head: average incremental accuracy of the network's own classifier (CNN in PyCIL), the mean over phases of top-1 "
    "accuracy over all classes seen, in %; nearest means: the same by the nearest mean of a class's exemplars (NME); "
    "last phase: top-1 accuracy after the last phase; forgetting: how many points the classes of a phase lost from "
    "their best to the end, mean over phases; bytes: true bytes per class of what is kept at the end, class texts "
    "included; n: class orders. p: probability that a real picture is replaced by one of its copies in training. "
    "±: standard deviation over class orders. Differences are paired by class order, with their standard error in "
    "parentheses."
)
FEW = 0.8
"""A run with a budget in bytes that keeps less than this share of it has what it lacks said beside it."""


def mean_std(value: Spread | None, digits: int = 1, missing: str = "-") -> str:
    """Such as "71.3 ± 0.4"; without the deviation where there is none, as of one class order."""
    if value is None:
        return missing
    return f"{value.mean:,.{digits}f}" + (f" ± {value.std:,.{digits}f}" if value.std else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


class Paired(NamedTuple):
    """Differences of scores over the n class orders that two runs share.

    error: standard error of the mean, None for one class order.
    """

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        """Such as "+4.3 (0.8)"."""
        return f"{self.mean:+.1f}" if self.error is None else f"{self.mean:+.1f} ({self.error:.1f})"


def paired(scores: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """scores - reference over the seeds that both have; None where they share none."""
    differences = np.array([scores[seed] - reference[seed] for seed in sorted(scores.keys() & reference.keys())])
    n = len(differences)
    if not n:
        return None
    return Paired(float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None, n)


@dataclass
class Cell:
    """A classifier's part of a row.

    to_real, to_codec: differences to real exemplars and to the best codec; best: which of average, last and forgetting
    no comparable row of the same method and budget exceeds.
    """

    entry: Entry
    to_real: Paired | None = None
    to_codec: Paired | None = None
    best: Collection[str] = ()

    @property
    def ranks(self) -> dict[str, float]:
        """Its figures, the higher the better."""
        entry = self.entry
        ranks = {"average": entry.average.mean, "last": entry.last.mean}
        return ranks | ({"forgetting": -entry.forgetting.mean} if entry.forgetting else {})


@dataclass(frozen=True)
class Row:
    """A run.

    entry: of its first classifier; unequal: why its bytes are not those of the others, "" where they are.
    """

    entry: Entry
    cells: dict[Classifier, Cell]
    unequal: str

    @property
    def group(self) -> tuple[str, int | None]:
        """Rows of one method and budget are compared with each other."""
        return self.entry.model, self.entry.budget

    @property
    def is_comparable(self) -> bool:
        """Whether the row may be the best: a form that leaves bytes of a budget unused has no advantage by that."""
        return not self.unequal or (self.entry.budget is not None and not self.entry.results.unfinished)


def table_rows(compared: Sequence[Entry]) -> list[Row]:
    """A row for each run, by method and budget; the best by its first classifier first, what is not comparable last."""
    rows: dict[str, Row] = {}
    for entry in compared:
        if entry.name not in rows:
            rows[entry.name] = Row(entry, {}, _unequal(entry, reference_of(entry, compared)))
        rows[entry.name].cells[entry.classifier] = _cell(entry, compared)
    for row in rows.values():
        _mark_best(row, [other for other in rows.values() if other.group == row.group and other.is_comparable])
    return sorted(
        rows.values(), key=lambda row: (row.group[0], row.group[1] or 0, not row.is_comparable, -row.entry.average.mean)
    )


def _cell(entry: Entry, compared: Sequence[Entry]) -> Cell:
    if entry.results.unfinished:
        return Cell(entry)
    reference = reference_of(entry, compared)
    same = [e for e in compared if (e.method, e.budget, e.results.unfinished) == (entry.method, entry.budget, 0)]
    codecs = [e for e in same if e.is_codec]
    codec = max(codecs, key=lambda e: e.average.mean, default=None)
    return Cell(
        entry,
        paired(entry.scores, reference.scores) if reference and reference.form == REAL else None,
        paired(entry.scores, codec.scores) if codec and codec is not entry else None,
    )


def _unequal(entry: Entry, reference: Entry | None) -> str:
    if phases := entry.results.unfinished:
        return f"not comparable: {phases} phase{'s' if phases > 1 else ''} done"
    used = entry.bytes_per_class
    if entry.budget is not None:
        return f"uses {used:,.0f} of {entry.budget:,} bytes" if used < FEW * entry.budget else ""
    if reference is None or abs(used - reference.bytes_per_class) <= 0.05 * reference.bytes_per_class:
        return ""
    return f"not comparable: {reference.line} has {reference.bytes_per_class:,.0f} bytes"


def _mark_best(row: Row, group: Sequence[Row]) -> None:
    """group: the rows that it is compared with, itself included."""
    if len(group) < 2 or not row.is_comparable:
        return
    for classifier, cell in row.cells.items():
        rivals = [other.cells[classifier].ranks for other in group if classifier in other.cells]
        cell.best = {key for key, rank in cell.ranks.items() if all(rank >= r.get(key, rank) for r in rivals)}


def verdict(rows: Sequence[Row]) -> list[str]:
    """For each method, budget and classifier one sentence: which row is best, by how much, and how sure that is."""
    sentences = []
    for model, budget in dict.fromkeys(row.group for row in rows):
        group = [row for row in rows if row.group == (model, budget) and row.is_comparable]
        where = f"{model} at {budget:,} bytes per class" if budget else model
        for classifier in dict.fromkeys(c for row in group for c in row.cells):
            ranked = [row.cells[classifier] for row in group if classifier in row.cells]
            ranked.sort(key=lambda cell: -cell.entry.average.mean)
            if len(ranked) > 1:
                word = "nearest means of exemplars" if classifier == "nme" else WORDS[classifier]
                sentences.append(f"{where}, by the {word}: {_sentence(ranked[0], ranked[1])}")
    return sentences


def _sentence(best: Cell, second: Cell) -> str:
    parts = [f"{best.entry.line} is best with {best.entry.average.mean:.1f} %"]
    if best.to_codec and not second.entry.is_codec:
        parts.append(f"{best.to_codec} over the best codec")
    if best.to_real and best.entry.form != REAL:
        parts.append(f"{best.to_real} over real exemplars")
    if lead := paired(best.entry.scores, second.entry.scores):
        line = second.entry.line
        if lead.error is None:
            parts.append(f"{lead} over the next, {line}; one class order, so no standard error")
        elif lead.mean < 2 * lead.error:
            parts.append(f"not told apart from {line} ({lead}, n = {lead.n})")
        else:
            parts.append(f"{lead} over the next, {line} (n = {lead.n})")
    return "; ".join(parts) + "."


def as_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table as text, the best of a column in Markdown's asterisks."""

    def figure(cell: Cell, key: str) -> str:
        text = mean_std(getattr(cell.entry, key))
        return f"**{text}**" if key in cell.best else text

    used = [c for c in WORDS if any(c in row.cells for row in rows)]
    differences = [title for c in used for title in (WORDS[c], f"{WORDS[c]} - real", f"{WORDS[c]} - codec")]
    header = ["method", "form", "p", "budget", "bytes", *differences, "last phase", "forgetting", "n"]
    lines = []
    for row in rows:
        entry = row.entry
        budget = f"{entry.budget:,}" if entry.budget else "-"
        label = f"{entry.label} (unfinished)" if entry.results.unfinished else entry.label
        kept = f"{entry.bytes_per_class:,.0f}{'*' if row.unequal else ''}"
        line = [entry.model, label, f"{entry.probability:g}", budget, kept]
        for classifier in used:
            cell = row.cells.get(classifier)
            line += [figure(cell, "average"), str(cell.to_real or ""), str(cell.to_codec or "")] if cell else ["-"] * 3
        first = row.cells[entry.classifier]
        lines.append([*line, figure(first, "last"), figure(first, "forgetting"), str(len(entry.orders))])
    return header, lines


def show(runs: Runs, file: TextIO | None = None) -> None:
    """Print a table of several runs to `file` (default: stdout).

    For each: top-1 accuracy after each phase and their average in %, forgetting (PyCIL's and backward transfer where
    they say something else), memory in units and bytes, seconds (with phase 0's training also where a network was
    reused); mean ± standard deviation, and a line that says so, where there are several seeds.
    """
    compared = entries(runs)
    averages, summaries = [entry.averages for entry in compared], [entry.results.summary for entry in compared]
    # No spaces within a phase's accuracy, so that a long curve is folded between phases.
    curves = [" ".join(mean_std(value).replace(" ", "") for value in entry.top1) for entry in compared]
    columns = {"": [entry.title for entry in compared], "top-1 after each phase": curves}
    columns["average"] = [mean_std(entry.average) for entry in compared]
    columns["forgetting"] = [mean_std(entry.forgetting) for entry in compared]
    if any(_differ(a.forgetting, a.forgetting_in_tens, 1) for a in averages):
        columns["forgetting (PyCIL)"] = [mean_std(a.forgetting_in_tens) for a in averages]
    if any(_differ(a.forgetting, a.backward_transfer, -1) for a in averages):
        columns["transfer"] = [mean_std(a.backward_transfer) for a in averages]
    columns["units"] = [mean_std(summary.units) for summary in summaries]
    columns["bytes"] = [mean_std(summary.bytes, 0) for summary in summaries]
    columns["seconds"] = [mean_std(summary.seconds, 0) for summary in summaries]
    several = any(len(entry.orders) > 1 for entry in compared)
    below = ["mean ± standard deviation over class orders"] if several else []
    cli.show_table(list(columns), list(zip(*columns.values(), strict=True)), below, file=file)


def _differ(forgetting: Spread | None, other: Spread | None, sign: int) -> bool:
    """Whether another measure, times `sign`, says something else than the forgetting."""
    return forgetting is not None and other is not None and abs(forgetting.mean - sign * other.mean) > 0.05


def notes(rows: Sequence[Row]) -> list[str]:
    """What stands below the table."""
    unequal = dict.fromkeys(f"{row.entry.line} {row.unequal}" for row in rows if row.unequal)
    legend = (
        f"{LEGEND} - real, - codec: minus real exemplars, minus the best codec, at the same budget. Bold: the best."
    )
    return [legend, *([f"*: {'; '.join(unequal)}."] if unequal else [])]


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, with its legend below it."""
    return "\n\n".join([markdown(*as_cells(rows)), *notes(rows)])
