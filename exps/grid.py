"""A grid of runs of main.py, carried out by any number of processes and machines that see one folder.

A task is one class order of one point of the grid.  Each process takes the next task that is not finished and that no
other process works on: it holds the lock `.sweep.lock` in the class order's folder while main.py runs, and main.py
holds its own lock there, so that a run of a killed process is taken up when main.py has ended.  What is finished is
known from results.json alone: its config must be the one that is asked for.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from compress.forms import form_named
from compress.presets import PRESETS
from exps.runs import MAIN, call, gpu, last_words, pool_of, threads
from models import catalogue
from utils.config.schema import as_dict, differences
from utils.data.paths import data_dir
from utils.errors import UserError
from utils.files import write_json, write_text
from utils.results.output import seed_folder
from utils.results.records import ClassOrder, Results, ResultsFile, load_results

BUSY = "another process is working on"
"""main.py's words where another process, such as one of a sweep that was killed, works on a class order."""
FAILED = "failed.txt"
"""In a class order's folder: why its run failed last, for the other processes of the grid."""
POLL = 1.0
"""Seconds between two looks at the folder."""


@dataclass(frozen=True)
class Point:
    """One run of main.py, which its folder identifies.

    name: for messages; folder: its output_dir; config: with all defaults, as main.py checks it; arguments: of main.py,
    without seed and output_dir; phase0: points with equal values can use one trained network of phase 0; keys: what is
    written to point.json in the folder before main.py is started, for its --config.
    """

    name: str = field(compare=False)
    folder: Path
    config: Mapping[str, Any] = field(compare=False)
    arguments: tuple[str, ...] = field(compare=False)
    phase0: Hashable = field(default=None, compare=False)
    keys: Mapping[str, Any] | None = field(default=None, compare=False)

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

    @property
    def is_done(self) -> bool:
        return self.seed in done_orders(self.point)


def checked_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config that main.py makes of some keys.  Raises UserError that lists what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        write_json(file, keys)
        try:
            return as_dict(catalogue.read_config(file))
        except UserError as error:
            raise UserError(str(error).replace(f"{file}: ", "")) from None


def results_of(point: Point) -> Results | None:
    """A point's results.json; None where it has no finished phase or can't be read."""
    file = point.folder / "results.json"
    try:
        status = file.stat()
        return _results(file, status.st_mtime_ns, status.st_size)
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=2048)
def _results(file: Path, time_ns: int, size: int) -> Results:
    return load_results(file)


def refusal(point: Point) -> str | None:
    """Why a point can't be carried out: its folder holds results of another config."""
    results = results_of(point)
    if results is None:
        return None
    config, done = point.config, dict(results.config)
    for key in ("real_per_class", "syn_per_class", "augmentations_per_image"):
        by_form = key == "augmentations_per_image" and _is_deterministic(config["syn_form"])
        if config[key] in (None, "fill") or by_form:
            done[key] = config[key]  # main.py fills it in, when it knows the data and the form
    differing = differences(config, done)
    if (own := data_dir(config.get("data_dir"))) != (other := data_dir(done.get("data_dir"))):
        differing.append(f"data_dir: {other} -> {own}")
    if not differing:
        return None
    more = f"; {len(differing) - 4} more" if len(differing) > 4 else ""
    words = f"{point.folder} holds results of another config ({'; '.join(differing[:4])}{more})"
    return f"{words}. Choose another --output, or delete that folder."


@cache
def _is_deterministic(form: str) -> bool:
    """Whether all copies of an exemplar are equal, so that main.py makes one."""
    try:
        return form_named(form, PRESETS["high"]).deterministic
    except UserError:  # main.py says it better
        return False


def done_orders(point: Point) -> dict[int, ClassOrder]:
    """The class orders that are asked for and finished, by seed."""
    results = results_of(point)
    if results is None or refusal(point):
        return {}
    return {order.seed: order for order in results.runs if order.finished and order.seed in point.seeds}


def finished(point: Point) -> Results | None:
    """Results of exactly the class orders that are asked for; None where one is not finished or the config differs."""
    done, results = done_orders(point), results_of(point)
    if results is None or len(done) < len(set(point.seeds)):
        return None
    return ResultsFile.of(results.config, [done[seed] for seed in sorted(done)]).compared()


Points = Callable[[Collection[str]], tuple[Sequence[Point], bool]]
"""Names of points that failed -> the points that are known by now, and whether more follow when these are finished."""


class Grid:
    """Takes tasks until none is left to take.

    points: asked again whenever a task has ended; jobs: tasks at a time in this process.
    failed: what went wrong, by name of point or task; elsewhere: tasks that other processes work on.
    """

    def __init__(self, points: Points, jobs: int):
        self.points, self.jobs = points, jobs
        self.began = time.time()
        self.running: dict[Future, tuple[Task, FileLock]] = {}
        self.known: list[Point] = []  # as `points` said last
        self.refused: dict[str, str] = {}  # by name of point
        self.failed_tasks: dict[Task, str] = {}
        self.elsewhere: list[Task] = []

    @property
    def failed(self) -> dict[str, str]:
        return self.refused | {str(task): words for task, words in self.failed_tasks.items()}

    def carry_out(self) -> "Grid":
        """Returns itself when every task is finished, has failed, or is in the hands of other processes."""
        with pool_of(self.jobs) as pool, _bar() as bar:
            while True:
                tasks, more = self._look()
                free = [task for task in tasks if not self._is_settled(task) and task not in self._here()]
                self._take(free, pool)
                _show(bar, tasks, self._here())
                if not self.running:
                    elsewhere = [task for task in free if not self._is_settled(task)]
                    if not elsewhere and self._look() == (tasks, more):
                        return self
                    # What another sweep works on is left to it, unless it decides what is to be done next.
                    if elsewhere and not more and not any(_is_free(task.folder / ".sweep.lock") for task in elsewhere):
                        self.elsewhere = elsewhere
                        return self
                self._collect()

    def _look(self) -> tuple[list[Task], bool]:
        points, more = self.points({task.point.name for task in self.failed_tasks} | self.refused.keys())
        self.known, tasks = list(points), []
        for point in points:
            if words := refusal(point):
                self.refused[point.name] = words
            else:
                tasks += [Task(point, seed) for seed in point.seeds]
        return tasks, more

    def _here(self) -> set[Task]:
        return {task for task, _ in self.running.values()}

    def _is_settled(self, task: Task) -> bool:
        """Whether a task is finished, or has failed here or in another process since this one began."""
        if task.is_done or task in self.failed_tasks:
            return True
        file = task.folder / FAILED
        try:
            if file.stat().st_mtime < self.began:
                return False
            self.failed_tasks[task] = file.read_text(encoding="utf-8")
        except OSError:
            return False
        return True

    def _take(self, free: Sequence[Task], pool: ThreadPoolExecutor) -> None:
        """Start tasks while there are jobs for them."""
        for task in free:
            if len(self.running) == self.jobs:
                break
            if self._waits_for_phase_0(task) or (lock := _claim(task)) is None:
                continue
            if self._is_settled(task) or not _is_free(task.folder / ".lock"):
                lock.release()
                continue
            self.running[pool.submit(self._run, task)] = (task, lock)

    def _waits_for_phase_0(self, task: Task) -> bool:
        """Whether another run is training the network of phase 0 that this one can use."""
        if task.point.phase0 is None:
            return False
        alike = [point for point in self.known if point.phase0 == task.point.phase0]
        trained = [order for point in alike if (results := results_of(point)) for order in results.runs]
        if any(order.seed == task.seed for order in trained):
            return False
        others = [Task(point, task.seed) for point in alike if point != task.point]
        return any(other in self._here() or not _is_free(other.folder / ".lock") for other in others)

    def _run(self, task: Task) -> CompletedProcess:
        """In a thread: main.py for one class order."""
        (task.folder / FAILED).unlink(missing_ok=True)
        if task.point.keys is not None:
            write_json(task.point.folder / "point.json", task.point.keys)
        words = [*task.point.arguments, f"seed=[{task.seed}]", f"output_dir={task.point.folder}"]
        with gpu(task.point.config.get("device")) as variables:
            return call(MAIN, *words, **threads(self.jobs), **variables)

    def _collect(self) -> None:
        """Wait POLL seconds for a task that ends, and see what came of it."""
        if not self.running:
            time.sleep(POLL)
            return
        done, _ = wait(self.running, timeout=POLL, return_when=FIRST_COMPLETED)
        for future in done:
            task, lock = self.running.pop(future)
            result = future.result()
            if (result.returncode or not task.is_done) and BUSY not in result.stderr:
                words = last_words(result) if result.returncode else "it ended, but its results are of another config"
                self.failed_tasks[task] = words
                write_text(task.folder / FAILED, words)
            lock.release()


def finish(points: Points, jobs: int, write: Callable[[], None], problems: list[str]) -> int:
    """Carry out a grid, then write its table, unless other processes still work on its runs.  Returns the exit code.

    problems: what can't be done; what fails is added, and all are printed at the end.
    """
    grid = Grid(points, jobs).carry_out()
    problems += [f"{name}: {words}" for name, words in grid.failed.items()]
    if grid.elsewhere:
        print(f"other processes work on {len(grid.elsewhere)} runs, and write the table when they are done:")
        print(*(f"  {task}" for task in grid.elsewhere), sep="\n")
    else:
        write()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def watch(points: Points, running: Callable[[], bool], seconds: float) -> None:
    """Show how far a grid is, which other processes carry out, while `running` holds.  seconds: between two looks."""
    with _bar() as bar:
        while running():
            tasks = [Task(point, seed) for point in points(())[0] for seed in point.seeds]
            _show(bar, tasks, [task for task in tasks if not _is_free(task.folder / ".sweep.lock")])
            time.sleep(seconds)


def _show(bar: tqdm, tasks: Sequence[Task], running: Collection[Task]) -> None:
    """One bar over all tasks, with those that run and the phases that they have done."""
    bar.total = len(tasks)
    bar.n = sum(task.is_done for task in tasks)
    parts = []
    for task in running:
        results = results_of(task.point)
        phases = sum(len(order.phases) for order in (results.runs if results else ()) if order.seed == task.seed)
        parts.append(f"{task}: {phases} phase{'s' if phases != 1 else ''} done")
    bar.set_postfix_str("; ".join(sorted(parts)), refresh=False)
    bar.update(0)


@contextmanager
def _bar() -> Iterator[tqdm]:
    """On stderr; its last line is ended, so that what is printed next begins a line."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(desc="runs", total=0, mininterval=seconds, maxinterval=max(seconds, 10), dynamic_ncols=True)
    try:
        yield bar
    finally:
        bar.refresh()
        bar.close()


def _claim(task: Task) -> FileLock | None:
    """The lock of a task, held; None where another process of the grid holds it."""
    task.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(task.folder / ".sweep.lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _is_free(file: Path) -> bool:
    """Whether nobody holds a lock.  It is held here for a moment; another process that misses it then tries again."""
    if not file.exists():
        return True
    try:
        with FileLock(file, thread_local=False).acquire(blocking=False):
            return True
    except Timeout:
        return False
