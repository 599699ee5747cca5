"""How long a sweep will take and what it will write, from short measurements."""

import csv
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exps.runs import MAIN, call, last_words
from utils.errors import UserError
from utils.results import report


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

    keys: main.py's, of a run with real exemplars alone.  NaN where the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = {"init_epoch": 1, "epochs": 1, "init_milestones": [], "milestones": [], "seed": keys["seed"][:1]}
        whole_file, short_file = Path(folder) / "whole.json", Path(folder) / "short.json"
        report.write_json(whole_file, keys)
        report.write_json(short_file, {**keys, **short})
        whole = call(MAIN, "--config", str(whole_file), "--show-config")
        done = call(MAIN, "--config", str(short_file), f"output_dir={folder}/out", f"phase0_cache={folder}/cache")
        if done.returncode or whole.returncode:
            print(f"the time of {keys['model_name']} is unknown: {last_words(done if done.returncode else whole)}")
            return math.nan, math.nan, 0
        (run,) = report.load_results(Path(folder) / "out")["runs"]
        epochs = json.loads(whole.stdout)
        phases = [phase["seconds"] for phase in run["phases"]]
        other = [seconds["total"] - seconds["train"] for seconds in phases]
        first = phases[0]["train"] * epochs["init_epoch"]
        later = sum(seconds["train"] for seconds in phases[1:]) * epochs["epochs"] + sum(other)
        size = sum(file.stat().st_size for file in (Path(folder) / "out").rglob("*") if file.is_file())
        return first, later, size


def class_order_hours(config: Mapping[str, Any]) -> tuple[float, list[str]]:
    """(hours of one class order here, what they leave out), from a run with two epochs of each kind.

    config: main.py's, checked and whole.  Raises UserError where that run fails.
    """
    epochs = [key for key, value in config.items() if key in ("epochs", "init_epoch") or key.endswith("_epochs")]
    short = {key: min(2, config[key]) for key in epochs}
    short |= {"init_milestones": [], "milestones": [], "seed": config["seed"][:1], "prefix": "", "compile": False}
    notes = []
    if config["syn_per_class"] or config["augmentation_prob"]:
        short |= {"real_per_class": None, "syn_per_class": 0, "augmentation_prob": 0.0}
        notes.append("without copies, which compress/run.py --dry-run tells")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "short.json"
        report.write_json(file, {**config, **short, "output_dir": f"{folder}/out", "phase0_cache": f"{folder}/cache"})
        done = call(MAIN, "--config", str(file))
        if done.returncode:
            raise UserError(last_words(done))
        (run,) = report.load_results(Path(folder) / "out")["runs"]
        seconds = sum(phase["seconds"]["total"] - phase["seconds"]["train"] for phase in run["phases"])
        (log,) = Path(folder).rglob("epochs.csv")
        with log.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    later = ["epochs", *(key for key in epochs if key not in ("epochs", "init_epoch"))]
    for phase in {row["phase"] for row in rows}:
        last = {row["stage"]: float(row["seconds"]) for row in rows if row["phase"] == phase}  # the second epoch's
        keys = ["init_epoch"] if phase == "0" else later
        if len(keys) != len(last):
            keys = [keys[0]] * len(last)
        seconds += sum(config[key] * each for key, each in zip(keys, last.values(), strict=True))
    return seconds / 3600, notes


def tell(sweep: Any, measures: Mapping[str, Any], points: Sequence[Any], todo: Sequence[Any]) -> None:
    """Print what a dry run of `exps.pareto` tells."""
    classes, most, real_bytes = measures["classes"], measures["images_per_class"], measures["forms"]["real"]["bytes"]
    print(
        f"{sweep.config['dataset']}: {classes} classes of at least {most} train images, {real_bytes:,.0f} bytes each\n"
    )
    print(
        "| form | bytes an exemplar | "
        + " | ".join(f"{budget:,} bytes: real + form" for budget in sweep.budgets)
        + " |"
    )
    print("| --- " * (2 + len(sweep.budgets)) + "|")
    copies, seconds, disk = 0, 0.0, 0.0
    for label, keys in sweep.forms.items():
        of_form = measures["forms"][keys["syn_form"]]
        if "error" in of_form:
            continue
        counts = [exemplars(of_form, real_bytes, budget, keys, most) for budget in sweep.budgets]
        cells = [f"{real} + {synthetic}" for real, synthetic in counts]
        print(f"| {label} | {of_form['bytes']:,.0f} | " + " | ".join(cells) + " |")
        if keys["syn_form"] == "real":
            continue
        ahead = sweep.copies == "ahead" or (of_form["deterministic"] and not of_form["needs_model"])
        # on demand, class orders choose different exemplars, so that each may bring copies of its own
        chosen = min(most, max(synthetic for _, synthetic in counts) * len(sweep.seeds) * len(sweep.methods))
        images = measures["train_images"] if ahead else chosen * classes
        number = images * (1 if of_form["deterministic"] else keys.get("augmentations_per_image", sweep.nb_copies))
        copies += number
        seconds += number * of_form.get("seconds_per_copy", 0.0)
        disk += number * of_form["copy_bytes"] + images * of_form["bytes"]
    training = 0.0
    for method in sweep.methods:
        of_method = [point for point in todo if point.method == method]
        if of_method:
            keys = next((p.keys for p in points if p.method == method and p.form == "real"), of_method[0].keys)
            if keys.get("regenerate") == "on_demand":
                keys = {**keys, "real_per_class": None, "syn_per_class": 0}
            first, later, size = training_seconds(keys)
            training += len(sweep.seeds) * (first + later * len(of_method))
            disk += size * len(sweep.seeds) * len(of_method)
    print(f"\nruns: {len(todo)} of {len(points)} to do, {len(sweep.seeds)} class orders each")
    print(
        f"copies: up to {copies:,}, {_hours(seconds)}; training: {_hours(training)}, one run at a time; on this machine"
    )
    print(f"disk: up to {disk / 1e6:,.0f} MB\ndry run: nothing was kept")


def _hours(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else f"about {seconds / 3600:.2f} hours"
