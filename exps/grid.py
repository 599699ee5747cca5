"""A grid of runs of main.py, carried out by any number of processes and machines that see one folder.

A task is one class order of one point of the grid.  Each process takes the next task that is not finished and that no
other process works on: it holds the lock `.sweep.lock` in the class order's folder while main.py runs, and main.py
holds its own lock there, so that a run of a killed process is taken up when main.py has ended.  What is finished is
known from results.json alone: its config must be the one that is asked for.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from subprocess import CompletedProcess, run
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from compress.forms import form_named
from compress.presets import PRESETS
from exps.runs import MAIN, call, last_words, pool_of, threads
from models import catalogue
from utils.config.read import load_config
from utils.config.schema import Config, as_dict, differences
from utils.data.paths import data_dir
from utils.errors import UserError
from utils.results import report
from utils.results.output import seed_folder

BUSY = "another process is working on"
"""main.py's words where another process, such as one of a sweep that was killed, works on a class order."""
FAILED = "failed.txt"
"""In a class order's folder: why its run failed last, for the other processes of the grid."""
POLL = 1.0
"""Seconds between two looks at the folder."""


@dataclass(frozen=True, eq=False)
class Point:
    """One run of main.py.

    name: for messages; folder: its output_dir; config: with all defaults, as main.py checks it; arguments: of main.py,
    without seed and output_dir; phase0: points with equal values can use one trained network of phase 0; keys: what is
    written to point.json in the folder before main.py is started, for its --config.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    arguments: tuple[str, ...]
    phase0: Hashable = None
    keys: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def seeds(self) -> list[int]:
        return self.config["seed"]


class Task(NamedTuple):
    """One class order of a point."""

    point: Point
    seed: int

    def __str__(self) -> str:
        return self.point.name if len(self.point.seeds) == 1 else f"{self.point.name}, order {self.seed}"

    @property
    def folder(self) -> Path:
        return seed_folder(self.point.folder, self.seed)


def checked_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """A config as main.py checks it.  Raises UserError."""
    return load_config(file, overrides, methods=catalogue.methods(), backbones=catalogue.backbones())


def checked_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config that main.py makes of some keys.  Raises UserError that lists what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        report.write_json(file, keys)
        try:
            return as_dict(checked_config(file))
        except UserError as error:
            raise UserError(str(error).replace(f"{file}: ", "")) from None


def results_of(point: Point) -> Mapping[str, Any] | None:
    """A point's results.json; None where it has no finished phase or can't be read."""
    file = point.folder / "results.json"
    try:
        status = file.stat()
        return _results(file, status.st_mtime_ns, status.st_size)
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=2048)
def _results(file: Path, time_ns: int, size: int) -> Mapping[str, Any]:
    return report.load_results(file)


def refusal(point: Point) -> str | None:
    """Why a point can't be carried out: its folder holds results of another config."""
    results = results_of(point)
    if results is None:
        return None
    done = _as_asked(point.config, results["config"])
    differing = differences(point.config, done)
    if (own := data_dir(point.config.get("data_dir"))) != (other := data_dir(done.get("data_dir"))):
        differing.append(f"data_dir: {other} -> {own}")
    if not differing:
        return None
    more = f"; {len(differing) - 4} more" if len(differing) > 4 else ""
    words = f"{point.folder} holds results of another config ({'; '.join(differing[:4])}{more})"
    return f"{words}. Choose another --output, or delete that folder."


def _as_asked(config: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """A finished run's config without what main.py fills in by itself, when it knows the data and the form."""
    by_main = [key for key in ("real_per_class", "syn_per_class", "copy_candidates") if config[key] in (None, "fill")]
    if _is_deterministic(config["syn_form"]):
        by_main += ["augmentations_per_image", "copies_kept"]
    return {**done, **{key: config[key] for key in by_main}}


@cache
def _is_deterministic(form: str) -> bool:
    """Whether all copies of an exemplar are equal, so that main.py makes one."""
    try:
        return form_named(form, PRESETS["high"]).deterministic
    except UserError:  # main.py says it better
        return False


def done_orders(point: Point) -> dict[int, Mapping[str, Any]]:
    """The entries of results.json of the class orders that are asked for and finished."""
    results = results_of(point)
    if results is None or refusal(point):
        return {}
    return {entry["seed"]: entry for entry in results["runs"] if entry["finished"] and entry["seed"] in point.seeds}


def finished(point: Point) -> Mapping[str, Any] | None:
    """Results of exactly the class orders that are asked for; None where one is not finished or the config differs."""
    done = done_orders(point)
    if len(done) < len(set(point.seeds)):
        return None
    return report.results(results_of(point)["config"], [done[seed] for seed in sorted(done)])


@dataclass
class Outcome:
    """What a process has seen of a grid.

    failed: what went wrong, by name of point; elsewhere: tasks that other processes work on.
    """

    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[Task] = field(default_factory=list)


Points = Callable[[Collection[str]], tuple[Sequence[Point], bool]]
"""Names of points that failed -> the points that are known by now, and whether more follow when these are finished."""


class Grid:
    """Takes tasks until none is left to take.

    points: asked again whenever a task has ended; jobs: tasks at a time in this process.
    """

    def __init__(self, points: Points, jobs: int):
        self.points, self.jobs = points, jobs
        self.began = time.time()
        self.outcome = Outcome()
        self.running: dict[Future, tuple[Task, ExitStack]] = {}
        self.failed_tasks: dict[Task, str] = {}
        self.known: list[Point] = []  # as `points` said last

    def carry_out(self) -> Outcome:
        """Returns when every task is finished, has failed, or is in the hands of other processes."""
        with pool_of(self.jobs) as pool, _bar() as bar:
            while True:
                tasks, more = self._look()
                free = [task for task in tasks if not self._is_settled(task) and task not in self._here()]
                taken = self._take(free, pool)
                _show(bar, tasks, self._here())
                if not self.running and not taken:
                    elsewhere = [task for task in free if not self._is_settled(task)]
                    if not elsewhere and self._look() == (tasks, more):
                        break
                    # What another sweep works on is left to it, unless it decides what is to be done next.
                    if elsewhere and not more and all(self._held_by_a_sweep(task) for task in elsewhere):
                        self.outcome.elsewhere = elsewhere
                        break
                self._collect(POLL)
        self.outcome.failed |= {str(task): words for task, words in self.failed_tasks.items()}
        return self.outcome

    def _look(self) -> tuple[list[Task], bool]:
        points, more = self.points({task.point.name for task in self.failed_tasks} | self.outcome.failed.keys())
        self.known, tasks = list(points), []
        for point in points:
            if words := refusal(point):
                self.outcome.failed[point.name] = words
            else:
                tasks += [Task(point, seed) for seed in point.seeds]
        return tasks, more

    def _here(self) -> set[Task]:
        return {task for task, _ in self.running.values()}

    def _is_settled(self, task: Task) -> bool:
        """Whether a task is finished, or has failed here or in another process since this one began."""
        if task.seed in done_orders(task.point) or task in self.failed_tasks:
            return True
        file = task.folder / FAILED
        try:
            if file.stat().st_mtime < self.began:
                return False
            self.failed_tasks[task] = file.read_text(encoding="utf-8")
        except OSError:
            return False
        return True

    def _take(self, free: Sequence[Task], pool) -> int:
        """Start tasks while there are jobs for them.  Returns how many."""
        taken = 0
        for task in free:
            if len(self.running) == self.jobs:
                break
            if not self._has_phase_0(task) and self._phase_0_is_trained_by_another(task):
                continue
            if (claim := _claim(task)) is None:
                continue
            if self._is_settled(task) or not _is_free(task.folder / ".lock"):
                claim.close()
                continue
            self.running[pool.submit(self._run, task, claim)] = (task, claim)
            taken += 1
        return taken

    def _has_phase_0(self, task: Task) -> bool:
        """Whether a run with the same phase 0 has trained it: this one can take its network."""
        alike = [point for point in self.known if point.phase0 is not None and point.phase0 == task.point.phase0]
        found = [results for point in alike if (results := results_of(point)) is not None]
        return any(entry["seed"] == task.seed and entry["phases"] for of in found for entry in of["runs"])

    def _phase_0_is_trained_by_another(self, task: Task) -> bool:
        if task.point.phase0 is None:
            return False
        others = [Task(point, task.seed) for point in self.known if point.phase0 == task.point.phase0]
        return any(
            other != task and (other in self._here() or not _is_free(other.folder / ".lock")) for other in others
        )

    def _held_by_a_sweep(self, task: Task) -> bool:
        return not _is_free(task.folder / ".sweep.lock")

    def _run(self, task: Task, claim: ExitStack) -> CompletedProcess:
        """In a thread: main.py for one class order."""
        (task.folder / FAILED).unlink(missing_ok=True)
        if task.point.keys is not None:
            report.write_json(task.point.folder / "point.json", task.point.keys)
        words = [*task.point.arguments, f"seed=[{task.seed}]", f"output_dir={task.point.folder}"]
        with gpu(task.point.config.get("device")) as variables:
            return call(MAIN, *words, **threads(self.jobs), **variables)

    def _collect(self, seconds: float) -> None:
        """Wait for tasks that end, and see what came of them."""
        if not self.running:
            time.sleep(seconds)
            return
        done, _ = wait(self.running, timeout=seconds, return_when=FIRST_COMPLETED)
        for future in done:
            task, claim = self.running.pop(future)
            result = future.result()
            if result.returncode == 0 and task.seed in done_orders(task.point):
                pass
            elif BUSY not in result.stderr:
                words = last_words(result) if result.returncode else "it ended, but its results are of another config"
                self.failed_tasks[task] = words
                report.write_text(task.folder / FAILED, words)
            claim.close()


def carry_out(points: Points, jobs: int) -> Outcome:
    """Carry out a grid's tasks together with the other processes that do so."""
    return Grid(points, jobs).carry_out()


def watch(points: Points, running: Callable[[], bool], seconds: float) -> None:
    """Show how far a grid is, which other processes carry out, while `running` holds.  seconds: between two looks."""
    with _bar() as bar:
        while running():
            tasks = [Task(point, seed) for point in points(())[0] for seed in point.seeds]
            begun = [task for task in tasks if not _is_free(task.folder / ".sweep.lock")]
            _show(bar, tasks, begun)
            time.sleep(seconds)


def _show(bar: tqdm, tasks: Sequence[Task], running: Collection[Task]) -> None:
    """One bar over all tasks, with those that run and the phases that they have done."""
    bar.total = len(tasks)
    bar.n = sum(task.seed in done_orders(task.point) for task in tasks)
    parts = []
    for task in running:
        entries = (results_of(task.point) or {"runs": []})["runs"]
        phases = sum(len(entry["phases"]) for entry in entries if entry["seed"] == task.seed)
        parts.append(f"{task}: {phases} phase{'s' * (phases != 1)} done")
    bar.set_postfix_str("; ".join(sorted(parts)), refresh=False)
    bar.update(0)


@contextmanager
def _bar() -> Iterator[tqdm]:
    """On stderr; its last line is ended, so that what is printed next begins a line."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(desc="runs", total=0, mininterval=seconds, maxinterval=max(seconds, 10), dynamic_ncols=True, delay=1)
    try:
        yield bar
    finally:
        bar.refresh()
        bar.close()


def _claim(task: Task) -> ExitStack | None:
    """The lock of a task, None where another process of the grid holds it.  `close` gives it back."""
    task.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(task.folder / ".sweep.lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    claim = ExitStack()
    claim.callback(lock.release)
    return claim


def _is_free(file: Path) -> bool:
    """Whether nobody holds a lock.  It is held here for a moment; another process that misses it then tries again."""
    if not file.exists():
        return True
    try:
        with FileLock(file, thread_local=False).acquire(blocking=False):
            return True
    except Timeout:
        return False


# GPUs


def visible_gpus() -> list[str]:
    """The GPUs of this machine that the user lets this process see, as CUDA_VISIBLE_DEVICES names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


@contextmanager
def gpu(device: Any) -> Iterator[dict[str, str]]:
    """The environment of a run that gets a GPU of its own, {} where there is none to choose.

    device: the run's key; one that names devices is left as it is.  A GPU is a lock in the machine's folder of
    temporary files, so that all sweeps of a user share the GPUs; where all are taken, runs share them evenly.
    """
    gpus = visible_gpus() if device in (None, "auto", "cuda") else []
    if len(gpus) < 2:
        yield {}
        return
    with ExitStack() as stack:
        share = 0
        while True:  # first a GPU that nobody has, then one that one run has, ...
            for name in gpus:
                lock = FileLock(Path(tempfile.gettempdir()) / f"escort-gpu-{os.getuid()}-{name}-{share}.lock")
                try:
                    stack.enter_context(lock.acquire(blocking=False))
                except Timeout:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": name}
                return
            share += 1
