"""Methods side by side, each with real exemplars alone and with a config's mix of real ones and prompts, at one budget.

    python -m exps.compare exps/compare_cifar10.json [--methods icarl,der] [--only real|mix] [--jobs 2] [key=value ...]

The file is a config that names everything but the method, for all methods; or it has
    config     the path of such a config, from the file's folder
    methods    an object: the name of each method of the table, and main.py's keys that it alone has, as {}
Each run is main.py's, in <output>/<method>-<real or mix>: a finished run
of the same settings is reused, a killed one goes on, one of other settings is named and left alone.  A method that
keeps no exemplars runs once.  The table, in Markdown, has top-1 accuracy in percent, mean ± standard deviation over the
config's seeds; it is written to <output>/table.md too.  A method whose config main.py refuses is named, and the others
are run.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exps.runs import MAIN, call, for_each, last_words, side_by_side
from utils import cli
from utils.config.read import read_json
from utils.config.schema import differences
from utils.errors import UserError
from utils.results import report
from utils.results.show import curves

MEMORIES = {
    "real": ("real_per_class=null", "syn_per_class=0", "augmentation_prob=0"),  # null: as many as the budget holds
    "mix": (),
}
"""Overrides of each kind of run."""


class Run(NamedTuple):
    """One run of main.py: `memory` is one of MEMORIES, `arguments` what the command is given."""

    method: str
    memory: str
    folder: Path
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method}, {self.memory}"


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


def checked_config(run: Run) -> dict[str, Any] | str:
    """The config that a run will have, with all defaults, or what main.py says against it."""
    shown = call(MAIN, *run.arguments, "--show-config")
    return last_words(shown) if shown.returncode else json.loads(shown.stdout)


def finished(run: Run, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A run's results over the config's seeds, if it has the config's settings and all seeds are done."""
    try:
        results = report.load_results(run.folder)
    except UserError:
        return None
    runs = [entry for entry in results["runs"] if entry["finished"] and entry["seed"] in config["seed"]]
    if len(runs) < len(config["seed"]) or differences(config, results["config"]):
        return None
    return report.results(results["config"], runs)


def keeps_exemplars(results: Mapping[str, Any]) -> bool:
    return results["summary"]["bytes"]["mean"] > 0


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown.  results: memory -> method -> results.json.  A classifier by nearest means has a row of its own."""
    columns = ("average", "forgetting", "s")
    header = ["method", *(f"{memory}: {column}" for memory in MEMORIES for column in columns)]
    lines: dict[str, dict[str, tuple]] = {}
    for memory, of_memory in results.items():
        for name, (summary, classifier) in curves(of_memory).items():
            metrics = summary[classifier]
            values = (metrics["average_incremental_accuracy"], metrics["forgetting"], summary["seconds"])
            lines.setdefault(name, {})[memory] = values
    rows = [header, ["---"] * len(header)]
    for name in sorted(lines):
        row = [name]
        for memory in MEMORIES:
            if (values := lines[name].get(memory)) is None:
                row += [""] * len(columns)
                continue
            row += [_cell(value, digits) for value, digits in zip(values, (1, 1, 0), strict=True)]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "-"
    spread = f" ± {value['std']:.{digits}f}" if digits and value["std"] > 0 else ""
    return f"{value['mean']:,.{digits}f}{spread}"


def compare(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    asked = read(options.config)
    output = options.output or Path("outputs") / options.config.stem
    known = call(MAIN, "--list", "methods").stdout.split()
    methods = options.methods.split(",") if options.methods else [*asked.methods] or known
    if unknown := sorted(set(methods) - set(known)):
        raise UserError(f"methods: {', '.join(unknown)} is not among {', '.join(known)}.")
    failed: dict[Run, str] = {}
    results: dict[str, dict[str, Mapping]] = {memory: {} for memory in MEMORIES}
    for memory, overrides in MEMORIES.items():
        runs = []
        for method in methods:
            folder = output / f"{method}-{memory}"
            common = ("--config", str(asked.config), *asked.methods.get(method, ()), *options.overrides)
            own = (*overrides, f"model_name={method}", f"output_dir={folder}")
            runs.append(Run(method, memory, folder, (*common, *own)))
        configs = dict(zip(runs, for_each(runs, checked_config), strict=True))
        refused = {run: words for run, words in configs.items() if isinstance(words, str)}
        if len(refused) == len(runs):
            raise UserError(next(iter(refused.values())))
        runs = [run for run in runs if run not in refused]
        if options.only in (None, memory):
            failed |= refused
            without = {method for method, of_real in results["real"].items() if not keeps_exemplars(of_real)}
            wanted = [run for run in runs if memory == "real" or run.method not in without]
            todo = {run: run.arguments for run in wanted if finished(run, configs[run]) is None}
            failed |= side_by_side(todo, options.jobs)
        for run in runs:
            if (of_run := finished(run, configs[run])) is not None:
                results[memory][run.method] = of_run
    if any(results.values()):
        text = table(results)
        print(text)
        report.write_text(output / "table.md", text + "\n")
    for run, words in failed.items():
        print(f"{run}: {words}", file=sys.stderr)
    return 1 if failed else 0


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
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--output", type=cli.path, metavar="DIR", help="default: outputs/<name of the config>")
    return compare(parser.parse_intermixed_args(cli.options_as_overrides(parser, argv)))


if __name__ == "__main__":
    sys.exit(main())
