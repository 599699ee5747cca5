"""`make demo`: the whole path on real handwritten digits, with the commands that a user would type.

Digits become prompts and copies (compress/run.py); main.py then learns 5 phases of 2 classes twice at one memory
budget, with real exemplars alone and with ESCORT's mix, and the two are compared.  Everything that is there already is
reused.  SEEDS in the environment chooses the class orders: SEEDS="1993 1994 1995" make demo.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from utils import report
from utils.config import read_json
from utils.errors import UserError
from utils.gallery import plot_exemplars
from utils.paths import DatasetPaths, data_dir

CONFIG = Path("exps/demo.json")
OUTPUT = Path("outputs/demo")
COMPRESS = "--resolution high --size 64 --steps 10 --batch-size 50 --model tiny"  # 64: what the tiny model was made for


def run(command: str) -> None:
    """Show a command and run it with this Python.  Raises UserError where it fails."""
    print(f"\n$ python {command}", flush=True)
    began = time.time()
    code = subprocess.run([sys.executable, *shlex.split(command)], check=False).returncode
    if code:
        raise UserError(f"that command left with exit code {code}")
    print(f"({time.time() - began:.0f} s)", flush=True)


def demo(seeds: list[int]) -> None:
    config = read_json(CONFIG)
    dataset, copies = config["dataset"], config["augmentations_per_image"]
    run("-m utils.curate digits")
    run(f"compress/run.py --dataset {dataset} --seeds {copies} {COMPRESS}")
    orders = f"seed={seeds}".replace(" ", "")
    tag = "-".join(map(str, seeds))
    folders = {"real exemplars only": OUTPUT / f"real-only-{tag}", "ESCORT": OUTPUT / f"escort-{tag}"}
    real_only = f"real_per_class={int(config['memory_per_class'])} syn_per_class=0 augmentation_prob=0"
    run(f"main.py --config {CONFIG} {orders} {real_only} output_dir={folders['real exemplars only']}")
    run(f"main.py --config {CONFIG} {orders} output_dir={folders['ESCORT']}")

    results = {name: report.load_results(folder) for name, folder in folders.items()}
    report.write_json(OUTPUT / "results.json", results)
    report.plot(results, OUTPUT / "accuracy.png")
    plot_exemplars(DatasetPaths(data_dir(), dataset), copies, OUTPUT / "exemplars.png")
    orders = f"class order{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    print(f"\nTop-1 accuracy in % over all classes seen, after each phase of 2 classes; {orders}\n")
    print(report.table(results))
    averages = [r["summary"]["cnn"]["average_incremental_accuracy"]["mean"] for r in results.values()]
    print(f"\nAt the same budget, {config['memory_per_class']} units a class (1 unit = the bits of one real image),")
    gain = averages[1] - averages[0]
    print(f"ESCORT's average incremental accuracy minus that of real exemplars only: {gain:+.1f} points.")
    print(f"\n{OUTPUT}/: results.json, accuracy.png, exemplars.png (image | edge map | copies)")


def main() -> int:
    try:
        demo([int(seed) for seed in os.environ.get("SEEDS", "1993").replace(",", " ").split()])
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
