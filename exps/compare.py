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
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from exps.grid import Point, finish, finished
from exps.report.entries import Entry, entries
from exps.report.tables import markdown, mean_std
from exps.runs import as_overrides
from models import catalogue
from utils import cli
from utils.config.read import read_json
from utils.config.schema import as_dict
from utils.errors import UserError
from utils.files import write_text

MEMORIES = {
    "real": ("real_per_class=null", "syn_per_class=0", "augmentation_prob=0"),  # null: as many as the budget holds
    "mix": (),
}
"""Overrides of each kind of run."""


def read(file: Path) -> tuple[Path, dict[str, list[str]]]:
    """The config of a file's table, and each method's own keys as "key=value"; no method stands for all of them.

    Raises UserError for a file that is no table.
    """
    content = read_json(file)
    config, methods = content.get("config"), content.get("methods")
    if methods is None and not isinstance(config, str):
        return file, {}
    if content.keys() != {"config", "methods"} or not isinstance(config, str) or not isinstance(methods, dict):
        raise UserError(f"{file}: a table has two keys: config, the path of a config, and methods, an object.")
    if wrong := [name for name, keys in methods.items() if not isinstance(keys, dict)]:
        raise UserError(f"{file}: methods: {wrong[0]} must have an object of main.py's keys, such as {{}}.")
    return file.parent / config, {name: as_overrides(keys) for name, keys in methods.items()}


def point_of(file: Path, method: str, memory: str, overrides: Sequence[str], output: Path) -> Point:
    """One run.  memory: one of MEMORIES; overrides: "key=value" of main.py.  Raises UserError for a wrong config."""
    words = (*overrides, *MEMORIES[memory], f"model_name={method}")
    config = as_dict(catalogue.read_config(file, words))
    phase0 = (method, memory if config["augmentation_prob"] else None) if config["phase0_cache"] else None
    return Point(f"{method}, {memory}", output / f"{method}-{memory}", config, ("--config", str(file), *words), phase0)


def table(points: Mapping[tuple[str, str], Point]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of what is finished, a row a classifier.  points: by memory and method."""
    lines: dict[str, dict[str, Entry]] = {}
    for memory in MEMORIES:
        own = {method: point for (its_memory, method), point in points.items() if its_memory == memory}
        for entry in entries({m: (point.folder, results) for m, point in own.items() if (results := finished(point))}):
            lines.setdefault(entry.title, {})[memory] = entry
    header = ["method", *(f"{memory}: {title}" for memory in MEMORIES for title in ("average", "forgetting", "s"))]
    rows = [[name, *(cell for m in MEMORIES for cell in _cells(lines[name].get(m)))] for name in sorted(lines)]
    return header, rows


def _cells(entry: Entry | None) -> list[str]:
    if entry is None:
        return ["", "", ""]
    return [mean_std(entry.average), mean_std(entry.forgetting), f"{entry.results.summary.seconds.mean:,.0f}"]


def compare(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    file, own_keys = read(options.config)
    output = options.output or Path("outputs") / options.config.stem
    known = catalogue.methods()
    methods = options.methods.split(",") if options.methods else list(own_keys or known)
    if unknown := sorted(set(methods) - known.keys()):
        raise UserError(f"methods: {', '.join(unknown)} is not among {', '.join(known)}.")
    points: dict[tuple[str, str], Point] = {}  # by memory and method
    problems = []
    for memory, method in itertools.product(MEMORIES, methods):
        if memory != "real" and not known[method].uses_memory:
            continue  # it keeps no exemplars, and runs once
        overrides = (*own_keys.get(method, ()), *options.overrides)
        try:
            points[memory, method] = point_of(file, method, memory, overrides, output)
        except UserError as error:
            problems.append(f"{method}, {memory}: {str(error).removeprefix(f'{file}: ')}")
    if not points:
        raise UserError(problems[0].partition(": ")[2])
    wanted = [point for (memory, _), point in points.items() if options.only in (None, memory)]

    def write() -> None:
        header, rows = table(points)
        if rows:
            cli.show_table(header, rows)
            write_text(output / "table.md", markdown(header, rows) + "\n")

    return finish(lambda failed: (wanted, False), options.jobs, write, problems)


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m exps.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=cli.path, help="a table or a config, such as exps/compare_cifar10.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the config in all runs")
    parser.add_argument("--methods", help="separated by commas (default: all)")
    parser.add_argument("--only", choices=MEMORIES, help="carry out one kind of runs; the table has what is there")
    parser.add_argument("--jobs", type=cli.at_least(1), default=1, metavar="N", help="runs at a time [%(default)s]")
    parser.add_argument("--output", type=cli.path, metavar="DIR", help="default: outputs/<name of the config>")
    return cli.run(lambda: compare(parser.parse_intermixed_args(cli.options_as_overrides(parser, argv))))


if __name__ == "__main__":
    sys.exit(main())
