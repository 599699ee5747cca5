"""`make demo`: the whole path on real handwritten digits, with the commands that a user would type.

Some digits become prompts and copies (compress/run.py); the planner says what 1,200 bytes of a class hold; and the
referee (exps.pareto) learns 5 phases of 2 classes with that memory as image files, as WebP pictures, as edge maps and
as the class's text alone.  Everything that is there already is reused.  SEEDS in the environment chooses the class
orders: SEEDS="1993 1994 1995" make demo.

`make demo-on-demand`: the digits learnt twice with augmentation_prob 0, with copies made ahead and on demand,
which must not differ in a copy's byte, in the memory or in an accuracy.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from exps.runs import nb_cores
from utils import cli
from utils.config.read import read_json
from utils.data.paths import DatasetPaths, data_dir
from utils.errors import UserError
from utils.results import report

CONFIG = Path("exps/demo.json")
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


def compress(config: dict, settings: str) -> None:
    """The digits and all their copies, where they are not there yet."""
    run("-m utils.curate digits")
    run(f"compress/run.py --dataset {config['dataset']} --seeds {config['augmentations_per_image']} {settings}")


def class_orders(seeds: list[int]) -> tuple[str, str]:
    """The seeds as main.py takes them, and as part of a folder's name."""
    return f"seed={seeds}".replace(" ", ""), "-".join(map(str, seeds))


def demo(seeds: list[int]) -> None:
    """Forms of exemplars at equal bytes."""
    sweep = read_json(SWEEP)
    config, forms = sweep["config"], "webp:10,webp:5@14,edges,edges@14,text"
    where, copies = f"--dataset {config['dataset']}", config["augmentations_per_image"]
    run("-m utils.curate digits")
    run(f"compress/run.py {where} --limit 2 --seeds {copies} {sweep['settings']}")
    run(f"-m compress.gallery {where} --copies {copies} {OUTPUT / 'exemplars.png'}")
    budget = f"--bytes-per-class {sweep['budgets'][0]} --copies {copies}"
    run(f"-m exps.plan {where} {budget} --forms {forms} --settings '{sweep['settings']}'")
    jobs = min(3, nb_cores())  # the forms that are compared with real exemplars, side by side
    run(f"-m exps.pareto {SWEEP} --seeds {','.join(map(str, seeds))} --output {OUTPUT} --jobs {jobs}")
    print(
        "\nAverage incremental accuracy in %, each form at the same bytes a class: one real exemplar and as many of\n"
        "the form as fit (text: nine, which keep no bytes). Copies are made of the chosen exemplars only.\n"
        f"\n{OUTPUT}/: report.html (for a browser), table.md, table.csv, exemplars.png (image | edge map | copies)"
    )


def demo_on_demand(seeds: list[int]) -> None:
    """The same run with copies made ahead and on demand.  Raises UserError where they differ."""
    config, settings = read_json(CONFIG), read_json(SWEEP)["settings"]
    # They say fp32: in bf16, "auto" on some CPUs, a copy depends on the size of its batch, and these differ.
    compress(config, settings)
    orders, tag = class_orders(seeds)
    ahead = DatasetPaths(data_dir(), config["dataset"])
    on_demand = DatasetPaths(OUTPUT / "on-demand-data", config["dataset"])  # the same images, and no copies yet
    on_demand.root.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test", "class_names.json"):
        if not (on_demand.root / name).exists():
            (on_demand.root / name).symlink_to((ahead.root / name).resolve())
    options = f"regenerate=on_demand regenerate_options={shlex.quote(settings)}"
    command = f"main.py --config {CONFIG} {orders} augmentation_prob=0"
    run(f"{command} output_dir={OUTPUT}/ahead-{tag}")
    run(f"{command} output_dir={OUTPUT}/on-demand-{tag} data_dir={on_demand.data_dir} {options}")

    made = sorted(on_demand.folder("exemplars").rglob("*.jpg"))
    differing = [
        copy for copy in made
        if copy.read_bytes() != ahead.copies_folder(copy.parent.name).joinpath(copy.name).read_bytes()
    ]  # fmt: skip
    if not made or differing:
        raise UserError(f"of {len(made)} copies made on demand {len(differing)} differ from those made ahead")
    outcomes = [outcome(report.load_results(OUTPUT / f"{name}-{tag}")) for name in ("ahead", "on-demand")]
    if outcomes[0] != outcomes[1]:
        raise UserError("the two runs ended with different accuracies or memories: compare their results.json")
    of_all = len(list(ahead.folder("exemplars").rglob("*.jpg")))
    print(
        f"\nOn demand {len(made):,} copies were made, of the {of_all:,} made ahead: {1 - len(made) / of_all:.1%} saved."
        f"\nThey are the same byte for byte, and so are both runs' accuracies and memories in every phase."
    )


def outcome(results: dict) -> list:
    """What two runs must agree on: each seed's accuracies and memory, by phase."""
    return [[(phase["cnn"], phase["memory"]) for phase in run["phases"]] for run in results["runs"]]


def main() -> int:
    """The command.  Returns its exit code (`utils.cli`)."""
    parser = argparse.ArgumentParser(prog="python -m exps.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--on-demand", action="store_true", help="compare copies made on demand with those made ahead")
    chosen = demo_on_demand if parser.parse_args().on_demand else demo
    seeds = os.environ.get("SEEDS", "1993").replace(",", " ").split()
    return cli.run(lambda: chosen([int(seed) for seed in seeds]))


if __name__ == "__main__":
    sys.exit(main())
