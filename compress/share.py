"""The work of all processes that torchrun or SLURM has started (through Lightning Fabric): one plan, one summary."""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from compress.leases import BEAT, LIFETIME, Chunks
from compress.leftovers import is_running
from compress.plan import Plan, Task
from compress.regenerate import Progress, Regenerator
from compress.result import Failure, Result
from utils.data.images import write_atomically
from utils.data.paths import DatasetPaths
from utils.errors import UserError
from utils.fabric import Fabric

PATIENCE = timedelta(days=30)
"""How long a process may wait for the others before the work begins: they look at disks of unequal speed."""

CHUNKS_PER_PROCESS = 25
MOST_IN_A_CHUNK = 16
"""Images that a process takes at a time, so that the slowest one holds up the end by little."""

T = TypeVar("T")


def by_first(fabric: Fabric, function: Callable[[], T]) -> T | None:
    """What process 0's call returns; None in the others, which wait for it.

    A UserError that it raises ends them all, and is printed by process 0 alone.
    """
    value = error = None
    if fabric.is_global_zero:
        try:
            value = function()
        except UserError as raised:
            error = raised
    failed = fabric.broadcast(error is not None)
    if failed:
        raise error or SystemExit(2)
    return value


def by_all(fabric: Fabric, function: Callable[[], T]) -> list[T]:
    """What each process's call returns, by rank, in all of them.

    UserErrors end them all; the first one is printed by process 0.
    """
    value = error = None
    try:
        value = function()
    except UserError as raised:
        error = str(raised)
    if fabric.world_size == 1:
        values = [(value, error)]
    else:
        values = [None] * fabric.world_size
        torch.distributed.all_gather_object(values, (value, error))
    errors = [error for _, error in values if error is not None]
    if errors:
        raise UserError(errors[0]) if fabric.is_global_zero else SystemExit(2)
    return [value for value, _ in values]


def together(fabric: Fabric, function: Callable[[], T]) -> T:
    """The call's value, where all processes call it alike; a UserError that all meet is printed by process 0 alone."""
    try:
        return function()
    except UserError:
        if fabric.is_global_zero:
            raise
        raise SystemExit(2) from None


def own_part(fabric: Fabric, items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, for each of n processes."""
    return items[fabric.global_rank :: fabric.world_size]


def run_shared(fabric: Fabric, regenerator: Regenerator, plan: Plan, progress: Progress) -> Result:
    """Make what a plan, the same in all processes, says is missing.  Returns the result of all in process 0.

    Processes take the work in chunks, as they get on with it.  One that dies leaves its chunk to the others.
    progress: in process 0, called with numbers of copies that any of them has made.
    """
    if fabric.world_size == 1:
        return regenerator.run(plan, progress)
    if fabric.is_global_zero:  # before the others may create this run's folder
        _remove_abandoned(regenerator.paths.folder("copies"))
    name = f".work-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
    folder = regenerator.paths.folder("copies") / fabric.broadcast(name)
    todo = [task for task in plan.tasks if not task.is_done]
    size = max(1, min(MOST_IN_A_CHUNK, len(todo) // (CHUNKS_PER_PROCESS * fabric.world_size)))
    chunks = [todo[i : i + size] for i in range(0, len(todo), size)]
    crew = Crew(folder, regenerator.paths, chunks, fabric.global_rank, fabric.world_size)
    done = own_part(fabric, [task for task in plan.tasks if task.is_done])
    with crew.alive():
        result = regenerator.run(plan, crew.count, tasks=crew.tasks(done, progress), finished=crew.finished)
    crew.report(result)  # after the last beat, which would overwrite it
    if not fabric.is_global_zero:
        return result
    whole = crew.results(patience=LIFETIME)
    whole.kept_skipped, whole.copies_skipped = plan.kept_present, plan.copies_present
    shutil.rmtree(folder, ignore_errors=True)
    return whole


class Crew:
    """The processes that share a plan, as one of them sees them, through files in a folder of their own."""

    def __init__(self, folder: Path, paths: DatasetPaths, chunks: Sequence[Sequence[Task]], rank: int, world_size: int):
        self.folder, self.paths, self.rank, self.world_size = folder, paths, rank, world_size
        self.chunks = chunks
        self._queue = Chunks(folder, len(chunks), rank, world_size)
        with suppress(FileExistsError):  # of all processes, the first one's
            (folder / "began").touch(exist_ok=False)
        self._began = (folder / "began").stat().st_mtime_ns
        self._left: dict[int, int] = {}  # images of this process's chunks that are not finished
        self._chunk_of = {task.image: i for i, chunk in enumerate(chunks) for task in chunk}
        self._copies = self._told = 0

    def tasks(self, done: Iterable[Task], progress: Progress) -> Iterator[Task | None]:
        """This process's tasks, chunk by chunk; None while it waits for what others are working on."""
        yield from done
        while True:
            chunk = self._queue.take()
            if self.rank == 0:
                self._tell(progress)
            if chunk is not None:
                self._left[chunk] = len(self.chunks[chunk])
                yield from map(self._rest, self.chunks[chunk])
            elif self._queue.is_over:
                return
            else:
                yield None
                time.sleep(0.5)

    def _rest(self, task: Task) -> Task:
        """The task without what a process that has died has made of it."""
        kept = task.kept or self._new(self.paths.kept(task.image))
        numbers = [k for k in task.copy_numbers if not self._new(self.paths.copy(task.image, k))]
        return Task(task.image, kept, tuple(numbers))

    def _new(self, file: Path) -> Path | None:
        """The file, if it was written since the run began."""
        try:
            return file if file.stat().st_mtime_ns >= self._began else None
        except OSError:
            return None

    def finished(self, image: Path) -> None:
        """An image of one of this process's tasks is finished, and its chunk with the last of them."""
        chunk = self._chunk_of.get(image)
        if chunk is None:
            return
        self._left[chunk] -= 1
        if not self._left[chunk]:
            del self._left[chunk]
            self._queue.done(chunk)

    def count(self, copies: int) -> None:
        """So many copies have just been made."""
        self._copies += copies

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Renew the leases, and tell the others how far this process is, while it works."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                self._queue.renew()
                self._write({"copies": self._copies})

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def report(self, result: Result) -> None:
        """This process's result, for process 0."""
        self._write({"copies": self._copies, "result": asdict(result)})

    def results(self, patience: float) -> Result:
        """The sum of all results; of a process that has died, and is silent for `patience` seconds, what it had made.

        To be called when all chunks are done.
        """
        whole, waiting, start = Result(), set(range(self.world_size)), time.monotonic()
        while waiting:
            for rank in list(waiting):
                said = self._read(rank)
                late = time.monotonic() - start > patience
                if "result" in said or late:
                    whole.add(_result(said))
                    waiting.discard(rank)
            if waiting:
                time.sleep(0.1)
        return whole

    def _tell(self, progress: Progress) -> None:
        """Pass on what all have made since the last time."""
        others = [self._read(rank).get("copies", 0) for rank in range(1, self.world_size)]
        now = self._copies + sum(others)
        progress(now - self._told)
        self._told = now

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, default=str)
        write_atomically(self.folder / f"process-{self.rank}.json", lambda file: file.write(text.encode()))

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            return json.loads((self.folder / f"process-{rank}.json").read_text())
        except (OSError, ValueError):
            return {}


def _result(said: dict[str, Any]) -> Result:
    """From `Crew.report`'s JSON; what a process had made that did not come to report."""
    if "result" not in said:
        return Result(copies_made=said.get("copies", 0))
    values = dict(said["result"])
    failures = [Failure(Path(failure["image"]), failure["reason"]) for failure in values.pop("failures")]
    return Result(**values, failures=failures)


def _remove_abandoned(folder: Path) -> None:
    """The folders of runs whose first process was killed: on this machine, or long ago on another."""
    for work in folder.glob(".work-*"):
        host, process = work.name.removeprefix(".work-").rsplit("-", 2)[:2]
        newest = max((file.stat().st_mtime for file in [work, *work.glob("*")]), default=0)
        killed_here = host == socket.gethostname() and not is_running(int(process))
        if killed_here or time.time() - newest > 10 * LIFETIME:
            shutil.rmtree(work, ignore_errors=True)
