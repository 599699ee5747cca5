"""How long a sweep will take and what it will write, from short measurements."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exps.points import Point
from exps.runs import MAIN, call, last_words
from exps.sweep import Candidate, Plan, made_ahead
from utils import cli
from utils.files import write_json
from utils.results.records import load_results


def exemplars(
    of_form: Mapping[str, Any], real_bytes: float, budget: int, keys: Mapping[str, Any], most: int
) -> tuple[int, int]:
    """(real exemplars, exemplars of a form) of a typical class within a budget of bytes.

    of_form: the form's entry of `compress.measure`; keys: real_per_class and syn_per_class; most: images of a class.
    """
    real, synthetic = keys["real_per_class"], keys["syn_per_class"]
    fit = int(budget // real_bytes)
    real = min(fit, most if real is None else real, most)
    if synthetic == 0:
        return real, 0
    left, each = budget - real * real_bytes - of_form["text_bytes"], of_form["bytes"]
    fit = 0 if left < 0 else most if not each else int(left // each)
    return real, max(0, min(fit, most - real, most if synthetic == "fill" else synthetic))


def training_seconds(keys: Mapping[str, Any]) -> tuple[float, float, int]:
    """(seconds of phase 0, of later phases, bytes of a run's folder) of a class order, from one epoch a phase here.

    keys: main.py's.  NaN where the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = {"init_epoch": 1, "epochs": 1, "init_milestones": [], "milestones": [], "seed": keys["seed"][:1]}
        whole_file, short_file = Path(folder) / "whole.json", Path(folder) / "short.json"
        write_json(whole_file, keys)
        write_json(short_file, {**keys, **short})
        whole = call(MAIN, "--config", str(whole_file), "--show-config")
        done = call(MAIN, "--config", str(short_file), f"output_dir={folder}/out", f"phase0_cache={folder}/cache")
        if done.returncode or whole.returncode:
            print(f"the time of {keys['model_name']} is unknown: {last_words(done if done.returncode else whole)}")
            return math.nan, math.nan, 0
        (order,) = load_results(Path(folder) / "out").runs
        epochs = json.loads(whole.stdout)
        phases = [phase.seconds for phase in order.phases]
        other = sum(seconds.total - seconds.train for seconds in phases)
        first = phases[0].train * epochs["init_epoch"]
        later = sum(seconds.train for seconds in phases[1:]) * epochs["epochs"] + other
        size = sum(file.stat().st_size for file in (Path(folder) / "out").rglob("*") if file.is_file())
        return first, later, size


HEADER = ("form", "p", "bytes each", "budget", "R + S", "bytes per class", "units per class", "copies", "disk, MB")


def tell(plan: Plan, known: Sequence[Point], todo: Sequence[Point]) -> None:
    """Print what a dry run of `exps.pareto` tells.  known: all runs, todo: those to be done."""
    sweep, measures = plan.sweep, plan.measures
    classes, most, real_bytes = measures["classes"], measures["images_per_class"], measures["forms"]["real"]["bytes"]
    print(
        f"{sweep.config['dataset']}: {classes} classes of at least {most} train images, {real_bytes:,.0f} bytes each "
        f"(means of {measures['images']} images)\n"
    )
    rows: list[tuple[str, ...]] = []
    made: dict[str, tuple[int, int]] = {}  # form -> copies, images
    for candidate in sweep.candidates:
        if "error" in measures["forms"][candidate.keys["syn_form"]]:
            continue
        for budget in sweep.budgets:
            rows.append(_row(plan, candidate, budget))
        form, images, number = _copies(plan, candidate)
        made[form] = max(made.get(form, (0, 0)), (images * number, images))
    legend = (
        "R + S: real exemplars and those of the form. 1 unit: the raw bits of one real image; -: not in the paper.\n"
        "Copies: of all train images where p is above 0 or the form is a codec, else of the chosen exemplars; all runs "
        "share them."
    )
    cli.show_table(HEADER, rows, [legend], left=2)
    seconds = sum(number * measures["forms"][form].get("seconds_per_copy", 0.0) for form, (number, _) in made.items())
    disk = sum(
        number * measures["forms"][form]["copy_bytes"] + images * measures["forms"][form]["bytes"]
        for form, (number, images) in made.items()
    )
    if not known:
        return
    copies = f"copies: up to {sum(number for number, _ in made.values()):,}, {_hours(seconds)}"
    training = 0.0
    for method in sweep.methods:
        method_points = [point for point in todo if point.config["model_name"] == method]
        if method_points:
            first, later, size = training_seconds(_keys_of_estimate(plan, method))
            orders = sum(len(point.seeds) for point in method_points)
            alike = {(point.phase0, seed) for point in method_points for seed in point.seeds}
            training += first * len(alike) + later * orders
            disk += size * orders
    print(f"\nruns: {len(todo)} of {len(known)} to do, {len(sweep.seeds)} class orders each")
    if any(len(row.candidates) > 1 for row in sweep.rows):
        print("of rows that are tuned, only the runs on held-out train pictures are counted; one more each is tested")
    print(f"{copies}; training: {_hours(training)}, one run at a time; on this machine")
    print(f"disk: up to {disk / 1e6:,.0f} MB\ndry run: nothing was kept")


def _row(plan: Plan, candidate: Candidate, budget: int) -> tuple[str, ...]:
    measures = plan.measures
    form_costs, real_costs = measures["forms"][candidate.keys["syn_form"]], measures["forms"]["real"]
    real, synthetic = exemplars(form_costs, real_costs["bytes"], budget, candidate.keys, measures["images_per_class"])
    text_bytes = form_costs["text_bytes"] if synthetic else 0
    used = real * real_costs["bytes"] + synthetic * form_costs["bytes"] + text_bytes
    units = "-" if synthetic and form_costs["units"] is None else f"{real + synthetic * (form_costs['units'] or 0):.1f}"
    _, images, number = _copies(plan, candidate, synthetic)
    disk = f"{images * number * form_costs['copy_bytes'] / 1e6:,.1f}"
    p, each = f"{candidate.probability:g}", f"{form_costs['bytes']:,.0f}"
    kept = f"{real} + {synthetic}"
    return candidate.label, p, each, f"{budget:,}", kept, f"{used:,.0f}", units, f"{images * number:,}", disk


def _copies(plan: Plan, candidate: Candidate, synthetic: int | None = None) -> tuple[str, int, int]:
    """(form, images of which copies are made, copies of each).  synthetic: exemplars of a class; None: at most."""
    sweep, measures, form = plan.sweep, plan.measures, candidate.keys["syn_form"]
    if form == "real":
        return form, 0, 0
    number = candidate.keys.get("augmentations_per_image", sweep.nb_copies)
    number = 1 if measures["forms"][form]["deterministic"] else number
    if made_ahead(sweep, candidate, measures):
        return form, measures["train_images"], number
    most = measures["images_per_class"]
    if synthetic is None:
        form_costs, real_bytes = measures["forms"][form], measures["forms"]["real"]["bytes"]
        counts = [exemplars(form_costs, real_bytes, budget, candidate.keys, most)[1] for budget in sweep.budgets]
        # class orders choose different exemplars, so that each may bring copies of its own
        synthetic = max(counts) * len(sweep.seeds) * max(len(sweep.methods), 1)
    return form, min(most, synthetic) * measures["classes"], number


def _keys_of_estimate(plan: Plan, method: str) -> dict[str, Any]:
    """main.py's keys of a run with as many exemplars as the mean of all rows and budgets, all of them real images.

    It needs no copies, and runs where a budget does not hold a real image.
    """
    sweep, forms, most = plan.sweep, plan.measures["forms"], plan.measures["images_per_class"]
    candidates = [candidate for candidate in sweep.candidates if "error" not in forms[candidate.keys["syn_form"]]]
    numbers = [
        sum(exemplars(forms[candidate.keys["syn_form"]], forms["real"]["bytes"], budget, candidate.keys, most))
        for candidate in candidates
        for budget in sweep.budgets
    ]
    number = max(1, round(sum(numbers) / max(1, len(numbers))))
    memory = {"memory_per_class": number, "real_per_class": number, "syn_per_class": 0, "fixed_memory": True}
    return {**sweep.config, **memory, "augmentation_prob": 0, "model_name": method, "seed": list(sweep.seeds)}


def _hours(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else f"about {seconds / 3600:.2f} hours"
