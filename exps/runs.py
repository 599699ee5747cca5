"""Commands that experiments of many runs start: one at a time with its output, or several side by side."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from utils import log as logs
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MAIN, COMPRESS = ("main.py",), ("compress/run.py",)
MEASURE = ("-m", "compress.measure")
Input, Output = TypeVar("Input"), TypeVar("Output")
_BUSY = "another process is working on"
"""main.py's words where a run of an earlier, killed sweep still goes on."""


def call(program: Sequence[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of this project with this Python, from the caller's folder, and keep what it prints.

    It waits while another process works on the same run.
    """
    script = program if program[0] == "-m" else (str(ROOT / program[0]),)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *script, *arguments]
    while True:
        done = subprocess.run(
            command,
            env={**environment, **os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if not done.returncode or _BUSY not in done.stderr:
            return done
        time.sleep(5)


def follow(program: Sequence[str], *arguments: str) -> int:
    """Run a command of this project as if the user had typed it, and return its exit code.

    A signal stops it as it would alone; it has a minute for that.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / program[0]), *arguments]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def last_words(done: subprocess.CompletedProcess) -> str:
    """The message of a command that failed."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    message = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no message")
    return message.removeprefix("error: ")


def measured(config: Mapping[str, Any], forms: Sequence[str], settings: str, *more: str) -> dict[str, Any]:
    """What `compress.measure` says of a dataset's forms.  config: dataset and data_dir.  Raises UserError."""
    where = ["--data-dir", config["data_dir"]] if config.get("data_dir") else []
    words = ["--dataset", config["dataset"], "--forms", ",".join(forms), f"--settings={settings}", *more]
    done = call(MEASURE, *where, *words)
    if done.returncode:
        raise UserError(last_words(done))
    return json.loads(done.stdout.splitlines()[-1])


def nb_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(jobs: int) -> dict[str, str]:
    """The environment of each of several commands that share the cores equally."""
    return {"OMP_NUM_THREADS": str(max(1, nb_cores() // jobs))}


def for_each(values: Iterable[Input], function: Callable[[Input], Output], jobs: int | None = None) -> list[Output]:
    """A function's results, in the values' order; each call waits for a command, `jobs` (one a core) at a time."""
    with ThreadPoolExecutor(jobs or nb_cores()) as pool:
        return list(pool.map(function, values))


def side_by_side(todo: Mapping[Hashable, Sequence[str]], jobs: int) -> dict[Hashable, str]:
    """Run main.py with each value's arguments, `jobs` at a time, sharing the cores equally.

    Returns the last words of what failed, by key.
    """
    failed = {}
    with ThreadPoolExecutor(jobs) as pool, logs.progress(len(todo), "runs") as bar:
        futures = {pool.submit(call, MAIN, *arguments, **threads(jobs)): key for key, arguments in todo.items()}
        try:
            for future in as_completed(futures):
                key, done = futures[future], future.result()
                if done.returncode:
                    failed[key] = last_words(done)
                bar.set_postfix_str(str(key), refresh=False)
                bar.update()
        except KeyboardInterrupt:  # the runs have had it too, and stop; those that wait need not begin
            pool.shutdown(cancel_futures=True)
            raise
    return failed
