"""The equal-bytes sweep: exemplar forms x budgets in bytes x methods x class orders, as one table and one page.

    python -m exps.pareto exps/pareto_digits.json [--dry-run] [--jobs N] [--output DIR]
                          [--seeds 1993] [--budgets 1200] [--forms real,edges] [--methods der] [--submit N]
    python -m exps.pareto --dry-run --dataset Mine --budgets 50000 [--forms real,webp:10,edges,text] [--settings ...]

The JSON file has
    config           main.py's keys that all runs share: an object, or the path of a JSON config
    forms            names such as "real", "webp:10", "edges@64", "text"; or objects {"form": name, and, for this row
                     only, augmentation_prob, real_per_class, syn_per_class, augmentations_per_image,
                     exemplar_selection, name}.  A list as a value stands for a row of each of its values
    budgets          bytes of a class's memory
    methods, seeds   method names; class orders
    real_per_class   real exemplars of a class beside those of another form (default 1; null: as many as fit)
    augmentation_prob  p of all forms but real (default 0.4): real pictures, new ones too, are replaced by a copy with
                     this probability; a list, such as [0, 0.4], gives each form a row with each of them
    settings         options of compress/run.py that copies are made with, such as "--model tiny --resolution high"
    copies           "ahead": of all train images; "on_demand": of the chosen exemplars (default, where p is 0)
    tune             true: a row with lists is one row.  Its best values, for each method and budget, are chosen on
                     val_per_class train images of each class that are held out, by the head's accuracy (tune_by:
                     "cnn") or that of nearest means ("nme"), over the class orders tune_seeds (default: the first).
                     Only what is chosen is tested
    expected         recorded accuracies, which `exps.demo` compares with the demo's
Runs share phase 0's networks, encoded files and copies.  What is finished is kept, so a sweep that was killed goes on
when it is started again; the same command started in several processes or on several machines shares the runs.
Written to --output (default: outputs/<name of the file>): runs/, table.md, table.csv and report.html.
"""

import argparse
import ast
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from exps.estimates import tell
from exps.grid import Point, Points, finish, finished, refusal, results_of, watch
from exps.report.entries import entries
from exps.report.tables import as_cells, as_markdown, notes, table_rows, verdict
from exps.runs import COMPRESS, ROOT, call, for_each, last_words, threads
from exps.sweep import REAL, Candidate, Plan, Row, Sweep, check, measure, read
from utils import cli
from utils.data.paths import data_dir, find_dataset
from utils.errors import UserError
from utils.files import write_csv, write_text

POLL = 10.0
"""Seconds between two looks at the jobs of --submit."""


def encode(plan: Plan, todo: Sequence[Point], jobs: int) -> dict[str, str]:
    """Make what is kept and the copies of the forms that have them made ahead, once for all runs; `jobs` at a time.

    todo: the points that are not finished.  Returns the last words of what failed, by form.
    """
    sweep = plan.sweep
    settings = shlex.split(sweep.settings)
    if "--resolution" not in settings:
        settings += ["--resolution", "auto"]
    if sweep.config.get("data_dir"):
        settings += ["--data-dir", sweep.config["data_dir"]]
    needed = {point.config["syn_form"] for point in todo if point.config["regenerate"] == "ahead"}
    copies: dict[str, int] = {}  # of each form
    for candidate in plan.candidates:
        if candidate.syn_form in needed and plan.is_made_ahead(candidate):
            copies[candidate.syn_form] = max(plan.nb_copies(candidate), copies.get(candidate.syn_form, 0))

    def encode_form(form: str) -> str | None:
        words = ["--dataset", sweep.config["dataset"], "--form", form, "--seeds", str(copies[form])]
        sweep.output.mkdir(parents=True, exist_ok=True)
        with FileLock(sweep.output / f".{form.replace(':', '-')}.lock", thread_local=False):  # one process for all
            print(f"{form}: encoding the train images", file=sys.stderr, flush=True)
            done = call(COMPRESS, *words, *settings, **threads(jobs))
        if not done.returncode:
            return None
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
        return "; ".join([last_words(done), *lines[-3:]] if done.returncode == 2 else lines[-3:])

    failed = dict(zip(copies, for_each(copies, encode_form, jobs), strict=True))
    return {form: words for form, words in failed.items() if words is not None}


def over_budget(point: Point) -> str | None:
    """What is wrong where a run kept more bytes than its budget, which no run should."""
    results, budget = results_of(point), point.config["memory_bytes_per_class"]
    phases = [phase for order in (results.runs if results else ()) for phase in order.phases]
    most = max((phase.memory.bytes_per_class_max or 0 for phase in phases), default=0)
    return f"a class took {most:,} bytes of {budget:,}" if most > budget else None


COLUMNS = (
    *("method", "classifier", "form", "augmentation_prob", "budget_bytes_per_class", "seed"),
    *("average_incremental_accuracy", "last_phase", "forgetting", "memory_bytes", "real_exemplars"),
    *("synthetic_exemplars", "seconds"),
)
NOTE = (
    "All forms have the same budget in bytes per class: real exemplars first, then as many of the form as fit, in the "
    "order of choice. What a form keeps, and each class's text, count in true bytes; networks and generators do not."
)
"""Below the page's title."""


def write(plan: Plan, done: Sequence[Point], problems: Sequence[str]) -> None:
    """Write table.md, table.csv and report.html of the finished runs, and print the table and what it says."""
    from exps.report.page import page  # imports Jinja2

    sweep = plan.sweep
    runs = {point.name: (point.folder, results) for point in done if (results := finished(point))}
    compared = entries(runs, plan.labels)
    cells = []
    for entry in compared:
        for order in entry.orders:
            scores, memory = getattr(order, entry.classifier), order.memory
            first = [entry.model, entry.classifier, entry.label, entry.probability, entry.budget, order.seed]
            score = [scores.average_incremental_accuracy, scores.top1[-1], scores.forgetting]
            cells.append([*first, *score, memory.bytes_total, memory.nb_real, memory.nb_synthetic, order.seconds])
    write_csv(sweep.output / "table.csv", COLUMNS, cells)
    rows = table_rows(compared)
    conclusion = "\n".join(f"- {line}" for line in verdict(rows))
    write_text(sweep.output / "table.md", f"{conclusion}\n\n{as_markdown(rows)}\n")
    said = [NOTE, *_how_chosen(plan), *(f"Missing: {problem}" for problem in problems)]
    title = f"Exemplar forms at equal bytes: {sweep.config['dataset']}, {', '.join(sweep.methods)}"
    file = sweep.output / "report.html"
    write_text(file, page(runs, title, said, labels=plan.labels, file=file))
    cli.show_table(*as_cells(rows), [*notes(rows), conclusion], left=4)


def _how_chosen(plan: Plan) -> list[str]:
    """A paragraph on what validation pictures chose, if anything."""
    if not plan.chosen:
        return []
    orders = ", ".join(map(str, plan.sweep.tune_seeds))
    chosen = [f"{name} at {budget:,} bytes ({method}): {c}" for (name, method, budget), c in plan.chosen.items()]
    return [
        f"Chosen on {plan.sweep.val_per_class} train pictures of each class, held out from training and from the "
        f"choice of exemplars (class orders {orders}), never on test pictures: {'; '.join(sorted(chosen))}."
    ]


def pareto(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    if options.file is None:
        return _budget_only(options)
    sweep = read(options.file, options.output, **{name: getattr(options, name) for name in PARTS})
    check(sweep)
    plan = Plan(sweep, measure(sweep, *(["--time"] if options.dry_run else [])))
    problems = [f"{form}: {words}" for form, words in plan.failed_forms.items()]
    known, _ = plan.known()
    todo = [point for point in known if finished(point) is None and refusal(point) is None]
    if options.dry_run:
        problems += [f"{point}: {words}" for point in known if (words := refusal(point))]
        tell(plan, known, todo)
        print(*(f"can't be made: {problem}" for problem in problems), sep="\n")
        return 1 if problems else 0
    if options.submit:
        return submit(options, sweep.output, plan.known)
    unmade = encode(plan, todo, options.jobs)
    problems += [f"{form}: {words}" for form, words in unmade.items()]

    def points(failed):
        known, more = plan.known(failed)
        return [p for p in known if not (p.config["syn_form"] in unmade and p.config["regenerate"] == "ahead")], more

    def write_finished() -> None:
        done = [point for point in plan.tested() if finished(point) is not None]
        wrong = {point: words for point in done if (words := over_budget(point))}
        problems.extend(f"{point}: {words}" for point, words in wrong.items())
        if done := [point for point in done if point not in wrong]:
            write(plan, done, problems)
            print(f"\n{sweep.output}/: report.html, table.md, table.csv", file=sys.stderr)

    return finish(points, options.jobs, write_finished, problems)


def _budget_only(options: argparse.Namespace) -> int:
    """What budgets hold of a dataset, without a sweep's file."""
    if not (options.dry_run and options.dataset and min(options.budgets, default=0) > 0):
        raise UserError("give a sweep's file; or, with --dry-run, --dataset and --budgets (bytes above 0).")
    forms = options.forms or ["real", "jpeg:10", "webp:10", "avif:20", "edges", "edges@64", "text"]
    rows = []
    for form in dict.fromkeys([REAL, *forms]):
        keys = {"real_per_class": None if form in (REAL, "text") else 1, "syn_per_class": 0 if form == REAL else "fill"}
        rows.append(Row(form, (Candidate(form, form, {"syn_form": form, "augmentation_prob": 0, **keys}),)))
    config = {"dataset": find_dataset(data_dir(), options.dataset)}
    shared = {"forms": forms, "budgets": options.budgets, "methods": ["-"], "seeds": [1], "output": Path()}
    sweep = Sweep(config=config, rows=rows, settings=options.settings, **shared)
    plan = Plan(sweep, measure(sweep))
    tell(plan, [], [])
    for form, words in plan.failed_forms.items():
        print(f"{form}: {words}", file=sys.stderr)
    return 1 if plan.failed_forms else 0


PARTS = ("seeds", "budgets", "forms", "methods")
"""Options that replace what the file says, or take a part of it."""


def submit(options: argparse.Namespace, output: Path, points: Points) -> int:
    """Start the same sweep `options.submit` times as one array of SLURM jobs and wait for it.  Returns the exit code.

    output: the sweep's folder; points: what it has.  The jobs share the runs; the last one writes the page.  When this
    process is stopped, the jobs go on.  Raises UserError without submitit, which is optional, or for wrong parameters.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise UserError("--submit needs submitit: pip install submitit.") from None
    parameters = dict(_parameter(text) for text in options.slurm)
    words = [sys.executable, "-m", "exps.pareto", str(options.file), "--output", str(output)]
    words += ["--jobs", str(options.jobs)]
    for name in PARTS:
        if values := getattr(options, name):
            words += [f"--{name}", ",".join(map(str, values))]
    executor = submitit.AutoExecutor(folder=output / "slurm")
    executor.update_parameters(name="escort-sweep", **parameters)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    task = submitit.helpers.CommandFunction(words, cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": path})
    with executor.batch():
        jobs = [executor.submit(task) for _ in range(options.submit)]
    print(f"submitted as {', '.join(str(job.job_id) for job in jobs)}; logs in {output}/slurm", flush=True)
    watch(points, lambda: not all(job.done() for job in jobs), POLL)
    failed = [f"job {job.job_id}: {error}" for job in jobs if (error := job.exception()) is not None]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


def _parameter(text: str) -> tuple[str, object]:
    """ "timeout_min=600" -> ("timeout_min", 600)."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--slurm {text}: give KEY=VALUE, such as timeout_min=600.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    parser = argparse.ArgumentParser(
        prog="python -m exps.pareto", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=cli.path, nargs="?", help="such as exps/pareto_digits.json")
    parser.add_argument("--dry-run", action="store_true", help="tell exemplars, runs, hours and disk, and keep nothing")
    parser.add_argument("--jobs", type=cli.at_least(1), default=1, metavar="N", help="runs at a time [%(default)s]")
    parser.add_argument("--seeds", type=_numbers, default=[], metavar="A,B", help="class orders in place of the file's")
    parser.add_argument("--budgets", type=_numbers, default=[], metavar="A,B", help="bytes, in place of the file's")
    parser.add_argument("--forms", type=_names, default=[], metavar="A,B", help="only these of the file's forms")
    parser.add_argument("--methods", type=_names, default=[], metavar="A,B", help="in place of the file's")
    parser.add_argument("--output", type=cli.path, metavar="DIR", help="default: outputs/<name of the file>")
    start = "start this command N times on SLURM (needs submitit)"
    parser.add_argument("--submit", type=cli.at_least(1), metavar="N", help=start)
    parameter = "of submitit, such as timeout_min=600"
    parser.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help=parameter)
    parser.add_argument("--dataset", metavar="D", help="with --dry-run, without a file: what budgets hold of a dataset")
    parser.add_argument("--settings", default="", help="with --dataset: options of compress/run.py")
    return cli.run(lambda: pareto(parser.parse_args(argv)))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1993,1994") from None


if __name__ == "__main__":
    sys.exit(main())
