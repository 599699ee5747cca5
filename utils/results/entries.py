"""Runs as the page compares them: an entry for each run and classifier, and the statistics between entries."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.results.show import CLASSIFIERS

REAL = "real"
_WHERE = ("output_dir", "phase0_cache", "prefix", "data_dir", "cache", "cache_gib", "num_workers")
"""Keys of a config that change no number."""
CODECS = ("jpeg", "webp", "avif", "jxl")
"""Heads of the names of forms that are pictures of a codec."""


@dataclass(frozen=True)
class Entry:
    """One classifier of one run.

    name: the run's; folder: where its results.json lies; content: of that file; classifier: a key of CLASSIFIERS;
    model: the method, with whatever else distinguishes it from the other entries of the page; method: the same with the
    classifier, where the run has several; label: what tables call the form of the run's exemplars.
    """

    name: str
    folder: Path
    content: Mapping[str, Any]
    classifier: str
    model: str
    method: str
    label: str

    @property
    def config(self) -> Mapping[str, Any]:
        return self.content["config"]

    @property
    def form(self) -> str:
        """The form of the exemplars that do not stay as they are; "real" where there are none."""
        return self.config.get("syn_form", "edges") if self.config.get("syn_per_class") else REAL

    @property
    def is_codec(self) -> bool:
        return self.form.partition(":")[0].partition("@")[0] in CODECS

    @property
    def probability(self) -> float:
        """p: with which real pictures are replaced by copies in training."""
        return self.config.get("augmentation_prob") or 0.0

    @property
    def line(self) -> str:
        """The form with p, as legends name it."""
        return f"{self.label}, p = {self.probability:g}" if self.probability else self.label

    @cached_property
    def runs(self) -> list[Mapping[str, Any]]:
        """The class orders that the summary covers."""
        return [run for run in self.content["runs"] if run["seed"] in self.content["summary"]["seeds"]]

    @property
    def summary(self) -> Mapping[str, Any]:
        return self.content["summary"][self.classifier]

    @property
    def scores(self) -> dict[int, float]:
        """Average incremental accuracy by class order, in percent."""
        return {run["seed"]: run[self.classifier]["average_incremental_accuracy"] for run in self.runs}

    @property
    def bytes_per_class(self) -> float:
        """True bytes that are kept after the last phase, per class, averaged over classes and class orders."""
        return self.content["summary"]["bytes"]["mean"] / self.content["summary"]["classes_seen"][-1]

    @property
    def budget(self) -> int | None:
        """Bytes that a class may take; None for a budget in units."""
        return self.config.get("memory_bytes_per_class") if self.config.get("budget_in") == "bytes" else None

    @property
    def place(self) -> int:
        """Where the run stands on the axis of bytes per class: at its budget, or at what it kept."""
        return self.budget or round(self.bytes_per_class)


def entries(runs: Mapping[str, tuple[Path, Mapping]], labels: Mapping[str, str] | None = None) -> list[Entry]:
    """The entries of runs: name -> (output folder, content of results.json).

    labels: name -> what tables call the form; default: the form's name.
    """
    configs = [content["config"] for _, content in runs.values()]
    varied = [key for key in ("dataset", "convnet_type") if len({str(config.get(key)) for config in configs}) > 1]
    found = []
    for name, (folder, content) in runs.items():
        there = [classifier for classifier in CLASSIFIERS if content["summary"].get(classifier) is not None]
        method = " ".join(str(content["config"].get(key)) for key in ("model_name", *varied))
        for classifier in there:
            own = f"{method} ({CLASSIFIERS[classifier]})" if len(there) > 1 else method
            entry = Entry(name, folder, content, classifier, method, own, "")
            found.append(replace(entry, label=(labels or {}).get(name, entry.form)))
    return found


def lines(of: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """(method, form with p) -> its entries by bytes per class: the lines of accuracy against bytes.

    Two runs of the same method, form, p and bytes are told apart by their names.
    """
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(of, key=lambda entry: entry.place):
        alike = [e for e in of if (e.method, e.line, e.place) == (entry.method, entry.line, entry.place)]
        form = entry.line if len(alike) == 1 else f"{entry.line}: {entry.name}"
        found.setdefault((entry.method, form), []).append(entry)
    return found


class Paired(NamedTuple):
    """Differences of scores over the class orders that two entries share.

    differences: by seed; mean; error: standard error of the mean, None for fewer than two class orders.
    """

    differences: dict[int, float]
    mean: float
    error: float | None


def paired(scores: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """scores - reference for each seed that both have; None where they share none."""
    differences = {seed: scores[seed] - reference[seed] for seed in sorted(scores.keys() & reference.keys())}
    if not differences:
        return None
    values = np.array(list(differences.values()))
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Paired(differences, float(values.mean()), error)


def area(points: Sequence[tuple[float, float]]) -> float | None:
    """The area under accuracy over log bytes, divided by the range of log bytes: a mean accuracy over the budgets.

    points: (bytes, accuracy) in any order.  None for fewer than two different numbers of bytes.
    """
    places = sorted((math.log(size), score) for size, score in points if size > 0)
    if len({place for place, _ in places}) < 2:
        return None
    x, y = np.array(places).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def areas(line: Sequence[Entry], budgets: Sequence[float]) -> dict[int, float]:
    """Class order -> area under a line's curve over `budgets`; only class orders that have all of them."""
    at = {entry.place: entry.scores for entry in line}
    if len(budgets) < 2 or not set(budgets) <= at.keys():
        return {}
    seeds = set.intersection(*(set(at[budget]) for budget in budgets))
    return {seed: area([(budget, at[budget][seed]) for budget in budgets]) for seed in sorted(seeds)}


def reference_of(entry: Entry, of: Sequence[Entry]) -> Entry | None:
    """What an entry is compared with: real exemplars of its method at its budget, else the first run of its method."""
    same = [
        other for other in of if other.method == entry.method and other.config["dataset"] == entry.config["dataset"]
    ]
    if entry.budget is not None:
        same = [other for other in same if other.budget == entry.budget]
    of_real = sorted((other for other in same if other.form == REAL), key=lambda other: other.probability)
    reference = of_real[0] if of_real else same[0] if same else None
    return None if reference is entry else reference


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, a value a config) of the keys in which configs differ, without those that change no number."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    rows = [(key, [_shown(config.get(key)) for config in configs.values()]) for key in keys if key not in _WHERE]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
