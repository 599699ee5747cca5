"""Commands that experiments of many runs start, and what happens to them when the experiment is stopped."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from utils.cli import nb_cores
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAIN, COMPRESS = ("main.py",), ("compress/run.py",)
MEASURE = ("-m", "compress.measure")
Input = TypeVar("Input")
Output = TypeVar("Output")

PATIENCE = 60.0
"""Seconds that a command has for its checkpoint after SIGTERM, before it is killed."""


class Children:
    """The commands that this process has started and that still run.  Threads may start and end them."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def start(self, program: Sequence[str], arguments: Sequence[str], variables: Mapping[str, str], **options):
        """A command of this project with this Python, from the caller's folder.  variables: of its environment."""
        script = program if program[0] == "-m" else (str(ROOT / program[0]),)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **variables, "PYTHONPATH": path}
        with self._lock:
            process = subprocess.Popen([sys.executable, *script, *arguments], env=environment, **options)
            self._running.add(process)
        return process

    def ended(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """Ask all of them to end, and kill those that have not after PATIENCE seconds."""
        limit = time.monotonic() + PATIENCE
        while True:  # a thread may start one more in the meantime
            with self._lock:
                running = [process for process in self._running if process.poll() is None]
            if not running:
                return
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(max(0.0, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()


children = Children()
"""Those of this process."""


@contextmanager
def stopped_together() -> Iterator[None]:
    """Where this process is stopped inside, by a signal or an error, its commands are stopped before it goes on."""
    try:
        yield
    except BaseException:
        children.stop()
        raise


def call(program: Sequence[str], *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a command of this project and keep what it prints.  variables: of its environment, unless set by the user."""
    own = {name: value for name, value in variables.items() if name not in os.environ or name in ASSIGNED}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with stopped_together():
        process = children.start(program, arguments, own, text=True, errors="replace", **pipes)
        out, err = process.communicate()
    children.ended(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


ASSIGNED = ("CUDA_VISIBLE_DEVICES",)
"""Variables that a run is given even where the user has set them, out of what the user has set."""


def follow(program: Sequence[str], *arguments: str) -> int:
    """Run a command of this project as if the user had typed it, and return its exit code.

    A signal stops it as it would alone.
    """
    with stopped_together():
        process = children.start(program, arguments, {})
        code = process.wait()
    children.ended(process)
    return code


def last_words(done: subprocess.CompletedProcess) -> str:
    """The message of a command that failed, with the indented lines that belong to it."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    if start is None:
        return lines[-1] if lines else "no message"
    end = start + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    return "\n".join(lines[start:end]).removeprefix("error: ")


def measured(config: Mapping[str, Any], forms: Sequence[str], settings: str, *more: str) -> dict[str, Any]:
    """What `compress.measure` says of a dataset's forms.  config: dataset and data_dir.  Raises UserError."""
    where = ["--data-dir", config["data_dir"]] if config.get("data_dir") else []
    words = ["--dataset", config["dataset"], "--forms", ",".join(forms), f"--settings={settings}", *more]
    done = call(MEASURE, *where, *words)
    if done.returncode:
        raise UserError(last_words(done))
    return json.loads(done.stdout.splitlines()[-1])


def threads(jobs: int) -> dict[str, str]:
    """The environment of each of several commands that share the cores equally."""
    return {"OMP_NUM_THREADS": str(max(1, nb_cores() // jobs))}


@contextmanager
def pool_of(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for commands.  When this process is stopped, what waits is not begun and what runs is ended."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        children.stop()
        raise
    finally:
        pool.shutdown()


def for_each(values: Iterable[Input], function: Callable[[Input], Output], jobs: int | None = None) -> list[Output]:
    """A function's results, in the values' order; each call waits for a command, `jobs` (one a core) at a time."""
    with pool_of(jobs or nb_cores()) as pool:
        return list(pool.map(function, values))
