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
Every run has a budget in bytes, the same for all forms: keys that would change it are refused.  Runs share phase 0's
networks, encoded files and copies.  What is finished is kept, so a sweep that was killed goes on when it is started
again; the same command started in several processes or on several machines shares the runs, and --submit starts it N
times on a SLURM cluster.  With --jobs N, each of N runs at a time has a GPU of its own where there are several.
Written to --output (default: outputs/<name of the file>): runs/, table.md, table.csv and report.html.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from exps.estimates import tell
from exps.grid import finish
from exps.points import Point, finished, refusal, results_of
from exps.report.comparison import as_cells, as_markdown, notes, table_rows, verdict
from exps.report.entries import entries
from exps.runs import COMPRESS, call, for_each, last_words, measured, threads
from exps.submit import submit
from exps.sweep import REAL, Candidate, Plan, Row, Sweep, check, made_ahead, read
from utils import cli
from utils.data.paths import data_dir, find_dataset
from utils.errors import UserError
from utils.files import write_csv, write_text


def encode(plan: Plan, todo: Sequence[Point], jobs: int) -> dict[str, str]:
    """Make what is kept and the copies of the forms that have them made ahead, once for all runs; `jobs` at a time.

    todo: the points that are not finished.  Returns the last words of what failed, by form.
    """
    sweep = plan.sweep
    where = ["--data-dir", sweep.config["data_dir"]] if sweep.config.get("data_dir") else []
    settings = shlex.split(sweep.settings)
    if "--resolution" not in settings:
        settings += ["--resolution", "auto"]
    copies: dict[str, int] = {}  # of each form
    for candidate in sweep.candidates:
        form = candidate.keys["syn_form"]
        if "error" not in plan.measures["forms"][form] and made_ahead(sweep, candidate, plan.measures):
            number = candidate.keys.get("augmentations_per_image", sweep.nb_copies)
            copies[form] = max(number, copies.get(form, 0))
    needed = {point.config["syn_form"] for point in todo if point.config["regenerate"] == "ahead"}

    def encode_form(form: str) -> str | None:
        words = ["--dataset", sweep.config["dataset"], "--form", form, "--seeds", str(copies[form])]
        sweep.output.mkdir(parents=True, exist_ok=True)
        with FileLock(sweep.output / f".{form.replace(':', '-')}.lock", thread_local=False):  # one process for all
            print(f"{form}: encoding the train images", file=sys.stderr, flush=True)
            done = call(COMPRESS, *where, *words, *settings, **threads(jobs))
        if not done.returncode:
            return None
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
        return "; ".join([last_words(done), *lines[-3:]] if done.returncode == 2 else lines[-3:])

    forms = [form for form in copies if form in needed]
    failed = dict(zip(forms, for_each(forms, encode_form, jobs), strict=True))
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


def write(plan: Plan, done: Sequence[Point], problems: Sequence[str]) -> None:
    """Write table.md, table.csv and report.html of the finished runs, and print the table and what it says."""
    sweep = plan.sweep
    runs = {point.name: (point.folder, results) for point in done if (results := finished(point))}
    labels = {point.name: _label(plan, point) for point in done}
    compared = entries(runs, labels)
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
    from exps.report.page import page  # imports Jinja2

    title = f"Exemplar forms at equal bytes: {sweep.config['dataset']}, {', '.join(sweep.methods)}"
    missing = [f"Missing: {problem}" for problem in problems]
    file = sweep.output / "report.html"
    write_text(file, page(runs, title, [*_notes(plan), *missing], labels=labels, file=file))
    cli.show_table(*as_cells(rows), [*notes(rows), conclusion], left=4)


def _label(plan: Plan, point: Point) -> str:
    """What the table calls a run's form."""
    name, candidate = plan.rows[point.name]
    row = next(row for row in plan.sweep.rows if row.name == name)
    return f"{name}: {candidate.label}" if len(row.candidates) > 1 else candidate.label


def _notes(plan: Plan) -> list[str]:
    """Paragraphs below the page's title."""
    notes = [
        "All forms have the same budget in bytes per class: real exemplars first, then as many of the form as fit, in "
        "the order of choice. What a form keeps, and each class's text, count in true bytes; networks and generators "
        "do not."
    ]
    if plan.chosen:
        sweep = plan.sweep
        orders = ", ".join(map(str, sweep.tune_seeds))
        chosen = [f"{name} at {budget:,} bytes ({method}): {c}" for (name, method, budget), c in plan.chosen.items()]
        notes.append(
            f"Chosen on {sweep.val_per_class} train pictures of each class, held out from training and from the choice "
            f"of exemplars (class orders {orders}), never on test pictures: {'; '.join(sorted(chosen))}."
        )
    return notes


def pareto(options: argparse.Namespace) -> int:
    """What the command line asks for.  Returns the exit code."""
    if options.file is None:
        return _budget_only(options)
    part = {name: getattr(options, name) for name in ("seeds", "budgets", "forms", "methods")}
    sweep = read(options.file, options.output, **part)
    check(sweep)
    time = ["--time"] if options.dry_run else []
    measures = measured(sweep.config, [REAL, *sweep.kept], sweep.settings, *time)
    problems = [f"{form}: {costs['error']}" for form, costs in measures["forms"].items() if "error" in costs]
    plan = Plan(sweep, measures)
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
    if not (options.dry_run and options.dataset and options.budgets):
        raise UserError("give a sweep's file; or, with --dry-run, --dataset and --budgets.")
    forms = options.forms or ["real", "jpeg:10", "webp:10", "avif:20", "edges", "edges@64", "text"]
    config = {"dataset": find_dataset(data_dir(), options.dataset)}
    candidates = []
    for form in dict.fromkeys([REAL, *forms]):
        real = None if form in (REAL, "text") else 1
        filled = 0 if form == REAL else "fill"
        keys = {"syn_form": form, "real_per_class": real, "syn_per_class": filled, "augmentation_prob": 0}
        candidates.append(Candidate(form, form, keys))
    rows = tuple(Row(candidate.form, (candidate,)) for candidate in candidates)
    sweep = Sweep(config, rows, tuple(options.budgets), (), (1,), options.settings, "on_demand", Path("outputs"))
    measures = measured(config, [REAL, *sweep.kept], sweep.settings)
    tell(Plan(sweep, measures), [], [])
    failed = [f"{form}: {costs['error']}" for form, costs in measures["forms"].items() if "error" in costs]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    return cli.run(lambda: command(argv))


def command(argv: Sequence[str] | None) -> int:
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
    parser.add_argument(
        "--submit", type=cli.at_least(1), metavar="N", help="start this command N times on SLURM (needs submitit)"
    )
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="of submitit, such as timeout_min=600"
    )
    parser.add_argument("--dataset", metavar="D", help="with --dry-run, without a file: what budgets hold of a dataset")
    parser.add_argument("--settings", default="", help="with --dataset: options of compress/run.py")
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
