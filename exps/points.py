"""Runs of main.py: the config that each is asked for, and whether it is finished, as results.json alone tells."""

import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from compress.forms import form_named
from compress.presets import PRESETS
from models import catalogue
from utils.config.read import load_config
from utils.config.schema import Config, as_dict, differences
from utils.data.paths import data_dir
from utils.errors import UserError
from utils.files import write_json
from utils.results.output import seed_folder
from utils.results.records import ClassOrder, Results, ResultsFile, load_results


@dataclass(frozen=True)
class Point:
    """One run of main.py, which its folder identifies.

    name: for messages; folder: its output_dir; config: with all defaults, as main.py checks it; arguments: of main.py,
    without seed and output_dir; phase0: points with equal values can use one trained network of phase 0; keys: what is
    written to point.json in the folder before main.py is started, for its --config.
    """

    name: str = field(compare=False)
    folder: Path
    config: Mapping[str, Any] = field(compare=False)
    arguments: tuple[str, ...] = field(compare=False)
    phase0: Hashable = field(default=None, compare=False)
    keys: Mapping[str, Any] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def seeds(self) -> list[int]:
        return self.config["seed"]


class Task(NamedTuple):
    """One class order of a point."""

    point: Point
    seed: int

    def __str__(self) -> str:
        return self.point.name if len(self.point.seeds) == 1 else f"{self.point.name}, order {self.seed}"

    @property
    def folder(self) -> Path:
        return seed_folder(self.point.folder, self.seed)


def checked_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """A config as main.py checks it.  Raises UserError."""
    return load_config(file, overrides, methods=catalogue.methods(), backbones=catalogue.backbones())


def checked_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config that main.py makes of some keys.  Raises UserError that lists what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        write_json(file, keys)
        try:
            return as_dict(checked_config(file))
        except UserError as error:
            raise UserError(str(error).replace(f"{file}: ", "")) from None


def results_of(point: Point) -> Results | None:
    """A point's results.json; None where it has no finished phase or can't be read."""
    file = point.folder / "results.json"
    try:
        status = file.stat()
        return _results(file, status.st_mtime_ns, status.st_size)
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=2048)
def _results(file: Path, time_ns: int, size: int) -> Results:
    return load_results(file)


def refusal(point: Point) -> str | None:
    """Why a point can't be carried out: its folder holds results of another config."""
    results = results_of(point)
    if results is None:
        return None
    done = _as_asked(point.config, results.config)
    differing = differences(point.config, done)
    if (own := data_dir(point.config.get("data_dir"))) != (other := data_dir(done.get("data_dir"))):
        differing.append(f"data_dir: {other} -> {own}")
    if not differing:
        return None
    more = f"; {len(differing) - 4} more" if len(differing) > 4 else ""
    words = f"{point.folder} holds results of another config ({'; '.join(differing[:4])}{more})"
    return f"{words}. Choose another --output, or delete that folder."


def _as_asked(config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """A finished run's config without what main.py fills in by itself, when it knows the data and the form."""
    by_main = [key for key in ("real_per_class", "syn_per_class") if config[key] in (None, "fill")]
    if _is_deterministic(config["syn_form"]):
        by_main.append("augmentations_per_image")
    return {**done, **{key: config[key] for key in by_main}}


@cache
def _is_deterministic(form: str) -> bool:
    """Whether all copies of an exemplar are equal, so that main.py makes one."""
    try:
        return form_named(form, PRESETS["high"]).deterministic
    except UserError:  # main.py says it better
        return False


def done_orders(point: Point) -> dict[int, ClassOrder]:
    """The class orders that are asked for and finished, by seed."""
    results = results_of(point)
    if results is None or refusal(point):
        return {}
    return {order.seed: order for order in results.runs if order.finished and order.seed in point.seeds}


def finished(point: Point) -> Results | None:
    """Results of exactly the class orders that are asked for; None where one is not finished or the config differs."""
    done, results = done_orders(point), results_of(point)
    if results is None or len(done) < len(set(point.seeds)):
        return None
    return ResultsFile.of(results.config, [done[seed] for seed in sorted(done)]).compared()
