"""`make demo`: the whole path on real handwritten digits, with the commands that a user would type.

Some digits become prompts and copies (compress/run.py); a dry run says what 1,200 bytes of a class hold; and the
equal-bytes sweep (exps.pareto) learns 5 phases of 2 classes with that memory in each of several forms.  Everything that
is there already is reused.  SEEDS in the environment chooses the class orders: SEEDS="1993 1994 1995" make demo.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from exps.sweep import read
from utils import cli
from utils.cli import nb_cores
from utils.errors import UserError

SWEEP = Path("exps/pareto_demo.json")
OUTPUT = Path("outputs/demo")


def run(command: str) -> None:
    """Show a command and run it with this Python.  Raises UserError where it fails."""
    print(f"\n$ python {command}", flush=True)
    began = time.time()
    code = subprocess.run([sys.executable, *shlex.split(command)], check=False).returncode
    if code:
        raise UserError(f"that command left with exit code {code}")
    print(f"({time.time() - began:.0f} s)", flush=True)


def demo(seeds: list[int]) -> None:
    """Forms of exemplars at equal bytes."""
    sweep = read(SWEEP, OUTPUT)
    settings, where = sweep.settings, f"--dataset {sweep.config['dataset']}"
    copies = sweep.config["augmentations_per_image"]
    run("-m utils.curate digits")
    run(f"compress/run.py {where} --limit 2 --seeds {copies} {settings}")
    run(f"-m exps.report.gallery {where} --copies {copies} {OUTPUT / 'exemplars.png'}")
    forms = ",".join(dict.fromkeys([*sweep.kept, "webp:5@14", "edges@14"]))
    budget = ",".join(map(str, sweep.budgets))
    run(f"-m exps.pareto --dry-run {where} --budgets {budget} --forms {forms} --settings='{settings}'")
    jobs = min(3, nb_cores())  # runs side by side
    run(f"-m exps.pareto {SWEEP} --seeds {','.join(map(str, seeds))} --output {OUTPUT} --jobs {jobs}")
    print(f"\n{what_it_says(len(seeds))}\n")
    print(
        f"{OUTPUT}/: report.html (for a browser), table.md, table.csv, exemplars.png (image | edge map | copies)\n"
        "Read on: docs/results.md (more forms, budgets, class orders and data sets), docs/forms.md (what a form is)"
    )
    check_accuracies(OUTPUT / "table.csv", sweep.expected)


def check_accuracies(table: Path, expected: dict[str, Any]) -> None:
    """Raises UserError where an accuracy in the sweep's table falls short of the recorded one by more than allowed.

    expected: seed, the class order that was recorded (where the table has it not, nothing is checked); accuracies,
    form -> classifier -> average incremental accuracy in %; tolerance, classifier -> points that machines may differ.
    """
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == str(expected["seed"])]
    short = []
    for row in rows:
        form, classifier, average = row["form"], row["classifier"], float(row["average_incremental_accuracy"])
        recorded = expected["accuracies"][form][classifier]
        if average < recorded - expected["tolerance"][classifier]:
            short.append(f"{form} ({classifier}) {average:.1f} instead of {recorded}")
    if short:
        raise UserError(f"the demo learns less than recorded in {SWEEP}: {', '.join(short)}")


def what_it_says(orders: int) -> str:
    """What the sentences above, which the sweep computed, can and can't say.  orders: number of class orders."""
    caution = f"{orders} class orders: a difference below twice its standard error, in parentheses, says nothing."
    if orders == 1:
        caution = (
            "One class order: differences of a few points say nothing, and of one order there is no standard error.\n"
            'SEEDS="1993 1994 1995" make demo takes three, and reuses this one.'
        )
    return (
        f"{caution}\nThese are small digits, and the generator was trained on 250 others of each class: what wins here "
        "need not win on photographs."
    )


def main() -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    argparse.ArgumentParser(prog="python -m exps.demo", description=__doc__.partition("\n")[0]).parse_args()
    seeds = os.environ.get("SEEDS", "1993").replace(",", " ").split()
    return cli.run(lambda: demo([int(seed) for seed in seeds]))


if __name__ == "__main__":
    sys.exit(main())
