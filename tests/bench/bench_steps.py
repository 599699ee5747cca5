"""What few steps cost: python tests/bench/bench_steps.py --data-dir data --dataset MNIST [--train]

Two copies of test pictures, which neither the generator nor the classifier has seen, for each setting:

- edges: share of a prompt's edge pixels with an edge of the copy at most 2 pixels away;
- class: share of copies that a small network, trained on the real train pictures, puts into their class;
- variety: mean difference between two copies of one prompt, in grey levels of 255;
- seconds a copy, of the processor's time on one thread, in batches of --batch-size.

--train adds what counts: the average incremental accuracy of main.py (the head's) with copies made on demand, mean and
standard error over --orders, and its difference from the first setting, paired by class order.  A setting is options of
compress/run.py, with or without keys of main.py: "--sampler ddim --steps 4", "--steps 20 augmentation_prob=0.4",
"syn_per_class=0".  What is finished is kept in --output, so a study that was killed goes on when it is started again.
There are also table.md, table.csv and figure.png.

Another model and dataset, such as the small ControlNet of exps/README.md:

    python tests/bench/bench_steps.py --train --dataset CIFAR10-120 --output outputs/bench_steps_cifar10 \\
        --model "--model ControlNet/models/cldm_cifar10.safetensors --size 64" --config exps/cifar10.json model_name=wa
"""

import argparse
import csv
import io
import json
import re
import shlex
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from compress.forms import pixels
from compress.generators import build
from compress.options import parse_settings
from compress.quality import batch, predicted, trained
from exps.runs import MAIN, call, for_each, last_words, threads
from tests.bench.bench_tiny_model import edges_found
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.results.records import load_results

ROOT = Path(__file__).resolve().parents[2]
GRID = [
    f"--sampler {sampler} --steps {steps} --guidance {guidance}"
    for sampler in ("ddim", "ddim-trailing", "dpm++2m", "unipc", "lcm", "tcd")
    for steps in (1, 2, 4, 8, 20)
    for guidance in (1, 9)
]
TRAINED = [
    *(
        f"--sampler {sampler} --steps {steps} --guidance {guidance}"
        for sampler, steps, guidance in (
            *(("ddim", 20, 9), ("ddim", 20, 1), ("ddim", 8, 9), ("ddim", 4, 9), ("ddim", 4, 1), ("ddim", 2, 9)),
            *(("dpm++2m", 8, 9), ("dpm++2m", 4, 9), ("dpm++2m", 4, 1), ("dpm++2m", 2, 9), ("dpm++2m", 2, 1)),
            *(("dpm++2m", 1, 9), ("dpm++2m", 1, 1)),
        )
    ),
    "syn_per_class=0",
]
"""Of --train.  The first is the paper's, to which the others are compared; the last has no copies."""

DIGITS = ("memory_per_class=20", "real_per_class=1", "syn_per_class=8", "nme=false")
"""Keys of main.py beside exps/demo.json's: nearly all of the memory is copies, and without them accuracy falls by 14
points.  (WA, four and three classes a phase, is no use: it falls by half a point.)"""


class Setting(NamedTuple):
    """One row.  text: as it was given; options: of compress/run.py; keys: of main.py, "key=value"."""

    text: str
    options: str
    keys: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> "Setting":
        words = shlex.split(text)
        keys = tuple(word for word in words if re.match(r"[a-z_0-9]+=", word))
        return cls(text, shlex.join(word for word in words if word not in keys), keys)

    @property
    def name(self) -> str:
        return "-".join(re.findall(r"[A-Za-z0-9.]+", self.text))

    @property
    def measures_copies(self) -> bool:
        """Whether it differs from others in what the generator makes."""
        return not self.keys


class Study:
    """options: the command line's, see `main`."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.paths = DatasetPaths(Path(options.data_dir), options.dataset)
        self.texts = self.paths.class_texts()
        labels = self.paths.classes()
        real = [(image, i) for i, label in enumerate(labels) for image in self.paths.images(label)]
        self.held_out = [
            (image, i) for i, label in enumerate(labels) for image in self.paths.images(label, "test")[: options.images]
        ]
        self.labels = labels
        targets = torch.tensor([i for _, i in real])
        self.classifier = trained(batch(pixels(image) for image, _ in real), targets, len(labels), options.epochs)
        self.real_accuracy = self.agreement([pixels(image) for image, _ in self.held_out])

    def agreement(self, pictures: Sequence[np.ndarray]) -> float:
        """Share of the held-out images' pictures, one or more of each in turn, in their class; in percent."""
        targets = np.repeat([i for _, i in self.held_out], len(pictures) // len(self.held_out))
        return 100 * float((predicted(self.classifier, pictures) == targets).mean())

    def copies(self, setting: str) -> tuple[float, float, float, float]:
        """(edges, class, variety, seconds a copy) of two copies of each held-out picture."""
        words = f"{self.options.model} --batch-size {self.options.batch_size} {setting}"
        form, machine, _, _ = parse_settings(words, self.options.resolution)
        generator = build.make_generator(form, machine, torch.device("cpu"), "fp32")
        requests = []
        for image, i in self.held_out:
            text = self.texts[self.labels[i]]
            requests += form.requests(image, form.encode(pixels(image), text), text, [0, 1])
        made, seconds = [], 0.0
        for start in range(0, len(requests), generator.batch_size):
            part = requests[start : start + generator.batch_size]
            if start == 0:
                generator(part)  # texts are encoded and weights packed once
            began = time.process_time()
            made += generator(part)
            seconds += time.process_time() - began
        edges = edges_found([request.condition.hint for request in requests], made)
        variety = np.mean([abs(a.astype(float) - b).mean() for a, b in zip(made[::2], made[1::2], strict=True)])
        return 100 * edges, self.agreement(made), float(variety), seconds / len(made)


class Training:
    """The runs of main.py, one a setting, with all class orders in it.  options: the command line's, see `main`."""

    def __init__(self, options: argparse.Namespace, settings: Sequence[Setting]):
        self.options, self.settings = options, settings
        self.output = Path(options.output).resolve()
        paths = DatasetPaths(Path(options.data_dir).resolve(), options.dataset)
        data = self.output / "data" / options.dataset  # the same images, with copies of its own
        data.mkdir(parents=True, exist_ok=True)
        for name in ("train", "test", "class_names.json"):
            if (paths.root / name).exists() and not (data / name).exists():
                (data / name).symlink_to(paths.root / name)

    def keys(self, setting: Setting) -> list[str]:
        """What main.py is given, but for folders."""
        options = self.options
        made = f"{options.model} --resolution {options.resolution} --batch-size 16 {setting.options}"
        ours = options.overrides or (DIGITS if options.config == "exps/demo.json" else ())
        return [
            *("--config", str(ROOT / options.config), f"dataset={options.dataset}", "regenerate=on_demand"),
            *("augmentation_prob=0", f"regenerate_options={made}", *ours, *setting.keys),
            f"seed={json.dumps(options.orders)}",
        ]

    def folder(self, setting: Setting) -> Path:
        """Of a run's results; another one where the keys are others."""
        return self.output / f"{setting.name}-{zlib.crc32(json.dumps(self.keys(setting)).encode()):08x}"

    def scores(self, setting: Setting) -> dict[int, float]:
        """Average incremental accuracy by class order, in percent; empty where the run is not finished."""
        try:
            orders = [order for order in load_results(self.folder(setting)).runs if order.finished]
        except UserError:
            return {}
        scores = {order.seed: order.cnn.average_incremental_accuracy for order in orders}
        return scores if len(scores) == len(self.options.orders) else {}

    def carry_out(self) -> None:
        """Make the runs that are not finished; one first, which trains phase 0 for all.  Exits where one fails."""
        todo, jobs = [setting for setting in self.settings if not self.scores(setting)], self.options.jobs
        for part in (todo[-1:], todo[:-1]):
            runs = {}
            for setting in part:
                folder = self.folder(setting)
                where = [f"output_dir={folder}", f"variant={folder.name}", f"data_dir={self.output / 'data'}"]
                where += [f"phase0_cache={self.output / 'phase0_cache'}"]
                runs[setting.text] = [*self.keys(setting), *where]
            done = for_each(runs.values(), lambda words: call(MAIN, *words, **threads(jobs)), jobs)
            failed = {name: last_words(run) for name, run in zip(runs, done, strict=True) if run.returncode}
            if failed:
                raise SystemExit("\n".join(f"{name}: {words}" for name, words in failed.items()))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, nan for one value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(error)


MEASURES = ("edges %", "class %", "variety", "s a copy")


def measured(options: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, tuple[float, ...]]:
    """MEASURES by a setting's text; those that an earlier, killed study has written are read."""
    file = Path(options.output) / "copies.json"
    asked = [options.dataset, options.resolution, options.model, options.images, options.batch_size, options.epochs]
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = known.get("rows", {}) if known.get("asked") == asked else {}
    todo = [setting for setting in settings if setting.measures_copies and setting.text not in rows]
    if todo:
        study = Study(options)
        print(f"real test pictures in the right class: {study.real_accuracy:.1f} %", file=sys.stderr)
    for setting in todo:
        rows[setting.text] = study.copies(setting.options)
        write_json(file, {"asked": asked, "rows": rows})
    return {text: tuple(row) for text, row in rows.items()}


def plot(rows: Sequence[tuple], file: Path) -> None:
    """Accuracy against seconds a copy.  rows: (Setting, seconds, accuracy, standard error)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds: dict[tuple[str, str], list] = {}
    for setting, seconds, mean, error in rows:
        words = dict(zip(*[iter(shlex.split(setting.options))] * 2, strict=True)) if setting.options else {}
        if not words:
            axes.axhline(mean, color="0.5", linestyle=":", label=setting.text)
        elif not setting.keys:
            kind = words.get("--sampler", "ddim"), words.get("--guidance", "")
            kinds.setdefault(kind, []).append((seconds, mean, error, words.get("--steps", "")))
    colours = {sampler: f"C{i}" for i, sampler in enumerate(dict.fromkeys(sampler for sampler, _ in kinds))}
    for (sampler, guidance), points in kinds.items():
        x, y, error, steps = zip(*sorted(points), strict=True)
        style = {"linestyle": "--", "markerfacecolor": "white"} if guidance == "1" else {"linestyle": "-"}
        label = f"{sampler}, guidance {guidance}"
        axes.errorbar(x, y, error, marker="o", capsize=2, color=colours[sampler], label=label, **style)
        for a, b, text in zip(x, y, steps, strict=True):
            axes.annotate(text, (a, b), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds a copy (numbers: steps)")
    axes.set_ylabel("average incremental accuracy, %")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--dataset", default="MNIST")
    parser.add_argument("--resolution", default="high")
    parser.add_argument("--model", default="--model tiny --size 64", help="options of compress/run.py for all settings")
    parser.add_argument("--settings", action="append", help="--settings='--steps 4': one (may be repeated) [all]")
    parser.add_argument("--images", type=int, default=4, help="test pictures of each class")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6, help="of the classifier")
    parser.add_argument("--train", action="store_true", help="also the average incremental accuracy")
    parser.add_argument("--config", default="exps/demo.json")
    parser.add_argument("--orders", type=int, nargs="+", default=[1993, 1994, 1995])
    parser.add_argument("--jobs", type=int, default=1, help="runs of main.py at a time")
    parser.add_argument("--output", default="outputs/bench_steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of main.py for all settings")
    return parser.parse_intermixed_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    settings = [Setting.read(text) for text in options.settings or (TRAINED if options.train else GRID)]
    of_copies = measured(options, settings)
    training = Training(options, settings) if options.train else None
    if training:
        training.carry_out()
    header = ["setting", *MEASURES, *["accuracy %", "SE", "against the first", "SE"] * bool(training)]
    table, points = [], []
    for setting in settings:
        measures = of_copies.get(setting.text) if setting.measures_copies else None
        row = [f"`{setting.text}`", *([f"{v:.1f}" for v in measures[:3]] if measures else [""] * 3)]
        row.append(f"{measures[3]:.3f}" if measures else "")
        if training:
            scores, reference = training.scores(setting), training.scores(settings[0])
            mean, error = mean_and_error(list(scores.values()))
            gain = mean_and_error([scores[seed] - reference[seed] for seed in scores])
            row += [f"{mean:.1f}", f"{error:.1f}", *([f"{gain[0]:+.1f}", f"{gain[1]:.1f}"] if table else ["", ""])]
            points.append((setting, measures[3] if measures else float("nan"), mean, error))
        table.append(row)
    text = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *table]) + "\n"
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "table.md", text)
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([header, *table])
    write_text(output / "table.csv", lines.getvalue())
    if training:
        plot(points, output / "figure.png")
    print(text, end="")


if __name__ == "__main__":
    main()
