"""Python commands in processes that are forked from one that has imported the libraries, which takes seconds, once.

Apart from that they are what `python main.py ...` starts: the project's own modules are imported anew, and signals,
exit codes, the working directory and the environment are the process's own.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).parent.parent
LIBRARIES = [
    *("torchvision_compat", "torchvision", "lightning_fabric", "transformers.models.clip.modeling_clip"),
    *("pydantic.dataclasses", "cv2", "tensorboardX", "matplotlib.backends.backend_agg"),
]
"""What the commands import besides the project."""


class Command:
    """A running command, with what subprocess.Popen has of it: pid, poll, wait, kill, communicate and returncode."""

    def __init__(self, words, cwd: Path = REPOSITORY, env: Mapping[str, str] | None = None, new_session: bool = False):
        """words: what follows `python` on the command line; env: beside this process's variables."""
        self._folder = tempfile.TemporaryDirectory()
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self._outputs = [os.path.join(self._folder.name, name) for name in ("out", "err")]
        self._words = [str(word) for word in words]
        arguments = (self._words, str(cwd), env, self._outputs, new_session)
        self._process = context.Process(target=_run, args=arguments)
        with mock.patch.dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1"):
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = 600) -> tuple[str, str]:
        """Wait until it has ended, or kill it; -> what it has written to its output and to its errors."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return tuple(Path(file).read_text(encoding="utf-8", errors="backslashreplace") for file in self._outputs)

    def completed(self) -> subprocess.CompletedProcess:
        """Its exit code and what it has written, when it has ended."""
        out, err = self.communicate()
        return subprocess.CompletedProcess(self._words, self.returncode, out, err)


def run(words, **options) -> subprocess.CompletedProcess:
    """A command that has ended, as from subprocess.run."""
    return Command(words, **options).completed()


def _run(words: list[str], cwd: str, env: dict[str, str], outputs: list[str], new_session: bool) -> None:
    """What Python does with a command line, in a process that has been forked."""
    multiprocessing.set_start_method("fork", force=True)  # Linux's own, not that of this process
    if new_session:
        os.setsid()
    for descriptor, file in enumerate(outputs, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    option = words[0] in ("-m", "-c")
    name, sys.argv = words[option], words[option:]
    path = [cwd if option else os.path.dirname(os.path.abspath(name)), *env.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:] = [*filter(None, path), *(entry for entry in sys.path if entry not in ("", str(REPOSITORY)))]
    try:
        if words[0] == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(name, {"__name__": "__main__"})
        else:
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
