"""The referee: exemplar forms x budgets in bytes x methods x class orders, as one table and one page.

    python -m exps.pareto exps/pareto_digits.json [--dry-run] [--jobs N] [--output DIR]
                          [--seeds 1993] [--budgets 1200] [--forms real,edges]

The JSON file has
    config           main.py's keys that all runs share: an object, or the path of a JSON config
    forms            names such as "real", "webp:10", "edges@64", "text"; or objects {"form": name, and, for this form
                     alone, real_per_class, syn_per_class, augmentations_per_image}
    budgets          bytes of a class's memory
    methods, seeds   method names; class orders
    real_per_class   real exemplars of a class beside those of another form (default 1; null: as many as fit)
    settings         options of compress/run.py that copies are made with, such as "--model tiny --resolution high"
    copies           "ahead": of all train images; "on_demand": of the chosen exemplars (default)
Every run has a budget in bytes, the same for all forms: keys that would change it are refused.  Runs share phase 0's
networks, encoded files and copies.  What is finished is kept, so a sweep that was killed goes on when it is started
again.  Written to --output (default: outputs/<name of the file>): runs/, table.md, table.csv and report.html.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exps.estimates import tell
from exps.runs import COMPRESS, MAIN, call, for_each, last_words, measured, side_by_side, threads
from utils import cli
from utils.config.read import read_json
from utils.errors import UserError
from utils.results import report
from utils.results.entries import entries, paired, reference_of
from utils.results.history import write_csv

REAL = "real"
OF_A_FORM = ("real_per_class", "syn_per_class", "augmentations_per_image")
SETS = (
    *("budget_in", "memory_bytes_per_class", "memory_per_class", "memory_size", "fixed_memory", "model_name", "seed"),
    *("syn_form", "augmentation_prob", "regenerate", "regenerate_options", "output_dir", "phase0_cache"),
    *("real_per_class", "syn_per_class"),
)
"""Keys that the sweep sets itself, so that all runs of a budget have the same number of bytes."""


class Sweep(NamedTuple):
    """A sweep's file, checked.  forms: the name that tables have -> its keys of main.py."""

    config: dict[str, Any]
    forms: dict[str, dict[str, Any]]
    budgets: list[int]
    methods: list[str]
    seeds: list[int]
    settings: str
    copies: str
    output: Path

    @property
    def kept(self) -> list[str]:
        """The forms but real exemplars."""
        return [form for form in dict.fromkeys(keys["syn_form"] for keys in self.forms.values()) if form != REAL]

    @property
    def nb_copies(self) -> int:
        return self.config.get("augmentations_per_image", 5)


class Point(NamedTuple):
    """One run of main.py, of all class orders.  keys: those that it does not share with the other runs."""

    method: str
    form: str
    budget: int
    folder: Path
    keys: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.method}, {self.form}, {self.budget:,} bytes"

    @property
    def is_finished(self) -> bool:
        """Whether all its class orders are done, with these keys."""
        try:
            asked = json.loads((self.folder / "point.json").read_text(encoding="utf-8"))
            done = {run["seed"] for run in report.load_results(self.folder)["runs"] if run["finished"]}
        except (OSError, ValueError, UserError):
            return False
        return asked == self.keys and done >= set(self.keys["seed"])


def read(file: Path, output: Path | None, **instead: Sequence[int] | Sequence[str]) -> Sweep:
    """The sweep of a file.

    instead: `seeds` and `budgets` in place of the file's, and the names of those of its `forms` that are taken; what
    is empty is left as it is.  Raises UserError, naming the key, for a file that is no sweep's.
    """
    content = read_json(file)
    forms = instead.pop("forms", ())
    content |= {key: list(values) for key, values in instead.items() if values}
    config = content.get("config")
    if isinstance(config, str):
        config = read_json(cli.path(config))
    known = {"config", "forms", "budgets", "methods", "seeds", "real_per_class", "settings", "copies"}
    if not isinstance(config, dict) or "dataset" not in config:
        raise UserError(f"{file}: config must be an object of main.py's keys, or the path of a config.")
    if unknown := sorted(content.keys() - known):
        raise UserError(f"{file}: unknown key {unknown[0]!r}; a sweep has {', '.join(sorted(known))}.")
    if isinstance(content["config"], dict) and (own := [key for key in SETS if key in config]):
        raise UserError(f"{file}: the sweep sets {own[0]} itself, for all forms alike. Take it out of config.")
    for key, kind in (("budgets", int), ("seeds", int), ("methods", str), ("forms", (str, dict))):
        values = content.get(key)
        if (
            not isinstance(values, list)
            or not values
            or not all(type(v) is not bool and isinstance(v, kind) for v in values)
        ):
            raise UserError(f"{file}: {key} must be a list of {'numbers' if kind is int else 'names'}.")
    if any(budget < 1 for budget in content["budgets"]):
        raise UserError(f"{file}: budgets are numbers of bytes above 0.")
    copies = content.get("copies", "on_demand")
    if copies not in ("ahead", "on_demand"):
        raise UserError(f'{file}: copies is "ahead" or "on_demand", not {copies!r}.')
    config = {key: value for key, value in config.items() if key not in SETS}
    of_file = dict(_form(file, form, content.get("real_per_class", 1)) for form in content["forms"])
    names = [keys["syn_form"] for keys in of_file.values()]
    if unknown := [name for name in forms if name not in names]:
        raise UserError(f"{file}: no form {unknown[0]!r}; it has {', '.join(names)}.")
    forms = {label: keys for label, keys in of_file.items() if not forms or keys["syn_form"] in forms}
    where = output or Path("outputs") / file.stem
    lists = [list(dict.fromkeys(content[key])) for key in ("budgets", "methods", "seeds")]
    return Sweep(config, forms, sorted(lists[0]), *lists[1:], content.get("settings", ""), copies, where)


def _form(file: Path, form: str | dict, real: int | None) -> tuple[str, dict[str, Any]]:
    """(the name that tables have, main.py's keys) of one of a sweep's forms."""
    given = {"form": form} if isinstance(form, str) else dict(form)
    name = given.pop("form", None)
    if not isinstance(name, str) or (unknown := sorted(given.keys() - set(OF_A_FORM))):
        what = f"unknown key {unknown[0]!r}" if isinstance(name, str) else "no name"
        raise UserError(f"{file}: a form has {what}; it has form, {', '.join(OF_A_FORM)}.")
    if name == REAL:
        return REAL, {"syn_form": REAL, "real_per_class": None, "syn_per_class": 0}
    label = ", ".join([name, *(f"{key}={json.dumps(value)}" for key, value in given.items())])
    return label, {"syn_form": name, "real_per_class": real, "syn_per_class": "fill", **given}


def made_ahead(sweep: Sweep, of_form: Mapping[str, Any]) -> bool:
    """Whether a form's copies are made of all train images: as the sweep says, or where decoding takes no model."""
    return sweep.copies == "ahead" or (of_form["deterministic"] and not of_form["needs_model"])


def points(sweep: Sweep, measures: Mapping[str, Any]) -> list[Point]:
    """All runs.  measures: `exps.runs.measured`; forms that failed there have none."""
    found = []
    for method in sweep.methods:
        for label, keys in sweep.forms.items():
            form = keys["syn_form"]
            if "error" in measures["forms"][form]:
                continue
            ahead = form == REAL or made_ahead(sweep, measures["forms"][form])
            how = {} if ahead else {"regenerate": "on_demand", "regenerate_options": sweep.settings}
            of_form = {key: value for key, value in keys.items() if (key, value) != ("syn_form", REAL)}
            for budget in sweep.budgets:
                name = "".join(c if c.isalnum() or c in "@+=" else "-" for c in label).replace("--", "-")
                folder = sweep.output / "runs" / f"{method}-{name}-{budget}"
                common = {"budget_in": "bytes", "memory_bytes_per_class": budget, "fixed_memory": True}
                common |= {"model_name": method, "seed": sweep.seeds, "augmentation_prob": 0}
                found.append(Point(method, label, budget, folder, {**sweep.config, **of_form, **how, **common}))
    return found


def check(sweep: Sweep) -> None:
    """Raises UserError, with what main.py says, for keys that it refuses with any of the methods."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        for method in sweep.methods:
            keys = {"model_name": method, "seed": sweep.seeds, "budget_in": "bytes", "fixed_memory": True}
            keys |= {"memory_bytes_per_class": sweep.budgets[0], "augmentation_prob": 0}
            report.write_json(file, {**sweep.config, **keys})
            done = call(MAIN, "--config", str(file), "--show-config")
            if done.returncode:
                raise UserError(f"config: {last_words(done).removeprefix(str(file)).lstrip(': ')}")


def arguments(sweep: Sweep, point: Point) -> list[str]:
    """Of main.py, after its keys are written beside its results."""
    report.write_json(point.folder / "point.json", point.keys)
    cache = sweep.output / "phase0_cache"
    return ["--config", str(point.folder / "point.json"), f"output_dir={point.folder}", f"phase0_cache={cache}"]


def encode(sweep: Sweep, measures: Mapping[str, Any], jobs: int) -> dict[str, str]:
    """Make what is kept and the copies of the forms that have them made ahead, once for all runs; `jobs` at a time.

    Returns the last words of what failed, by form.
    """
    where = ["--data-dir", sweep.config["data_dir"]] if sweep.config.get("data_dir") else []
    settings = shlex.split(sweep.settings)
    settings += ["--resolution", "auto"] * ("--resolution" not in settings)

    def of_form(form: str) -> str | None:
        words = ["--dataset", sweep.config["dataset"], "--form", form, "--seeds", str(sweep.nb_copies)]
        print(f"{form}: encoding the train images", file=sys.stderr, flush=True)
        done = call(COMPRESS, *where, *words, *settings, **threads(jobs))
        if not done.returncode:
            return None
        said = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
        return "; ".join([last_words(done), *said[-3:]] if done.returncode == 2 else said[-3:])

    measured_forms = {form: measures["forms"][form] for form in sweep.kept}
    forms = [form for form, of in measured_forms.items() if "error" not in of and made_ahead(sweep, of)]
    failed = dict(zip(forms, for_each(forms, of_form, jobs), strict=True))
    return {form: words for form, words in failed.items() if words is not None}


def carry_out(sweep: Sweep, todo: Sequence[Point], jobs: int) -> dict[str, str]:
    """Run what is not finished; of each method one run first, which leaves phase 0's networks for the others.

    Returns the last words of what failed, by name.
    """
    first: dict[str, Point] = {}
    for point in todo:
        first.setdefault(point.method, point)
    failed: dict[str, str] = {}
    for wave in (list(first.values()), [point for point in todo if point not in first.values()]):
        if wave:
            by_name = {str(point): arguments(sweep, point) for point in wave}
            failed |= side_by_side(by_name, jobs)
    return failed


def over_budget(point: Point) -> str | None:
    """What is wrong where a run kept more bytes than its budget, which no run should."""
    phases = [phase for run in report.load_results(point.folder)["runs"] for phase in run["phases"]]
    most = max((phase["memory"].get("bytes_per_class_max") or 0 for phase in phases), default=0)
    return f"a class took {most:,} bytes of {point.budget:,}" if most > point.budget else None


HEADER = ("method", "form", "budget", "bytes a class", "average", "minus real", "SE", "forgetting", "seconds")


def write(sweep: Sweep, done: Sequence[Point], problems: Sequence[str]) -> str:
    """Write table.md, table.csv and report.html of the finished runs.  Returns the table."""
    by_name = {str(point): point for point in done}
    of = entries({name: (point.folder, report.load_results(point.folder)) for name, point in by_name.items()})
    rows, cells = [], []
    for entry in of:
        point, reference = by_name[entry.name], reference_of(entry, of)
        pair = paired(entry.scores, reference.scores) if reference and reference.form == REAL else None
        average, forgetting = entry.summary["average_incremental_accuracy"], entry.summary["forgetting"]
        rows.append(
            [
                *(entry.method, point.form, f"{point.budget:,}", f"{entry.bytes_a_class:,.0f}"),
                f"{average['mean']:.1f} ± {average['std']:.1f}",
                *(f"{pair.mean:+.1f}" if pair else "", f"{pair.error:.1f}" if pair and pair.error is not None else ""),
                *(
                    f"{forgetting['mean']:.1f}" if forgetting else "-",
                    f"{entry.content['summary']['seconds']['mean']:,.0f}",
                ),
            ]
        )
        for run in entry.runs:
            of_order = run[entry.classifier]
            memory = [run["memory"]["bytes_total"], run["memory"]["nb_real"], run["memory"]["nb_synthetic"]]
            score = [of_order["average_incremental_accuracy"], of_order["top1"][-1], of_order["forgetting"]]
            cells.append([entry.method, point.form, point.budget, run["seed"], *score, *memory, run["seconds"]])
    columns = ["method", "form", "budget_bytes_per_class", "seed", "average_incremental_accuracy", "last_phase"]
    columns += ["forgetting", "memory_bytes", "real_exemplars", "synthetic_exemplars", "seconds"]
    write_csv(sweep.output / "table.csv", columns, cells)
    text = "\n".join("| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *rows])
    report.write_text(sweep.output / "table.md", text + "\n")
    notes = [
        "Every form has the same number of bytes a class: real exemplars first, then as many of the form as fit, in "
        "the order of choice. What a form keeps, and each class's text, count in true bytes; networks and generators "
        "do not."
    ]
    title = f"Exemplar forms at equal bytes: {sweep.config['dataset']}, {', '.join(sweep.methods)}"
    missing = [f"Missing: {problem}" for problem in problems]
    report.write_page(
        {name: p.folder for name, p in by_name.items()}, sweep.output / "report.html", title, notes + missing
    )
    return text


def pareto(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    sweep = read(options.file, options.output, seeds=options.seeds, budgets=options.budgets, forms=options.forms)
    check(sweep)
    measures = measured(sweep.config, [REAL, *sweep.kept], sweep.settings, *["--time"] * options.dry_run)
    problems = [f"{form}: {of['error']}" for form, of in measures["forms"].items() if "error" in of]
    all_points = points(sweep, measures)
    todo = [point for point in all_points if not point.is_finished]
    if options.dry_run:
        tell(sweep, measures, all_points, todo)
        print(*(f"can't be made: {problem}" for problem in problems), sep="\n")
        return 1 if problems else 0
    if todo:
        problems += [f"{form}: {words}" for form, words in encode(sweep, measures, options.jobs).items()]
        problems += [f"{point}: {words}" for point, words in carry_out(sweep, todo, options.jobs).items()]
    done = [point for point in all_points if point.is_finished]
    for point in list(done):
        if wrong := over_budget(point):
            problems.append(f"{point}: {wrong}")
            done.remove(point)
    if done:
        print(write(sweep, done, problems))
        print(f"\n{sweep.output}/: report.html, table.md, table.csv", file=sys.stderr)
    print(*problems, sep="\n", end="\n" * bool(problems), file=sys.stderr)
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m exps.pareto", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=cli.path, help="such as exps/pareto_digits.json")
    parser.add_argument("--dry-run", action="store_true", help="tell runs, hours and disk, and keep nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--seeds", type=_numbers, default=[], metavar="A,B", help="class orders in place of the file's")
    parser.add_argument("--budgets", type=_numbers, default=[], metavar="A,B", help="bytes, in place of the file's")
    parser.add_argument("--forms", type=_names, default=[], metavar="A,B", help="these of the file's forms alone")
    parser.add_argument("--output", type=cli.path, metavar="DIR", help="default: outputs/<name of the file>")
    return pareto(parser.parse_args(argv))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1993,1994") from None


if __name__ == "__main__":
    sys.exit(main())
