"""A GPU of its own for each of several runs on one machine."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import run
from typing import Any

from filelock import FileLock, Timeout


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
