"""A stand-in for main.py in the grids of `exps.grid`: quick, and it writes down what it was started for."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from exps import grid
from utils.config.read import read_json
from utils.files import write_json
from utils.results.records import ClassOrder, Phase, ResultsFile, read_results

KEYS = {"dataset": "D", "init_cls": 2, "increment": 2, "convnet_type": "resnet8", "model_name": "replay"}


def point(folder: Path, name: str = "a", phase0=None, **keys) -> grid.Point:
    keys = {**KEYS, "seed": [1, 2], **keys}
    arguments = ("--config", str(folder / name / "point.json"))
    return grid.Point(name, folder / name, grid.checked_keys(keys), arguments, phase0, keys)


def entry(seed: int, top1: float = 80.0, nme: float | None = None, phases: int = 2) -> ClassOrder:
    """A finished class order's part of results.json."""
    names = [f"c{i}" for i in range(2 * phases)]

    def metrics(value: float, seen: int) -> dict:
        same = {"top1": value, "top5": 100.0, "old": value, "new": value, "per_class": [value] * seen}
        return {**same, "per_phase": [value] * (seen // 2), "per_ten": [value], "confusion": np.eye(seen).tolist()}

    records = []
    for phase in range(phases):
        seen = 2 * phase + 2
        record = {"phase": phase, "classes_seen": seen, "cnn": metrics(top1, seen)}
        record["nme"] = None if nme is None else metrics(nme, seen)
        record |= {"memory": {"units_total": 4.0, "bytes_total": 100 * seen, "nb_real": seen, "nb_synthetic": 0}}
        record |= {"parameters": 5, "copies_on_demand": None}
        record["training"] = {"seconds": 1.0, "reused": False, "loss": 0.5, "accuracy": 99.0}
        records.append({**record, "seconds": {"total": 2.0, "train": 1.0}})
    return ClassOrder.of(seed, names, [Phase.from_state(record, names) for record in records], phases)


def write(point: grid.Point, *entries: ClassOrder, config=None) -> None:
    """results.json of these class orders beside those that are there."""
    point.folder.mkdir(parents=True, exist_ok=True)
    file = point.folder / "results.json"
    with FileLock(point.folder / ".results.lock"):
        before = read_results(file).runs if file.is_file() else []
        new = {one.seed: one for one in (*before, *entries)}
        write_json(file, ResultsFile.of(config or point.config, [new[seed] for seed in sorted(new)]).to_json())


def fake_main(log: Path, seconds: float, fails: str = ""):
    """In place of `exps.grid.call`.  log: gets a line a start; fails: name of the folder whose runs fail."""

    def call(program, *arguments, **variables):
        given = dict(word.partition("=")[::2] for word in arguments)
        seed, folder = int(given["seed"].strip("[]")), Path(given["output_dir"])
        (folder / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / f"seed{seed}" / ".lock", thread_local=False).acquire(blocking=False):
                with log.open("a") as lines:
                    lines.write(f"{folder.name} {seed} {os.getpid()} {variables.get('CUDA_VISIBLE_DEVICES', '-')}\n")
                time.sleep(seconds)
                if folder.name == fails:
                    return subprocess.CompletedProcess(arguments, 2, "", "error: no luck\n  twice\n")
                config = read_json(folder / "point.json")
                one = grid.Point(folder.name, folder, grid.checked_keys(config), ())
                write(one, entry(seed))
        except Timeout:
            return subprocess.CompletedProcess(arguments, 2, "", f"error: another process is working on seed {seed}")
        return subprocess.CompletedProcess(arguments, 0, "", "")

    return call


def carry_out(folder: str, names: str, seconds: str, jobs: str = "1") -> None:
    """A sweep in a process of its own."""
    grid.POLL = 0.05
    grid.call = fake_main(Path(folder) / "calls.txt", float(seconds))
    asked = [point(Path(folder), name) for name in names.split(",")]
    outcome = grid.Grid(lambda failed: (asked, False), int(jobs)).carry_out()
    print(len(outcome.elsewhere), outcome.failed)
