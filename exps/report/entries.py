"""Runs as they are compared: an entry for each run and classifier, and what follows from several entries."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.results.records import CLASSIFIERS, Averages, Classifier, ClassOrder, Results, Spread

REAL = "real"
CODECS = ("jpeg", "webp", "avif", "jxl")
"""Heads of the names of forms that are pictures of a codec."""
NEUTRAL = ("output_dir", "phase0_cache", "prefix", "data_dir", "cache", "cache_gib", "num_workers")
"""Keys of a config that change no number."""

Runs = Mapping[str, tuple[Path, Results]]
"""Name -> output folder and results."""


def form_of(config: Mapping[str, Any]) -> str:
    """The form of the exemplars that do not stay as they are; "real" where there are none."""
    return config.get("syn_form", "edges") if config.get("syn_per_class") else REAL


@dataclass(frozen=True)
class Entry:
    """One classifier of one run.

    name: the run's; folder: where its results.json lies; model: the method, with whatever else distinguishes it from
    the other entries; method: the same with the classifier, where the run has several; label: what tables call the form
    of the run's exemplars.
    """

    name: str
    folder: Path
    results: Results
    classifier: Classifier
    model: str
    method: str
    label: str

    @property
    def config(self) -> Mapping[str, Any]:
        return self.results.config

    @property
    def title(self) -> str:
        """The run's name, with the classifier where it has several."""
        phases = self.results.unfinished
        name = f"{self.name}, unfinished: {phases} phase{'s' if phases > 1 else ''}" if phases else self.name
        return name if self.method == self.model else f"{name} ({CLASSIFIERS[self.classifier]})"

    @property
    def form(self) -> str:
        return form_of(self.config)

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

    def line_among(self, others: Iterable["Entry"]) -> str:
        """The same, with the run's name where another one of the same method and form is among the others."""
        alike = [other for other in others if (other.method, other.line) == (self.method, self.line)]
        return self.line if len(alike) == 1 else f"{self.line}: {self.name}"

    @property
    def orders(self) -> list[ClassOrder]:
        """The class orders that the summary covers."""
        return self.results.orders

    @property
    def averages(self) -> Averages:
        return self.results.summary.classifiers[self.classifier]

    @property
    def average(self) -> Spread:
        """Average incremental accuracy, in percent."""
        return self.averages.average_incremental_accuracy

    @property
    def top1(self) -> list[Spread]:
        """Top-1 accuracy by phase, in percent."""
        top1 = self.averages.top1
        return [Spread(mean=mean, std=std) for mean, std in zip(top1.mean, top1.std, strict=True)]

    @property
    def last(self) -> Spread:
        return self.top1[-1]

    @property
    def forgetting(self) -> Spread | None:
        return self.averages.forgetting

    @property
    def scores(self) -> dict[int, float]:
        """Average incremental accuracy by class order, in percent."""
        return {order.seed: getattr(order, self.classifier).average_incremental_accuracy for order in self.orders}

    @property
    def bytes_per_class(self) -> float:
        """True bytes that are kept after the last phase, per class, averaged over classes and class orders."""
        return self.results.summary.bytes.mean / self.results.summary.classes_seen[-1]

    @property
    def budget(self) -> int | None:
        """Bytes that a class may take; None for a budget in units."""
        return self.config.get("memory_bytes_per_class") if self.config.get("budget_in") == "bytes" else None

    @property
    def size(self) -> int:
        """Where the run stands on the axis of bytes per class: at its budget, or at what it kept."""
        return self.budget or round(self.bytes_per_class)


def entries(runs: Runs, labels: Mapping[str, str] | None = None) -> list[Entry]:
    """labels: name -> what tables call the form; default: the form's name."""
    configs = [results.config for _, results in runs.values()]
    varied = [key for key in ("dataset", "convnet_type") if len({str(config.get(key)) for config in configs}) > 1]
    listed = []
    for name, (folder, results) in runs.items():
        config, classifiers = results.config, results.summary.classifiers
        model = " ".join(str(config.get(key)) for key in ("model_name", *varied))
        label = (labels or {}).get(name, form_of(config))
        for classifier in classifiers:
            method = f"{model} ({CLASSIFIERS[classifier]})" if len(classifiers) > 1 else model
            listed.append(Entry(name, folder, results, classifier, model, method, label))
    return listed


def lines(compared: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """(method, form with p) -> its entries by bytes per class: the lines of accuracy against bytes.

    Two runs of the same method, form, p and bytes are told apart by their names.
    """
    by_line: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(compared, key=lambda entry: entry.size):
        form = entry.line_among(e for e in compared if e.size == entry.size)
        by_line.setdefault((entry.method, form), []).append(entry)
    return by_line


def area(points: Sequence[tuple[float, float]]) -> float | None:
    """The area under accuracy over log bytes, divided by the range of log bytes: a mean accuracy over the budgets.

    points: (bytes, accuracy) in any order.  None for fewer than two different numbers of bytes.
    """
    sizes = sorted((math.log(size), score) for size, score in points if size > 0)
    if len({size for size, _ in sizes}) < 2:
        return None
    x, y = np.array(sizes).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def areas(line: Sequence[Entry], budgets: Sequence[int]) -> dict[int, float]:
    """Class order -> area under a line's curve over `budgets`; only class orders that have all of them."""
    scores = {entry.size: entry.scores for entry in line}
    if len(budgets) < 2 or not set(budgets) <= scores.keys():
        return {}
    seeds = set.intersection(*(set(scores[budget]) for budget in budgets))
    by_seed = {seed: area([(budget, scores[budget][seed]) for budget in budgets]) for seed in sorted(seeds)}
    return {seed: value for seed, value in by_seed.items() if value is not None}


def reference_of(entry: Entry, compared: Sequence[Entry]) -> Entry | None:
    """What an entry is compared with: real exemplars of its method at its budget, else the first run of its method."""
    finished = [e for e in compared if not e.results.unfinished]
    same = [e for e in finished if e.method == entry.method and e.config["dataset"] == entry.config["dataset"]]
    if entry.budget is not None:
        same = [other for other in same if other.budget == entry.budget]
    real = [other for other in same if other.form == REAL]
    reference = min(real, key=lambda other: other.probability) if real else next(iter(same), None)
    return None if reference is entry else reference


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """(key, name of config -> value) of the keys in which configs differ, without those that change no number."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NEUTRAL)
    rows = [(key, {name: in_words(config.get(key)) for name, config in configs.items()}) for key in keys]
    return [(key, values) for key, values in rows if len(set(values.values())) > 1]


def in_words(value: Any) -> str:
    """A setting's value in a table."""
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
