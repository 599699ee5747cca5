"""Two processes against one with the same total batch: do they reach the same accuracy?

    python tests/bench/bench_processes.py [--seeds 1993,1994,1995] [--model icarl]

Handwritten digits, five phases of two classes, the same config twice for each class order: with one process, and with
two under torchrun (gloo, on the CPU), each process with one thread.  They differ by rounding and by the statistics of
batch norm, which are those of the images that a process sees.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.digits import make_digits  # noqa: E402
from tests.processes import start, torchrun  # noqa: E402

CONFIG = {
    **{"dataset": "MNIST", "init_cls": 2, "increment": 2, "convnet_type": "resnet8", "device": "cpu", "num_workers": 0},
    **{"memory_per_class": 4, "real_per_class": 2, "syn_per_class": 8, "augmentations_per_image": 4},
    **{"augmentation_prob": 0.2, "batch_size": 32, "init_lr": 0.05, "lrate": 0.05, "logger": ["csv"]},
    **{"init_epoch": 8, "init_milestones": [5, 7], "epochs": 8, "milestones": [5, 7]},
}


def run(command: list[str], config: dict) -> tuple[list[dict], float]:
    """A config's runs, one a seed, and the seconds that the command took."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        began = time.perf_counter()
        process = start([*command, "--config", file.name], os.environ, stdout=subprocess.DEVNULL)
        if process.wait() != 0:
            raise SystemExit(f"{' '.join(command)} failed")
    results = json.loads((Path(config["output_dir"]) / "results.json").read_text())
    return results["runs"], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="1993,1994,1995")
    parser.add_argument("--model", default="icarl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_digits(Path(folder) / "data", train=100, test=50, copies=4, classes=10)
        common = {**CONFIG, "data_dir": f"{folder}/data", "model_name": options.model}
        common["seed"] = [int(seed) for seed in options.seeds.split(",")]
        one, seconds_of_one = run([sys.executable, "main.py"], {**common, "output_dir": f"{folder}/one"})
        two, seconds_of_two = run(torchrun("main.py"), {**common, "output_dir": f"{folder}/two"})

    head = "nme" if one[0]["nme"] else "cnn"
    print(f"{options.model} ({head}), top-1 in %: one process, two processes, difference")
    print(f"{'seed':>6}   average incremental        after the last phase")
    differences: dict[str, list[float]] = {"average": [], "last": []}
    for a, b in zip(one, two, strict=True):
        cells = []
        for name, of in (
            ("average", lambda result: result[head]["average_incremental_accuracy"]),
            ("last", lambda result: result["phases"][-1][head]["top1"]),
        ):
            differences[name].append(of(b) - of(a))
            cells.append(f"{of(a):6.1f} {of(b):6.1f} {of(b) - of(a):+6.1f}")
        print(f"{a['seed']:>6}   " + "       ".join(cells))
    for name, values in differences.items():
        error = f", standard error {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
        print(f"{name}: mean difference {statistics.mean(values):+.1f}{error}")
    print(f"seconds of all seeds: {seconds_of_one:.0f} with one process, {seconds_of_two:.0f} with two")


if __name__ == "__main__":
    main()
