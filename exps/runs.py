"""Commands that experiments of many runs start, and what happens to them when the experiment is stopped; the GPUs that
each may have."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from utils.cli import nb_cores

ROOT = Path(__file__).resolve().parent.parent
MAIN, COMPRESS, MEASURE = ("main.py",), ("compress/run.py",), ("-m", "compress.measure")
Input = TypeVar("Input")
Output = TypeVar("Output")

PATIENCE = 60.0
"""Seconds that a command has for its checkpoint after SIGTERM, before it is killed."""


class Children:
    """The commands that this process has started and that still run.  Threads may start and end them."""

    def __init__(self):
        self._running: list[subprocess.Popen] = []
        self._lock = threading.Lock()

    def start(self, program: Sequence[str], arguments: Sequence[str], variables: Mapping[str, str], **options):
        """A command of this project with this Python, from the caller's folder.  variables: of its environment."""
        script = program if program[0] == "-m" else (str(ROOT / program[0]),)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **variables, "PYTHONPATH": path}
        with self._lock:
            process = subprocess.Popen([sys.executable, *script, *arguments], env=environment, **options)
            self._running = [*self._still_running(), process]
        return process

    def _still_running(self) -> list[subprocess.Popen]:
        return [process for process in self._running if process.poll() is None]

    def stop(self) -> None:
        """Ask all of them to end, and kill those that have not after PATIENCE seconds."""
        limit = time.monotonic() + PATIENCE
        while True:  # a thread may start one more in the meantime
            with self._lock:
                running = self._still_running()
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
    """Run a command of this project and keep what it prints.

    variables: of its environment, unless the user has set them; CUDA_VISIBLE_DEVICES in any case, which `gpu` chooses
    out of what the user has set.
    """
    own = {name: v for name, v in variables.items() if name not in os.environ or name == "CUDA_VISIBLE_DEVICES"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with stopped_together():
        process = children.start(program, arguments, own, text=True, errors="replace", **pipes)
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def follow(program: Sequence[str], *arguments: str) -> int:
    """Run a command of this project as if the user had typed it, and return its exit code.

    A signal stops it as it would alone.
    """
    with stopped_together():
        return children.start(program, arguments, {}).wait()


def last_words(done: subprocess.CompletedProcess) -> str:
    """The message of a command that failed, with the indented lines that belong to it."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    if start is None:
        return lines[-1] if lines else "no message"
    message = [lines[start].removeprefix("error: ")]
    message += itertools.takewhile(lambda line: line.startswith(" "), lines[start + 1 :])
    return "\n".join(message)


def as_overrides(keys: Mapping[str, Any]) -> list[str]:
    """Keys of main.py as it takes them on the command line, such as "milestones=[5,8]"."""
    texts = {key: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for key, v in keys.items()}
    return [f"{key}={text}" for key, text in texts.items()]


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


def for_each(values: Iterable[Input], function: Callable[[Input], Output], jobs: int) -> list[Output]:
    """A function's results, in the values' order; each call waits for a command, `jobs` at a time."""
    with pool_of(jobs) as pool:
        return list(pool.map(function, values))


def visible_gpus() -> list[str]:
    """The GPUs of this machine that the user lets this process see, as CUDA_VISIBLE_DEVICES names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True)
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
        for share in itertools.count():  # first a GPU that nobody has, then one that one run has, ...
            for name in gpus:
                lock = FileLock(Path(tempfile.gettempdir()) / f"escort-gpu-{os.getuid()}-{name}-{share}.lock")
                try:
                    stack.enter_context(lock.acquire(blocking=False))
                except Timeout:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": name}
                return
