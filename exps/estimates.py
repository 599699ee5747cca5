"""What a dry run of a sweep tells: what budgets hold, and how long the runs will take and what they will write."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from exps.grid import Point, checked_keys
from exps.runs import MAIN, call, last_words
from exps.sweep import REAL, Candidate, Plan
from utils import cli
from utils.files import write_json
from utils.results.records import load_results

HEADER = ("form", "p", "bytes each", "budget", "R + S", "bytes per class", "units per class", "copies", "disk, MB")
LEGEND = (
    "R + S: real exemplars and those of the form. 1 unit: the raw bits of one real image; -: not in the paper.\n"
    "Copies: of all train images where p is above 0 or the form is a codec, else of the chosen exemplars; all runs "
    "share them."
)


def exemplars(plan: Plan, candidate: Candidate, budget: int) -> tuple[int, int]:
    """(real exemplars, exemplars of the form) of a typical class within a budget of bytes."""
    costs, most = plan.costs(candidate), plan.measures["images_per_class"]
    real, synthetic = candidate.keys["real_per_class"], candidate.keys["syn_per_class"]
    real_bytes = plan.measures["forms"][REAL]["bytes"]
    real = min(int(budget // real_bytes), most if real is None else real, most)
    if synthetic == 0:
        return real, 0
    left, each = budget - real * real_bytes - costs["text_bytes"], costs["bytes"]
    fit = 0 if left < 0 else most if not each else int(left // each)
    return real, max(0, min(fit, most - real, most if synthetic == "fill" else synthetic))


def copies(plan: Plan, candidate: Candidate, synthetic: int) -> tuple[int, int]:
    """(images of which copies are made, copies of each).  synthetic: exemplars of a class."""
    if candidate.syn_form == REAL:
        return 0, 0
    number = 1 if plan.costs(candidate)["deterministic"] else plan.nb_copies(candidate)
    if plan.is_made_ahead(candidate):
        return plan.measures["train_images"], number
    return min(plan.measures["images_per_class"], synthetic) * plan.measures["classes"], number


def training_seconds(keys: Mapping[str, Any]) -> tuple[float, float, int]:
    """(seconds of phase 0, of later phases, bytes of a run's folder) of a class order, from one epoch a phase here.

    keys: main.py's.  NaN where the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = {"init_epoch": 1, "epochs": 1, "init_milestones": [], "milestones": [], "seed": keys["seed"][:1]}
        file = Path(folder) / "short.json"
        write_json(file, {**keys, **short})
        done = call(MAIN, "--config", str(file), f"output_dir={folder}/out", f"phase0_cache={folder}/cache")
        if done.returncode:
            print(f"the time of {keys['model_name']} is unknown: {last_words(done)}")
            return math.nan, math.nan, 0
        (order,) = load_results(Path(folder) / "out").runs
        size = sum(file.stat().st_size for file in (Path(folder) / "out").rglob("*") if file.is_file())
    config = checked_keys(keys)
    train = [phase.seconds.train for phase in order.phases]
    other = sum(phase.seconds.total for phase in order.phases) - sum(train)
    return train[0] * config["init_epoch"], sum(train[1:]) * config["epochs"] + other, size


def tell(plan: Plan, known: Sequence[Point], todo: Sequence[Point]) -> None:
    """Print what a dry run of `exps.pareto` tells.  known: all runs, todo: those to be done."""
    sweep, measures = plan.sweep, plan.measures
    real_bytes = measures["forms"][REAL]["bytes"]
    print(
        f"{sweep.config['dataset']}: {measures['classes']} classes of at least {measures['images_per_class']} train "
        f"images, {real_bytes:,.0f} bytes each (means of {measures['images']} images)\n"
    )
    rows = [_row(plan, candidate, budget) for candidate in plan.candidates for budget in sweep.budgets]
    cli.show_table(HEADER, rows, [LEGEND], left=2)
    if not known:
        return
    made: dict[str, tuple[int, int]] = {}  # form -> copies, images
    for candidate in plan.candidates:
        # Class orders choose different exemplars, so that each may bring copies of its own.
        most = max(exemplars(plan, candidate, budget)[1] for budget in sweep.budgets)
        images, number = copies(plan, candidate, most * len(sweep.seeds) * len(sweep.methods))
        made[candidate.syn_form] = max(made.get(candidate.syn_form, (0, 0)), (images * number, images))
    making, training, disk = 0.0, 0.0, 0.0
    for form, (number, images) in made.items():
        costs = measures["forms"][form]
        making += number * costs.get("seconds_per_copy", 0.0)
        disk += number * costs["copy_bytes"] + images * costs["bytes"]
    for method in sweep.methods:
        if points := [point for point in todo if point.config["model_name"] == method]:
            first, later, size = training_seconds(_keys_of_estimate(plan, method))
            orders = [(point.phase0, seed) for point in points for seed in point.seeds]
            training += first * len(set(orders)) + later * len(orders)
            disk += size * len(orders)
    print(f"\nruns: {len(todo)} of {len(known)} to do, {len(sweep.seeds)} class orders each")
    if any(len(row.candidates) > 1 for row in sweep.rows):
        print("of rows that are tuned, only the runs on held-out train pictures are counted; one more each is tested")
    print(f"copies: up to {sum(number for number, _ in made.values()):,}, {_hours(making)}; ", end="")
    print(f"training: {_hours(training)}, one run at a time; on this machine")
    print(f"disk: up to {disk / 1e6:,.0f} MB\ndry run: nothing was kept")


def _row(plan: Plan, candidate: Candidate, budget: int) -> tuple[str, ...]:
    costs, real_bytes = plan.costs(candidate), plan.measures["forms"][REAL]["bytes"]
    real, synthetic = exemplars(plan, candidate, budget)
    used = real * real_bytes + synthetic * costs["bytes"] + (costs["text_bytes"] if synthetic else 0)
    units = "-" if synthetic and costs["units"] is None else f"{real + synthetic * (costs['units'] or 0):.1f}"
    images, number = copies(plan, candidate, synthetic)
    disk = f"{images * number * costs['copy_bytes'] / 1e6:,.1f}"
    p, each, kept = f"{candidate.probability:g}", f"{costs['bytes']:,.0f}", f"{real} + {synthetic}"
    return candidate.label, p, each, f"{budget:,}", kept, f"{used:,.0f}", units, f"{images * number:,}", disk


def _keys_of_estimate(plan: Plan, method: str) -> dict[str, Any]:
    """main.py's keys of a run with as many exemplars as the mean of all rows and budgets, all of them real images.

    It needs no copies, and runs where a budget does not hold a real image.
    """
    sweep = plan.sweep
    numbers = [sum(exemplars(plan, candidate, budget)) for candidate in plan.candidates for budget in sweep.budgets]
    number = max(1, round(fmean(numbers)))
    memory = {"memory_per_class": number, "real_per_class": number, "syn_per_class": 0, "fixed_memory": True}
    return {**sweep.config, **memory, "augmentation_prob": 0, "model_name": method, "seed": list(sweep.seeds)}


def _hours(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else f"about {seconds / 3600:.2f} hours"
