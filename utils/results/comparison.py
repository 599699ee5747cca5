"""The table of a comparison: a row for each run, with its differences to others; and what can be concluded from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from utils.results.entries import REAL, Entry, Paired, paired, reference_of

CLASSIFIERS = {"cnn": "head", "nme": "nearest means", "student": "student", "svm": "SVM"}
"""Classifiers by their keys in results.json, in the words of the table."""
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


class Value(NamedTuple):
    """A figure over class orders: mean, standard deviation (None for one order), and whether it is the best."""

    mean: float
    std: float | None
    best: bool = False

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Cell:
    """A classifier's part of a row.  to_real, to_codec: differences to real exemplars and to the best codec."""

    average: Value
    last: Value
    forgetting: Value | None
    to_real: Paired | None = None
    to_codec: Paired | None = None


@dataclass(frozen=True)
class Row:
    """A run.  unequal: why its bytes are not those of the others, "" where they are."""

    entry: Entry
    cells: Mapping[str, Cell]
    unequal: str

    @property
    def n(self) -> int:
        return len(self.entry.runs)

    @property
    def group(self) -> tuple[str, int | None]:
        """Rows of one method and budget are compared with each other."""
        return self.entry.model, self.entry.budget

    @property
    def is_comparable(self) -> bool:
        """Whether the row may be the best: a form that leaves bytes of a budget unused has no advantage by that."""
        return not self.unequal or self.entry.budget is not None


def rows_of(compared: Sequence[Entry]) -> list[Row]:
    """A row for each run, by method and budget, the best by its first classifier first."""
    by_run: dict[str, list[Entry]] = {}
    for entry in compared:
        by_run.setdefault(entry.name, []).append(entry)
    rows = []
    for of_run in by_run.values():
        first = of_run[0]
        reference = reference_of(first, compared)
        cells = {entry.classifier: _cell(entry, compared) for entry in of_run}
        rows.append(Row(first, cells, _unequal(first, reference)))
    rows = [_with_best(row, rows) for row in rows]
    return sorted(rows, key=lambda row: (row.group[0], row.group[1] or 0, -next(iter(row.cells.values())).average.mean))


def _cell(entry: Entry, compared: Sequence[Entry]) -> Cell:
    orders = len(entry.runs)

    def value(of_summary: Mapping, at: int | None = None) -> Value:
        mean, std = (of_summary[key] if at is None else of_summary[key][at] for key in ("mean", "std"))
        return Value(mean, std if orders > 1 else None)

    summary, reference, codec = entry.summary, reference_of(entry, compared), _best_codec(entry, compared)
    return Cell(
        value(summary["average_incremental_accuracy"]),
        value(summary["top1"], -1),
        value(summary["forgetting"]) if summary["forgetting"] else None,
        paired(entry.scores, reference.scores) if reference and reference.form == REAL else None,
        paired(entry.scores, codec.scores) if codec and codec is not entry else None,
    )


def _best_codec(entry: Entry, compared: Sequence[Entry]) -> Entry | None:
    """The codec with the best average of the same method, classifier and budget."""
    same = [e for e in compared if e.is_codec and (e.method, e.budget) == (entry.method, entry.budget)]
    return max(same, key=lambda e: e.summary["average_incremental_accuracy"]["mean"], default=None)


def _unequal(entry: Entry, reference: Entry | None) -> str:
    if entry.budget is not None:
        used = entry.bytes_per_class
        return f"uses {used:,.0f} of {entry.budget:,} bytes" if used < FEW * entry.budget else ""
    if reference is None or abs(entry.bytes_per_class - reference.bytes_per_class) <= 0.05 * reference.bytes_per_class:
        return ""
    return f"not comparable: {reference.line} has {reference.bytes_per_class:,.0f} bytes"


def _with_best(row: Row, rows: Sequence[Row]) -> Row:
    """The row with its best figures marked: those that no comparable row of its group exceeds."""
    others = [other for other in rows if other.group == row.group and other.is_comparable]
    if len(others) < 2 or not row.is_comparable:
        return row
    cells = {}
    for classifier, cell in row.cells.items():
        rivals = [other.cells[classifier] for other in others if classifier in other.cells]
        lost = [rival.forgetting.mean for rival in rivals if rival.forgetting]
        cells[classifier] = Cell(
            cell.average._replace(best=cell.average.mean >= max(rival.average.mean for rival in rivals)),
            cell.last._replace(best=cell.last.mean >= max(rival.last.mean for rival in rivals)),
            cell.forgetting and cell.forgetting._replace(best=cell.forgetting.mean <= min(lost)),
            cell.to_real,
            cell.to_codec,
        )
    return Row(row.entry, cells, row.unequal)


def verdict(rows: Sequence[Row]) -> list[str]:
    """For each method, budget and classifier one sentence: which row is best, by how much, and how sure that is."""
    sentences = []
    for model, budget in dict.fromkeys(row.group for row in rows):
        group = [row for row in rows if row.group == (model, budget) and row.is_comparable]
        where = f"{model} at {budget:,} bytes per class" if budget else model
        for classifier in dict.fromkeys(c for row in group for c in row.cells):
            ranked = [row for row in group if classifier in row.cells]
            ranked.sort(key=lambda row: -row.cells[classifier].average.mean)
            if len(ranked) > 1:
                sentences.append(f"{where}, by the {_word(classifier)}: {_sentence(ranked, classifier)}")
    return sentences


def _word(classifier: str) -> str:
    return {"nme": "nearest means of exemplars"}.get(classifier, CLASSIFIERS[classifier])


def _sentence(ranked: Sequence[Row], classifier: str) -> str:
    best, second = ranked[0], ranked[1]
    cell = best.cells[classifier]
    said = [f"{best.entry.line} is best with {cell.average.mean:.1f} %"]
    for pair, what in ((cell.to_codec, "the best codec"), (cell.to_real, "real exemplars")):
        if pair is not None and not (what == "real exemplars" and best.entry.form == REAL):
            said.append(f"{difference(pair)} over {what}")
    pair = paired(_scores(best, classifier), _scores(second, classifier))
    if pair is not None:
        if pair.error is None:
            said.append(f"{pair.mean:+.1f} over the next, {second.entry.line}; one class order, so no standard error")
        elif pair.mean < 2 * pair.error:
            said.append(f"not told apart from {second.entry.line} ({difference(pair)}, n = {len(pair.differences)})")
        else:
            said.append(f"{difference(pair)} over the next, {second.entry.line} (n = {len(pair.differences)})")
    return "; ".join(said) + "."


def _scores(row: Row, classifier: str) -> dict[int, float]:
    return {run["seed"]: run[classifier]["average_incremental_accuracy"] for run in row.entry.runs}


def difference(pair: Paired | None) -> str:
    """Such as "+4.3 (0.8)"."""
    if pair is None:
        return ""
    return f"{pair.mean:+.1f}" if pair.error is None else f"{pair.mean:+.1f} ({pair.error:.1f})"


def markdown(rows: Sequence[Row]) -> str:
    """The table, with its legend below it."""
    used = [c for c in CLASSIFIERS if any(c in row.cells for row in rows)]
    header = ["method", "form", "p", "budget", "bytes"]
    for classifier in used:
        header += [CLASSIFIERS[classifier], "- real", "- codec"]
    lines = [[*header, "last phase", "forgetting", "n"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        entry, first = row.entry, next(iter(row.cells.values()))
        budget = f"{entry.budget:,}" if entry.budget else "-"
        unfinished = " (unfinished)" if entry.content.get("unfinished") else ""
        line = [entry.model, entry.label + unfinished, f"{entry.probability:g}", budget]
        line.append(f"{entry.bytes_per_class:,.0f}{'*' if row.unequal else ''}")
        for classifier in used:
            cell = row.cells.get(classifier)
            line += [_bold(cell.average), difference(cell.to_real), difference(cell.to_codec)] if cell else ["-"] * 3
        lines.append([*line, _bold(first.last), _bold(first.forgetting), str(row.n)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = [
        LEGEND + " - real, - codec: minus real exemplars, minus the best codec, at the same budget. Bold: the best."
    ]
    unequal = [f"{row.entry.line} {row.unequal}" for row in rows if row.unequal]
    notes += [f"*: {'; '.join(dict.fromkeys(unequal))}."] if unequal else []
    return "\n\n".join([text, *notes])


def _bold(value: Value | None) -> str:
    return "-" if value is None else f"**{value}**" if value.best else str(value)
