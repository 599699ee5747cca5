"""What few steps cost: python tests/bench/bench_steps.py --data-dir data --dataset MNIST [--train]

Two copies of test pictures, which neither the generator nor the classifier has seen, for each setting:

- edges: share of a prompt's edge pixels with an edge of the copy at most 2 pixels away;
- class: share of copies that a small network, trained on the real train pictures, puts into their class;
- variety: mean difference between two copies of one prompt, in grey levels of 255;
- seconds a copy, of the processor's time on one thread, in batches of --batch-size.

--train adds what counts: the average incremental accuracy of main.py on --config, with copies made on demand, mean and
standard error over --orders.  That takes minutes a setting and class order.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from compress.forms import pixels
from compress.generators import build
from compress.measures import batch, edges_found, predicted, trained
from compress.options import parse_settings
from utils.data.paths import DatasetPaths

ROOT = Path(__file__).resolve().parents[2]
GRID = [
    f"--sampler {sampler} --steps {steps} --guidance {guidance}"
    for sampler in ("ddim", "ddim-trailing", "dpm++2m", "unipc", "lcm", "tcd")
    for steps in (1, 2, 4, 8, 20)
    for guidance in (1, 9)
]


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

    def accuracy(self, setting: str) -> tuple[float, float]:
        """Average incremental accuracy with these copies: mean and standard error over the class orders."""
        with tempfile.TemporaryDirectory(prefix="steps") as folder:
            settings = f"{self.options.model} --resolution {self.options.resolution} --batch-size 16 {setting}"
            command = [
                *(sys.executable, str(ROOT / "main.py"), "--config", self.options.config),
                *(f"data_dir={Path(self.options.data_dir).resolve()}", f"dataset={self.options.dataset}"),
                *("regenerate=on_demand", "augmentation_scope=exemplars", f"regenerate_options={settings}"),
                *("variant=bench-steps", f"seed={json.dumps(self.options.orders)}", f"output_dir={folder}"),
            ]
            done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
            for kind in ("edge_maps", "exemplars"):
                shutil.rmtree(self.paths.root / f"{kind}-bench-steps", ignore_errors=True)
            if done.returncode:
                raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            results = json.loads((Path(folder) / "results.json").read_bytes())
        values = [run["cnn"]["average_incremental_accuracy"] for run in results["runs"]]
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return float(np.mean(values)), float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--dataset", default="MNIST")
    parser.add_argument("--resolution", default="high")
    parser.add_argument("--model", default="--model tiny --size 64", help="options of compress/run.py for all settings")
    parser.add_argument("--settings", action="append", help="options of one setting (may be repeated) [the grid]")
    parser.add_argument("--images", type=int, default=4, help="test pictures of each class")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6, help="of the classifier")
    parser.add_argument("--train", action="store_true", help="also the average incremental accuracy")
    parser.add_argument("--config", default="exps/demo.json")
    parser.add_argument("--orders", type=int, nargs="+", default=[1993])
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options)
    print(f"real test pictures in the right class: {study.real_accuracy:.1f} %")
    print("| setting | edges % | class % | variety | s a copy |" + " accuracy % |" * options.train)
    print("|---|---|---|---|---|" + "---|" * options.train)
    for setting in options.settings or GRID:
        edges, right, variety, seconds = study.copies(setting)
        row = f"| `{setting}` | {edges:.1f} | {right:.1f} | {variety:.1f} | {seconds:.3f} |"
        if options.train:
            row += " {:.1f} ± {:.1f} |".format(*study.accuracy(setting))
        print(row, flush=True)


if __name__ == "__main__":
    main()
