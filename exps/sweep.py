"""The file of an equal-bytes sweep, and the runs of main.py that it asks for."""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exps.points import Point, checked_keys, finished
from utils import cli
from utils.config.read import read_json
from utils.data.paths import data_dir, find_dataset
from utils.errors import UserError

REAL = "real"
PROBABILITY = 0.4
"""augmentation_prob of all forms but real exemplars, where the file names none: the paper's."""
OF_A_ROW = (
    *("augmentation_prob", "real_per_class", "syn_per_class", "augmentations_per_image", "exemplar_selection"),
    "copies_of",
)
"""Keys that a row of `forms` may have beside form and name."""
SETS = (
    *("budget_in", "memory_bytes_per_class", "memory_per_class", "memory_size", "fixed_memory", "model_name", "seed"),
    *("syn_form", "augmentation_prob", "regenerate", "regenerate_options", "output_dir", "phase0_cache"),
    *("real_per_class", "syn_per_class", "val_per_class"),
)
"""Keys that the sweep sets itself, so that all runs of a budget have the same number of bytes."""
KNOWN = {
    *("config", "forms", "budgets", "methods", "seeds", "real_per_class", "augmentation_prob", "settings", "copies"),
    *("tune", "val_per_class", "tune_seeds", "tune_by", "expected"),
}
"""Keys of a sweep's file.  expected: `exps.demo.check_accuracies`."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to spend a budget: a form with its keys of main.py.  label: what it is called, without p."""

    label: str
    form: str
    keys: Mapping[str, Any]

    @property
    def probability(self) -> float:
        return self.keys["augmentation_prob"]

    def __str__(self) -> str:
        return f"{self.label}, p = {self.probability:g}" if self.probability else self.label


@dataclass(frozen=True)
class Row:
    """A row of the table: one candidate, or several of which one is chosen on validation pictures."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, checked."""

    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: str
    copies: str
    output: Path
    val_per_class: int = 0
    tune_seeds: tuple[int, ...] = ()
    tune_by: str = "cnn"

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for row in self.rows for candidate in row.candidates]

    @property
    def kept(self) -> list[str]:
        """The forms but real exemplars, those of which real exemplars have copies included."""
        names = [candidate.keys["syn_form"] for candidate in self.candidates]
        return [form for form in dict.fromkeys(names) if form != REAL]

    @property
    def nb_copies(self) -> int:
        return self.config.get("augmentations_per_image", 5)


def read(
    file: Path,
    output: Path | None,
    seeds: Sequence[int] = (),
    budgets: Sequence[int] = (),
    forms: Sequence[str] = (),
    methods: Sequence[str] = (),
) -> Sweep:
    """The sweep of a file.

    seeds, budgets, methods: in place of the file's; forms: the names of those of its rows that are taken; empty: all.
    Raises UserError, naming the key, for a file that is no sweep's.
    """
    content = read_json(file)
    content |= {"seeds": list(seeds)} if seeds else {}
    content |= {"budgets": list(budgets)} if budgets else {}
    content |= {"methods": list(methods)} if methods else {}
    if unknown := sorted(content.keys() - KNOWN):
        raise UserError(f"{file}: unknown key {unknown[0]!r}; a sweep has {', '.join(sorted(KNOWN))}.")
    config = _config(file, content.get("config"))
    _check_lists(file, content)
    tune = content.get("tune", False)
    rows = [row for form in content["forms"] for row in _rows(file, form, content, tune)]
    if twice := [name for name in {row.name for row in rows} if sum(row.name == name for row in rows) > 1]:
        raise UserError(f"{file}: two rows are called {twice[0]!r}. Give one of them another name.")
    names = {row.name: {c.form for c in row.candidates} | {row.name} for row in rows}
    if unknown := [form for form in forms if not any(form in of_row for of_row in names.values())]:
        known_forms = dict.fromkeys(candidate.form for row in rows for candidate in row.candidates)
        raise UserError(f"{file}: no form {unknown[0]!r}; it has {', '.join(known_forms)}.")
    rows = [row for row in rows if not forms or names[row.name] & set(forms)]
    sweep = Sweep(
        config,
        tuple(rows),
        tuple(sorted(set(content["budgets"]))),
        tuple(dict.fromkeys(content["methods"])),
        tuple(dict.fromkeys(content["seeds"])),
        content.get("settings", ""),
        content.get("copies", "on_demand"),
        output or Path("outputs") / file.stem,
    )
    if not tune:
        return sweep
    number, by = content.get("val_per_class"), content.get("tune_by", "cnn")
    if type(number) is not int or number < 1:
        raise UserError(f"{file}: tune needs val_per_class: train images of each class that are held out to choose.")
    if by not in ("cnn", "nme"):
        raise UserError(f'{file}: tune_by is "cnn" (the head) or "nme" (nearest means), not {by!r}.')
    seeds = tuple(content.get("tune_seeds", sweep.seeds[:1]))
    return replace(sweep, val_per_class=number, tune_seeds=seeds, tune_by=by)


def _config(file: Path, config: Any) -> dict[str, Any]:
    """The keys that all runs share.  Raises UserError."""
    in_file = config
    if isinstance(config, str):
        path = cli.path(config)
        config = read_json(path if path.is_file() else file.parent / path)
    if not isinstance(config, dict) or "dataset" not in config:
        raise UserError(f"{file}: config must be an object of main.py's keys, or the path of a config.")
    if isinstance(in_file, dict) and (own := [key for key in SETS if key in config]):
        raise UserError(f"{file}: the sweep sets {own[0]} itself, for all forms alike. Take it out of config.")
    kept = {key: value for key, value in config.items() if key not in SETS}
    return {**kept, "dataset": find_dataset(data_dir(kept.get("data_dir")), kept["dataset"])}


def _check_lists(file: Path, content: Mapping[str, Any]) -> None:
    for key, kind in (("budgets", int), ("seeds", int), ("methods", str), ("forms", (str, dict))):
        values = content.get(key)
        right = isinstance(values, list) and all(type(v) is not bool and isinstance(v, kind) for v in values)
        if not right or not values:
            raise UserError(f"{file}: {key} must be a list of {'numbers' if kind is int else 'names'}.")
    if any(budget < 1 for budget in content["budgets"]):
        raise UserError(f"{file}: budgets are numbers of bytes above 0.")
    if content.get("copies", "on_demand") not in ("ahead", "on_demand"):
        raise UserError(f'{file}: copies is "ahead" or "on_demand", not {content["copies"]!r}.')


def _rows(file: Path, row: str | dict, content: Mapping[str, Any], tune: bool) -> list[Row]:
    """The rows of an entry of `forms`: one for each combination of its lists, or, with tune, one of all of them."""
    keys_of_row = {"form": row} if isinstance(row, str) else dict(row)
    forms, name = _values(keys_of_row.pop("form", None)), keys_of_row.pop("name", None)
    if not forms or not all(isinstance(form, str) for form in forms):
        raise UserError(f"{file}: a form has no name; it has form, {', '.join(OF_A_ROW)}.")
    if unknown := sorted(keys_of_row.keys() - set(OF_A_ROW)):
        raise UserError(f"{file}: a form has unknown key {unknown[0]!r}; it has form, name, {', '.join(OF_A_ROW)}.")
    if "augmentation_prob" not in keys_of_row and forms != [REAL]:
        keys_of_row["augmentation_prob"] = content.get("augmentation_prob", PROBABILITY)
    lists = [[(key, value) for value in _values(values)] for key, values in keys_of_row.items()]
    combinations = [(form, dict(keys)) for form in forms for keys in itertools.product(*lists)]
    candidates = tuple(_candidate(file, form, keys, content.get("real_per_class", 1)) for form, keys in combinations)
    if tune and len(candidates) > 1:
        return [Row(name or forms[0].partition(":")[0].partition("@")[0], candidates)]
    if name and len(candidates) == 1:
        return [Row(name, (replace(candidates[0], label=name),))]
    return [Row(str(candidate), (candidate,)) for candidate in candidates]


def _values(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _candidate(file: Path, form: str, own: Mapping[str, Any], real: int | None) -> Candidate:
    keys = {"augmentation_prob": 0, **own}
    p = keys["augmentation_prob"]
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"{file}: augmentation_prob is a probability, 0 to 1, or a list of them, not {p!r}.")
    words = [f"{key}={_shown(value)}" for key, value in own.items() if key not in ("augmentation_prob", "copies_of")]
    copies_of = keys.pop("copies_of", None)
    if form != REAL:
        keys = {"syn_form": form, "real_per_class": real, "syn_per_class": "fill", **keys}
        return Candidate(", ".join([form, *words]), form, keys)
    if p and not copies_of:
        raise UserError(f'{file}: real exemplars with augmentation_prob need "copies_of", the form of their copies.')
    label = ", ".join([REAL, *words, *([f"copies of {copies_of}"] if copies_of else [])])
    return Candidate(label, REAL, {"syn_form": copies_of or REAL, **keys, "real_per_class": None, "syn_per_class": 0})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def made_ahead(sweep: Sweep, candidate: Candidate, measures: Mapping[str, Any]) -> bool:
    """Whether the copies of all train images are made before the runs, so that these share them.

    They are where new pictures have copies too; a form without a model has them at once.
    """
    form = candidate.keys["syn_form"]
    if form == REAL:
        return False
    costs = measures["forms"][form]
    cheap = costs["deterministic"] and not costs.get("needs_model")
    return sweep.copies == "ahead" or candidate.probability > 0 or cheap


def _name(*parts: Any) -> str:
    """Of a folder."""
    text = "-".join(map(str, parts))
    return "".join(c if c.isalnum() or c in "@+=." else "-" for c in text).replace("--", "-")


class Plan:
    """All runs of a sweep.  measures: `exps.runs.measured`; forms that failed there have none.

    chosen: (row's name, method, budget) -> the candidate that the validation pictures chose, as far as they have.
    """

    def __init__(self, sweep: Sweep, measures: Mapping[str, Any]):
        self.sweep, self.measures = sweep, measures
        self.chosen: dict[tuple[str, str, int], Candidate] = {}
        self.points: dict[str, Point] = {}  # by name
        self.rows: dict[str, tuple[str, Candidate]] = {}  # name of a point that is tested -> row and candidate
        self.cells = list(itertools.product(sweep.methods, sweep.rows, sweep.budgets))

    def known(self, failed: Collection[str] = ()) -> tuple[list[Point], bool]:
        """The points that can be carried out by now, and whether more follow (`exps.grid.Points`)."""
        validated: list[Point] = []
        tested: list[Point] = []
        more = False
        for method, row, budget in self.cells:
            candidates = [c for c in row.candidates if "error" not in self.measures["forms"][c.keys["syn_form"]]]
            if len(candidates) > 1:
                points = {candidate: self._validation(method, row, candidate, budget) for candidate in candidates}
                validated += points.values()
                best = self._best({c: point for c, point in points.items() if point.name not in failed})
                if best is None:
                    more = more or any(point.name not in failed for point in points.values())
                    continue
                self.chosen[row.name, method, budget] = best
                candidates = [best]
            if candidates:
                tested.append(self._test(method, row, candidates[0], budget))
        return [*validated, *tested], more

    def tested(self) -> list[Point]:
        """The points whose test accuracies the table has, as far as they are known."""
        return [point for point in self.known()[0] if point.name in self.rows]

    def _best(self, points: Mapping[Candidate, Point]) -> Candidate | None:
        """The candidate with the best mean accuracy on validation pictures; None while one has not finished."""
        scores = {}
        for candidate, point in points.items():
            if (results := finished(point)) is None:
                return None
            classifiers = results.summary.classifiers
            averages = classifiers["nme" if self.sweep.tune_by == "nme" and "nme" in classifiers else "cnn"]
            scores[candidate] = averages.average_incremental_accuracy.mean
        return max(scores, key=lambda candidate: scores[candidate], default=None)

    def _validation(self, method: str, row: Row, candidate: Candidate, budget: int) -> Point:
        name = f"{method}, {candidate}, {budget:,} bytes, validation"
        folder = self.sweep.output / "validation" / self._folder(method, candidate, budget)
        keys = {"val_per_class": self.sweep.val_per_class, "seed": list(self.sweep.tune_seeds)}
        return self._point(name, folder, method, candidate, budget, keys)

    def _test(self, method: str, row: Row, candidate: Candidate, budget: int) -> Point:
        named = str(candidate) if len(row.candidates) == 1 else f"{row.name} ({candidate})"
        name = f"{method}, {named}, {budget:,} bytes"
        folder = self.sweep.output / "runs" / self._folder(method, candidate, budget)
        self.rows[name] = row.name, candidate
        return self._point(name, folder, method, candidate, budget, {"seed": list(self.sweep.seeds)})

    def _folder(self, method: str, candidate: Candidate, budget: int) -> str:
        p = [f"p{candidate.probability:g}"] if candidate.probability else []
        return _name(method, candidate.label, *p, budget)

    def _point(self, name: str, folder: Path, method: str, candidate: Candidate, budget: int, more: Mapping) -> Point:
        if name not in self.points:
            keys = {**self.keys(method, candidate, budget), **more}
            phase0 = (method, more.get("val_per_class", 0))
            if candidate.probability:
                phase0 += tuple(keys.get(key) for key in ("syn_form", "augmentation_prob", "augmentations_per_image"))
            # In the file, so that main.py with it and another seed takes part in the sweep.
            keys |= {"output_dir": str(folder), "phase0_cache": str(self.sweep.output / "phase0_cache")}
            arguments = ("--config", str(folder / "point.json"))
            self.points[name] = Point(name, folder, checked_keys(keys), arguments, phase0, keys)
        return self.points[name]

    def keys(self, method: str, candidate: Candidate, budget: int) -> dict[str, Any]:
        """main.py's keys of a run."""
        sweep, keys = self.sweep, dict(candidate.keys)
        if keys["syn_form"] == REAL:
            del keys["syn_form"]
        elif not made_ahead(sweep, candidate, self.measures):
            keys |= {"regenerate": "on_demand", "regenerate_options": sweep.settings}
        common = {"budget_in": "bytes", "memory_bytes_per_class": budget, "fixed_memory": True, "model_name": method}
        return {**sweep.config, **keys, **common}


def check(sweep: Sweep) -> None:
    """Raises UserError, with all that main.py says, for keys that it refuses with any of the methods."""
    for method in sweep.methods:
        keys = {"model_name": method, "seed": list(sweep.seeds), "budget_in": "bytes", "fixed_memory": True}
        try:
            checked_keys({**sweep.config, **keys, "memory_bytes_per_class": sweep.budgets[0], "real_per_class": None})
        except UserError as error:
            raise UserError(f"config: {error}") from None
