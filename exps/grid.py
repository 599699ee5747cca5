"""A grid of runs of main.py, carried out by any number of processes and machines that see one folder.

A task is one class order of one point of the grid.  Each process takes the next task that is not finished and that no
other process works on: it holds the lock `.sweep.lock` in the class order's folder while main.py runs, and main.py
holds its own lock there, so that a run of a killed process is taken up when main.py has ended.  What is finished is
known from results.json alone: its config must be the one that is asked for.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess

from filelock import FileLock, Timeout
from tqdm import tqdm

from exps.gpus import gpu
from exps.points import Point, Task, done_orders, refusal, results_of
from exps.runs import MAIN, call, last_words, pool_of, threads
from utils.files import write_json, write_text

BUSY = "another process is working on"
"""main.py's words where another process, such as one of a sweep that was killed, works on a class order."""
FAILED = "failed.txt"
"""In a class order's folder: why its run failed last, for the other processes of the grid."""
POLL = 1.0
"""Seconds between two looks at the folder."""


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
        orders = [order for point in alike if (results := results_of(point)) for order in results.runs]
        return any(order.seed == task.seed for order in orders)

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
            write_json(task.point.folder / "point.json", task.point.keys)
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
                write_text(task.folder / FAILED, words)
            claim.close()


def carry_out(points: Points, jobs: int) -> Outcome:
    """Carry out a grid's tasks together with the other processes that do so."""
    return Grid(points, jobs).carry_out()


def finish(points: Points, jobs: int, write: Callable[[], None], problems: list[str]) -> int:
    """Carry out a grid, then write its table, unless other processes still work on its runs.  Returns the exit code.

    problems: what can't be done; what fails is added, and all are printed at the end.
    """
    outcome = carry_out(points, jobs)
    problems += [f"{name}: {words}" for name, words in outcome.failed.items()]
    if outcome.elsewhere:
        print(f"other processes work on {len(outcome.elsewhere)} runs, and write the table when they are done:")
        print(*(f"  {task}" for task in outcome.elsewhere), sep="\n")
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
            begun = [task for task in tasks if not _is_free(task.folder / ".sweep.lock")]
            _show(bar, tasks, begun)
            time.sleep(seconds)


def _show(bar: tqdm, tasks: Sequence[Task], running: Collection[Task]) -> None:
    """One bar over all tasks, with those that run and the phases that they have done."""
    bar.total = len(tasks)
    bar.n = sum(task.seed in done_orders(task.point) for task in tasks)
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
