"""CPU and wall seconds and memory of main.py and of PyCIL on the same work:
python tests/bench/bench_pycil.py PYCIL_DIR [DATA_DIR] [--methods icarl,wa,der] [--epochs 2] [--workers 0]

PYCIL_DIR is a checkout of github.com/LAMDA-CL/PyCIL; nothing is fetched.  DATA_DIR holds CIFAR10 in the project's
layout (without one: pictures of noise).  The work: 15 classes of 75 train and 20 test pictures, made of CIFAR-10's ten,
in three phases of five; PyCIL's own exps/*.json on both sides, with --epochs epochs in each stage and 20 exemplars per
class.  In PyCIL the data, the numbers of epochs and the workers of its loaders (--workers) are replaced, nothing else.

Each side is one process from start to end, with one thread; they take turns.  CPU seconds are those of the process and
its workers.  "train" is a phase's training, "exemplars" the choice of exemplars and the class means, "evaluate" the
evaluation after a phase; the rest is the start, the results, and our checkpoints and report.  PyCIL evaluates the test
set in every fifth epoch of training too, from the first on: its column has the seconds without these in brackets.
"""

import argparse
import functools
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLASSES, PHASE, TRAIN, TEST = 15, 5, 75, 20
METHODS = "finetune,icarl,wa,der,foster,memo,podnet"
PARTS = ("train", "test passes", "exemplars", "evaluate")


class Meter:
    """CPU and wall seconds of the parts of each phase.  A part within another one counts for itself alone."""

    def __init__(self):
        self.seconds: dict[str, list[list[float]]] = {part: [] for part in PARTS}  # part -> phase -> [CPU, wall]
        self.phase, self._parts, self._since = 0, [], self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used), time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        if self._parts:
            of_part = self.seconds[self._parts[-1]]
            while len(of_part) <= self.phase:
                of_part.append([0.0, 0.0])
            for i in range(2):
                of_part[self.phase][i] += now[i] - self._since[i]
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def timed(self, function: Callable, name: str) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **options):
            with self.part(name):
                return function(*arguments, **options)

        return call


def short(config: dict, epochs: int) -> dict:
    """PyCIL's config with few epochs, on the small work."""
    config = {key: epochs if key.endswith(("epoch", "epochs")) else value for key, value in config.items()}
    config |= {"dataset": "MINI15", "init_cls": PHASE, "increment": PHASE, "shuffle": True, "seed": [1993]}
    return config | {"memory_size": 20 * CLASSES, "memory_per_class": 20, "fixed_memory": True}


# One side, in a process of its own


def run_pycil(checkout: Path, folder: Path, name: str, epochs: int, workers: int | None) -> dict:
    import numpy as np
    import torch
    from torch.utils import data

    spec = importlib.util.spec_from_file_location("torchvision_compat", ROOT / "torchvision_compat.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))  # by its path: PyCIL has packages of our names
    if workers is not None:

        class Loader(data.DataLoader):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **{**options, "num_workers": workers})

        data.DataLoader = torch.utils.data.DataLoader = Loader
    sys.path[0] = str(checkout)
    os.chdir(folder)  # its logs go there
    import trainer

    from utils import data_manager, factory
    from utils.data import iCIFAR100  # isort: skip

    class Mini(iCIFAR100):
        def download_data(self):
            arrays = np.load(folder / "pictures.npz")
            self.train_data, self.train_targets = arrays["train"], arrays["train_targets"]
            self.test_data, self.test_targets = arrays["test"], arrays["test_targets"]

    data_manager._get_idata = lambda dataset_name: Mini()
    meter, top1 = Meter(), []

    def measured(make: Callable) -> Callable:
        def get_model(model_name, args):
            model = make(model_name, args)
            module = sys.modules[type(model).__module__]
            for constant, value in list(vars(module).items()):
                if constant.endswith(("epoch", "epochs")) and isinstance(value, int):
                    setattr(module, constant, epochs)
            model.incremental_train = meter.timed(model.incremental_train, "train")
            model.after_task = meter.timed(model.after_task, "train")
            model.build_rehearsal_memory = meter.timed(model.build_rehearsal_memory, "exemplars")
            model._compute_accuracy = meter.timed(model._compute_accuracy, "test passes")
            evaluate = meter.timed(model.eval_task, "evaluate")

            def eval_task():
                accuracies = evaluate()
                top1.append(float(accuracies[0]["top1"]))
                return accuracies

            model.eval_task = eval_task
            train = model.incremental_train

            def incremental_train(manager):
                meter.phase = len(top1)
                train(manager)

            model.incremental_train = incremental_train
            return model

        return get_model

    factory.get_model = measured(factory.get_model)
    config = short(json.loads((checkout / "exps" / f"{name}.json").read_text()), epochs)
    trainer.train({**config, "device": [-1]})
    return {"seconds": meter.seconds, "top1": top1}


def run_ours(checkout: Path, folder: Path, name: str, epochs: int, workers: int | None) -> dict:
    sys.path[0] = str(ROOT)
    import main
    from models import catalogue
    from models.training.method import Method
    from models.training.trainer import Trainer
    from utils.config.schema import keys_of

    meter = Meter()
    for function, part in (("start_phase", "train"), ("train", "train"), ("choose_exemplars", "exemplars")):
        setattr(Trainer, function, meter.timed(getattr(Trainer, function), part))
    Method.class_means = meter.timed(Method.class_means, "exemplars")
    evaluate = meter.timed(Trainer.evaluate, "evaluate")

    def evaluate_phase(trainer):
        record = evaluate(trainer)
        meter.phase += 1
        return record

    Trainer.evaluate = evaluate_phase
    (folder / "config.json").write_text(
        json.dumps(short(json.loads((checkout / "exps" / f"{name}.json").read_text()), epochs))
    )
    settings = catalogue.methods()[name].settings
    own = [key for key in (keys_of(settings) if settings else ()) if key.endswith("_epochs")]
    overrides = [f"{key}={epochs}" for key in ("init_epoch", "epochs", *own)]
    overrides += ["init_milestones=[]", "milestones=[]", "device=cpu", f"data_dir={folder / 'data'}"]
    overrides += [f"output_dir={folder / 'output'}"] + ([] if workers is None else [f"num_workers={workers}"])
    if code := main.main(["--config", str(folder / "config.json"), *overrides]):
        sys.exit(code)
    (run,) = json.loads((folder / "output" / "results.json").read_text())["runs"]
    return {"seconds": meter.seconds, "top1": run["cnn"]["top1"]}


# Both


def make_data(folder: Path, source: Path | None) -> None:
    """The same pixels as PNG in our layout and as arrays, by class label in the order of their names."""
    import numpy as np
    from PIL import Image

    rng, arrays = np.random.default_rng(0), {}
    for mode, count in (("train", TRAIN), ("test", TEST)):
        pictures = []
        for c in range(CLASSES):
            if source is None:
                of_class = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            else:
                label = sorted(path for path in (source / "CIFAR10" / mode).iterdir() if path.is_dir())[c % 10]
                files = sorted(label.iterdir())[c // 10 * count :][:count]
                of_class = [np.asarray(Image.open(file).convert("RGB")) for file in files]
            to = folder / "data" / "MINI15" / mode / f"class_{c:02d}"
            to.mkdir(parents=True)
            for i, picture in enumerate(of_class):
                Image.fromarray(picture).save(to / f"{i:03d}.png")
            pictures += list(of_class)
        arrays |= {mode: np.stack(pictures), f"{mode}_targets": np.repeat(np.arange(CLASSES), count)}
    np.savez(folder / "pictures.npz", **arrays)


def run_side(side: str, options: argparse.Namespace, data: Path, method: str) -> dict:
    """One side's figures: what its process says, and all its CPU and wall seconds and its peak memory (MB)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("data", "pictures.npz"):
            (folder / name).symlink_to(data / name)
        command = [sys.executable, __file__, str(options.pycil), "--side", side, "--folder", temporary]
        command += ["--methods", method, "--epochs", str(options.epochs), "--workers", str(options.workers)]
        start = time.perf_counter()
        with (folder / "said.txt").open("w+") as said:
            child = subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                said.seek(0)
                sys.exit(f"{side}, {method}: exit code {child.returncode}\n{said.read()[-3000:]}")
        figures = json.loads((folder / "figures.json").read_text())
        figures |= {"cpu": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - start}
        return {**figures, "megabytes": used.ru_maxrss / 1024}


def median(runs: list[dict], part: str, kind: int, phase: int | None = None) -> float:
    """Median over rounds of a part's CPU (0) or wall (1) seconds, of one phase or of all."""
    values = [run["seconds"][part] if phase is None else run["seconds"][part][phase : phase + 1] for run in runs]
    return statistics.median(sum(seconds[kind] for seconds in phases) for phases in values)


def print_rows(method: str, runs: dict[str, list[dict]]) -> None:
    """A row for all phases, and one for each."""
    ours, theirs = runs["ours"], runs["pycil"]
    for kind, name in ((0, "CPU"), (1, "wall")):
        for phase in (None, *range(CLASSES // PHASE if kind == 0 else 0)):
            cells = []
            for part in ("train", "exemplars", "evaluate"):
                mine, other = median(ours, part, kind, phase), median(theirs, part, kind, phase)
                bare = f" ({other:.1f})" if part == "train" else ""
                other += median(theirs, "test passes", kind, phase) if part == "train" else 0.0
                cells.append(f"{mine:.1f} / {other:.1f}{bare} = {mine / other:.2f}" if other else "-")
            if phase is None:
                totals = [statistics.median(run[name.lower()] for run in side) for side in (ours, theirs)]
                cells.append(f"{totals[0]:.1f} / {totals[1]:.1f} = **{totals[0] / totals[1]:.2f}**")
                cells.append(" / ".join(f"{max(run['megabytes'] for run in side):,.0f}" for side in (ours, theirs)))
            which = f"{method}, {name}" if phase is None else f"phase {phase}, {name}"
            print(f"| {which} | " + " | ".join(cells) + " |", flush=True)
    curves = ", ".join(f"{side} {' '.join(f'{top1:.1f}' for top1 in runs[side][0]['top1'])}" for side in runs)
    print(f"(top-1 after each phase: {curves})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pycil", type=Path, metavar="PYCIL_DIR", help="a checkout of github.com/LAMDA-CL/PyCIL")
    parser.add_argument("data_dir", nargs="?", type=Path, help="holds CIFAR10 (default: noise)")
    parser.add_argument("--methods", default=METHODS, help="[%(default)s]")
    parser.add_argument("--epochs", type=int, default=2, help="of each stage [2]")
    parser.add_argument("--rounds", type=int, default=1, help="of which medians are taken [1]")
    parser.add_argument("--workers", default="0", help="of all loaders, or own: each side's own numbers [0]")
    parser.add_argument("--side", choices=("ours", "pycil"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.pycil = options.pycil.resolve()
    if not (options.pycil / "trainer.py").is_file():
        sys.exit(f"{options.pycil} is no checkout of PyCIL: it has no trainer.py")
    if options.side:
        side = {"ours": run_ours, "pycil": run_pycil}[options.side]
        workers = None if options.workers == "own" else int(options.workers)
        figures = side(options.pycil, options.folder, options.methods, options.epochs, workers)
        (options.folder / "figures.json").write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as data:
        make_data(Path(data), options.data_dir)
        columns = ("ours / PyCIL, seconds", "train", "exemplars", "evaluate", "all", "peak memory, MB")
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for method in options.methods.split(","):
            runs: dict[str, list[dict]] = {"ours": [], "pycil": []}
            for _ in range(options.rounds):
                for side, of_side in runs.items():
                    of_side.append(run_side(side, options, Path(data), method))
            print_rows(method, runs)


if __name__ == "__main__":
    main()
