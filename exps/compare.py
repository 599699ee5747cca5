"""Methods side by side, each with real exemplars alone and with a config's mix of real ones and prompts, at one budget.

    python -m exps.compare exps/compare_cifar10.json [--methods icarl,der] [--only real|mix] [--jobs 2] [key=value ...]

The file is a config that names everything but the method, for all methods; or it has
    config     the path of such a config, from the file's folder
    methods    an object: the name of each method of the table, and main.py's keys that it alone has, as {}
Each run is main.py's, in <output>/<method>-<real or mix>: a finished run
of the same settings is reused, a killed one goes on, one of other settings is named and left alone.  A method that
keeps no exemplars runs once.  The table has top-1 accuracy in percent, mean ± standard deviation over the
config's seeds; it is written to <output>/table.md too.  A method whose config main.py refuses is named, and the others
are run.  The same command in several processes or on several machines shares the runs.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from exps.grid import finish
from exps.points import Point, checked_config, finished
from exps.report.entries import Entry, entries
from exps.report.tables import markdown, mean_std
from models import catalogue
from utils import cli
from utils.config.read import read_json
from utils.config.schema import as_dict
from utils.errors import UserError
from utils.files import write_text
from utils.results.records import Results

MEMORIES = {
    "real": ("real_per_class=null", "syn_per_class=0", "augmentation_prob=0"),  # null: as many as the budget holds
    "mix": (),
}
"""Overrides of each kind of run."""


class Table(NamedTuple):
    """What a file asks for.  methods: each with its own keys, as "key=value"; none: all that main.py has."""

    config: Path
    methods: dict[str, tuple[str, ...]]


def read(file: Path) -> Table:
    """The table of a file.  Raises UserError for a file that is none."""
    content = read_json(file)
    if "methods" not in content and not isinstance(content.get("config"), str):
        return Table(file, {})
    config, methods = content.get("config"), content.get("methods")
    if content.keys() != {"config", "methods"} or not isinstance(config, str) or not isinstance(methods, dict):
        raise UserError(f"{file}: a table has two keys: config, the path of a config, and methods, an object.")
    if wrong := [name for name, keys in methods.items() if not isinstance(keys, dict)]:
        raise UserError(f"{file}: methods: {wrong[0]} must have an object of main.py's keys, such as {{}}.")
    own = {
        name: tuple(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items())
        for name, keys in methods.items()
    }
    return Table(file.parent / config, own)


def point_of(file: Path, method: str, memory: str, overrides: Sequence[str], output: Path) -> Point:
    """One run.  memory: one of MEMORIES; overrides: "key=value" of main.py.  Raises UserError for a wrong config."""
    words = (*overrides, *MEMORIES[memory], f"model_name={method}")
    config = as_dict(checked_config(file, words))
    phase0 = (method, memory if config["augmentation_prob"] else None) if config["phase0_cache"] else None
    return Point(f"{method}, {memory}", output / f"{method}-{memory}", config, ("--config", str(file), *words), phase0)


def table(results: Mapping[str, Mapping[str, Results]]) -> tuple[list[str], list[list[str]]]:
    """(header, rows).  results: memory -> method -> results.  A classifier by nearest means has a row of its own."""
    lines: dict[str, dict[str, Entry]] = {}
    for memory, by_method in results.items():
        for entry in entries({method: (Path(), of_method) for method, of_method in by_method.items()}):
            lines.setdefault(entry.title, {})[memory] = entry
    header = ["method", *(f"{memory}: {title}" for memory in MEMORIES for title in ("average", "forgetting", "s"))]
    rows = [[name, *(cell for m in MEMORIES for cell in _cells(lines[name].get(m)))] for name in sorted(lines)]
    return header, rows


def _cells(entry: Entry | None) -> list[str]:
    if entry is None:
        return ["", "", ""]
    averages, seconds = entry.averages, entry.results.summary.seconds
    return [mean_std(averages.average_incremental_accuracy), mean_std(averages.forgetting), f"{seconds.mean:,.0f}"]


def compare(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    comparison = read(options.config)
    output = options.output or Path("outputs") / options.config.stem
    known = catalogue.methods()
    methods = options.methods.split(",") if options.methods else [*comparison.methods] or list(known)
    if unknown := sorted(set(methods) - known.keys()):
        raise UserError(f"methods: {', '.join(unknown)} is not among {', '.join(known)}.")
    points: dict[tuple[str, str], Point] = {}  # by memory and method
    refused: dict[str, str] = {}
    for memory in MEMORIES:
        for method in methods:
            if memory != "real" and not known[method].uses_memory:
                continue  # it keeps no exemplars, and runs once
            overrides = (*comparison.methods.get(method, ()), *options.overrides)
            try:
                points[memory, method] = point_of(comparison.config, method, memory, overrides, output)
            except UserError as error:
                refused[f"{method}, {memory}"] = str(error).removeprefix(f"{comparison.config}: ")
    if not points:
        raise UserError(next(iter(refused.values())))
    wanted = [point for (memory, _), point in points.items() if options.only in (None, memory)]

    def write() -> None:
        results: dict[str, dict[str, Results]] = {memory: {} for memory in MEMORIES}
        for (memory, method), point in points.items():
            if (done := finished(point)) is not None:
                results[memory][method] = done
        if any(results.values()):
            cells = table(results)
            cli.show_table(*cells)
            write_text(output / "table.md", markdown(*cells) + "\n")

    problems = [f"{name}: {words}" for name, words in refused.items()]
    return finish(lambda failed: (wanted, False), options.jobs, write, problems)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exps.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=cli.path, help="a table or a config, such as exps/compare_cifar10.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the config in all runs")
    parser.add_argument("--methods", help="separated by commas (default: all)")
    parser.add_argument("--only", choices=MEMORIES, help="carry out one kind of runs; the table has what is there")
    parser.add_argument(
        "--jobs", type=cli.at_least(1), default=1, metavar="N", help="runs at a time (default: %(default)s)"
    )
    parser.add_argument("--output", type=cli.path, metavar="DIR", help="default: outputs/<name of the config>")
    return compare(parser.parse_intermixed_args(cli.options_as_overrides(parser, argv)))


if __name__ == "__main__":
    sys.exit(main())
