"""The file of an equal-bytes sweep, and the runs of main.py that it asks for."""

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from exps.grid import Point, checked_keys, finished
from exps.runs import MEASURE, as_overrides, call, last_words
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


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to spend a budget.

    label: what it is called, without p; form: as the file names it; keys: of main.py, where real exemplars have the
    form of their copies, if any, as syn_form.
    """

    label: str
    form: str
    keys: Mapping[str, Any]

    @property
    def syn_form(self) -> str:
        return self.keys["syn_form"]

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

    @property
    def names(self) -> set[str]:
        """What selects it: its name, or one of its forms."""
        return {self.name, *(candidate.form for candidate in self.candidates)}


class Sweep(BaseModel):
    """A sweep's file, checked: `exps.pareto` says what its keys are; expected: `exps.demo.check_accuracies`.

    rows: of `forms`; output: the sweep's folder.
    """

    model_config = ConfigDict(strict=True)
    config: dict[str, Any]
    forms: Annotated[list[str | dict[str, Any]], MinLen(1)]
    budgets: Annotated[list[PositiveInt], MinLen(1)]
    methods: Annotated[list[str], MinLen(1)]
    seeds: Annotated[list[int], MinLen(1)]
    real_per_class: int | None = 1
    augmentation_prob: Any = PROBABILITY
    settings: str = ""
    copies: Literal["ahead", "on_demand"] = "on_demand"
    tune: bool = False
    val_per_class: NonNegativeInt = 0
    tune_seeds: list[int] = []
    tune_by: Literal["cnn", "nme"] = "cnn"
    expected: dict[str, Any] = {}
    rows: list[Row] = []
    output: Path

    @property
    def candidates(self) -> list[Candidate]:
        return [candidate for row in self.rows for candidate in row.candidates]

    @property
    def kept(self) -> list[str]:
        """The forms but real exemplars, those of which real exemplars have copies included."""
        return [form for form in dict.fromkeys(c.syn_form for c in self.candidates) if form != REAL]


def read(file: Path, output: Path | None, *, forms: Sequence[str] = (), **lists: Sequence) -> Sweep:
    """The sweep of a file.

    forms: the names of those of its rows that are taken, empty for all; lists: seeds, budgets and methods in place of
    the file's, where they are not empty.
    Raises UserError, naming the key, for a file that is no sweep's.
    """
    content = read_json(file) | {key: list(values) for key, values in lists.items() if values}
    keys = Sweep.model_fields.keys() - {"rows", "output"}
    if unknown := sorted(content.keys() - keys):
        raise UserError(f"{file}: unknown key {unknown[0]!r}; a sweep has {', '.join(sorted(keys))}.")
    content["config"] = _config(file, content.get("config"))
    try:
        sweep = Sweep(**content, output=output or Path("outputs") / file.stem)
    except ValidationError as error:
        fault = error.errors()[0]
        words = fault["msg"].replace("Input should be", "must be")
        raise UserError(f"{file}: {'.'.join(map(str, fault['loc'][:2]))}: {words}.") from None
    if sweep.tune and not sweep.val_per_class:
        raise UserError(f"{file}: tune needs val_per_class: train images of each class that are held out to choose.")
    rows = [row for form in sweep.forms for row in _rows(file, form, sweep)]
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{file}: two rows are called {twice[0]!r}. Give one of them another name.")
    if unknown := sorted(set(forms).difference(*(row.names for row in rows))):
        known_forms = dict.fromkeys(candidate.form for row in rows for candidate in row.candidates)
        raise UserError(f"{file}: no form {unknown[0]!r}; it has {', '.join(known_forms)}.")
    sweep.rows = [row for row in rows if not forms or row.names & set(forms)]
    sweep.budgets = sorted(set(sweep.budgets))
    sweep.methods, sweep.seeds = list(dict.fromkeys(sweep.methods)), list(dict.fromkeys(sweep.seeds))
    sweep.tune_seeds = sweep.tune_seeds or sweep.seeds[:1]
    return sweep


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
    shared = {key: value for key, value in config.items() if key not in SETS}
    return {**shared, "dataset": find_dataset(data_dir(shared.get("data_dir")), shared["dataset"])}


def _rows(file: Path, row: str | dict[str, Any], sweep: Sweep) -> list[Row]:
    """The rows of an entry of `forms`: one for each combination of its lists, or, with tune, one of all of them."""
    keys = {"form": row} if isinstance(row, str) else dict(row)
    forms, name = _values(keys.pop("form", None)), keys.pop("name", None)
    if not forms or not all(isinstance(form, str) for form in forms):
        raise UserError(f"{file}: a form has no name; it has form, {', '.join(OF_A_ROW)}.")
    if unknown := sorted(keys.keys() - set(OF_A_ROW)):
        raise UserError(f"{file}: a form has unknown key {unknown[0]!r}; it has form, name, {', '.join(OF_A_ROW)}.")
    if "augmentation_prob" not in keys and forms != [REAL]:
        keys["augmentation_prob"] = sweep.augmentation_prob
    combinations = itertools.product(forms, *map(_values, keys.values()))
    candidates = tuple(
        _candidate(file, form, dict(zip(keys, values, strict=True)), sweep.real_per_class)
        for form, *values in combinations
    )
    if sweep.tune and len(candidates) > 1:
        return [Row(name or forms[0].partition(":")[0].partition("@")[0], candidates)]
    if name and len(candidates) == 1:
        return [Row(name, (replace(candidates[0], label=name),))]
    return [Row(str(candidate), (candidate,)) for candidate in candidates]


def _values(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _candidate(file: Path, form: str, own: Mapping[str, Any], real: int | None) -> Candidate:
    """own: keys of the row; real: real_per_class where it has none."""
    keys = {"augmentation_prob": 0, **own}
    p = keys["augmentation_prob"]
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"{file}: augmentation_prob is a probability, 0 to 1, or a list of them, not {p!r}.")
    words = as_overrides({key: v for key, v in own.items() if key not in ("augmentation_prob", "copies_of")})
    copies_of = keys.pop("copies_of", None)
    if form != REAL:
        keys = {"syn_form": form, "real_per_class": real, "syn_per_class": "fill", **keys}
        return Candidate(", ".join([form, *words]), form, keys)
    if p and not copies_of:
        raise UserError(f'{file}: real exemplars with augmentation_prob need "copies_of", the form of their copies.')
    label = ", ".join([REAL, *words, *([f"copies of {copies_of}"] if copies_of else [])])
    return Candidate(label, REAL, {"syn_form": copies_of or REAL, **keys, "real_per_class": None, "syn_per_class": 0})


def check(sweep: Sweep) -> None:
    """Raises UserError, with all that main.py says, for keys that it refuses with any of the methods."""
    for method in sweep.methods:
        keys = {"model_name": method, "seed": list(sweep.seeds), "budget_in": "bytes", "fixed_memory": True}
        try:
            checked_keys({**sweep.config, **keys, "memory_bytes_per_class": sweep.budgets[0], "real_per_class": None})
        except UserError as error:
            raise UserError(f"config: {error}") from None


def measure(sweep: Sweep, *more: str) -> dict[str, Any]:
    """What `compress.measure` says of a sweep's forms.  more: of its options.  Raises UserError."""
    words = ["--dataset", sweep.config["dataset"], "--forms", ",".join([REAL, *sweep.kept])]
    if sweep.config.get("data_dir"):
        words += ["--data-dir", sweep.config["data_dir"]]
    done = call(MEASURE, *words, f"--settings={sweep.settings}", *more)
    if done.returncode:
        raise UserError(last_words(done))
    return json.loads(done.stdout.splitlines()[-1])


class Plan:
    """All runs of a sweep.

    measures: of `measure`; failed_forms: form -> what went wrong there; candidates: of the other forms; chosen: (row's
    name, method, budget) -> the candidate that the validation pictures chose, as far as they have; labels: name of a
    point that is tested -> what the table calls its form.
    """

    def __init__(self, sweep: Sweep, measures: Mapping[str, Any]):
        self.sweep, self.measures = sweep, measures
        forms = measures["forms"]
        self.failed_forms = {form: costs["error"] for form, costs in forms.items() if "error" in costs}
        self.candidates = [c for c in sweep.candidates if c.syn_form not in self.failed_forms]
        self.chosen: dict[tuple[str, str, int], Candidate] = {}
        self.labels: dict[str, str] = {}
        self._points: dict[str, Point] = {}  # by name

    def costs(self, candidate: Candidate) -> Mapping[str, Any]:
        """What was measured of a candidate's form."""
        return self.measures["forms"][candidate.syn_form]

    def nb_copies(self, candidate: Candidate) -> int:
        """Copies of an image, where they are not all equal."""
        return candidate.keys.get("augmentations_per_image", self.sweep.config.get("augmentations_per_image", 5))

    def is_made_ahead(self, candidate: Candidate) -> bool:
        """Whether the copies of all train images are made before the runs, so that these share them.

        They are where new pictures have copies too; a form without a model has them at once.
        """
        costs = self.costs(candidate)
        cheap = costs["deterministic"] and not costs.get("needs_model")
        return candidate.syn_form != REAL and (self.sweep.copies == "ahead" or candidate.probability > 0 or cheap)

    def known(self, failed: Collection[str] = ()) -> tuple[list[Point], bool]:
        """The points that can be carried out by now, and whether more follow (`exps.grid.Points`)."""
        sweep = self.sweep
        validated: list[Point] = []
        tested: list[Point] = []
        more = False
        for method, row, budget in itertools.product(sweep.methods, sweep.rows, sweep.budgets):
            candidates = [candidate for candidate in row.candidates if candidate in self.candidates]
            if len(candidates) > 1:
                points = {candidate: self._point(method, candidate, budget, None) for candidate in candidates}
                validated += points.values()
                left = {candidate: point for candidate, point in points.items() if point.name not in failed}
                best = self._best(left)
                if best is None:
                    more = more or bool(left)
                    continue
                self.chosen[row.name, method, budget] = best
                candidates = [best]
            if candidates:
                tested.append(self._point(method, candidates[0], budget, row))
        return [*validated, *tested], more

    def tested(self) -> list[Point]:
        """The points whose test accuracies the table has, as far as they are known."""
        return [point for point in self.known()[0] if point.name in self.labels]

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

    def _point(self, method: str, candidate: Candidate, budget: int, row: Row | None) -> Point:
        """A run on test pictures, for a row of the table, or, with None, on validation pictures."""
        sweep, keys, label, p = self.sweep, dict(candidate.keys), str(candidate), candidate.probability
        if row and len(row.candidates) > 1:
            label = f"{row.name} ({candidate})"
        name = f"{method}, {label}, {budget:,} bytes" + ("" if row else ", validation")
        if name in self._points:
            return self._points[name]
        if row:
            self.labels[name] = candidate.label if len(row.candidates) == 1 else f"{row.name}: {candidate.label}"
        if candidate.syn_form == REAL:
            del keys["syn_form"]
        elif not self.is_made_ahead(candidate):
            keys |= {"regenerate": "on_demand", "regenerate_options": sweep.settings}
        phase0: tuple = (method, row is None)
        if p:
            phase0 += tuple(keys.get(key) for key in ("syn_form", "augmentation_prob", "augmentations_per_image"))
        keys = {**sweep.config, **keys, "seed": list(sweep.seeds if row else sweep.tune_seeds), "model_name": method}
        keys |= {"budget_in": "bytes", "memory_bytes_per_class": budget, "fixed_memory": True}
        if not row:
            keys["val_per_class"] = sweep.val_per_class
        text = "-".join([method, candidate.label, *([f"p{p:g}"] if p else []), str(budget)])
        text = "".join(c if c.isalnum() or c in "@+=." else "-" for c in text).replace("--", "-")
        folder = sweep.output / ("runs" if row else "validation") / text
        # In the file, so that main.py with it and another seed takes part in the sweep.
        keys |= {"output_dir": str(folder), "phase0_cache": str(sweep.output / "phase0_cache")}
        arguments = ("--config", str(folder / "point.json"))
        point = self._points[name] = Point(name, folder, checked_keys(keys), arguments, phase0, keys)
        return point
