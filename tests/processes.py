"""main.py run several times in one process, or under torchrun in several, with networks whose images are independent.

    python -m tests.processes CONFIG ...

A batch norm's statistics are those of the images that a process sees at a time, as in all training on several
devices.  Kept at their start they make a network that gives an image the same outputs whatever is beside it: how a
batch is divided can then change nothing but rounding.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from torch import nn

import main
from convs import BACKBONES, Backbone
from tests import forks
from tests.forks import REPOSITORY


@contextmanager
def norms_kept() -> Iterator[None]:
    """For a while, let no batch norm look at its batch."""
    original = nn.BatchNorm2d.train
    nn.BatchNorm2d.train = lambda norm, mode=True: nn.Module.train(norm, False)
    try:
        yield
    finally:
        nn.BatchNorm2d.train = original


def run_all(files) -> int:
    """The first exit code that is not 0, or 0."""
    adapters = Backbone("basic", depths=(1, 1), widths=(16, 32), extra="adapters")
    with norms_kept(), mock.patch.dict(BACKBONES, {"little_rep": adapters}):
        return next((code for file in files if (code := main.main(["--config", str(file)])) != 0), 0)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(command: str, arguments: Sequence, number: int = 2, **variables: str) -> list[subprocess.CompletedProcess]:
    """A command's module, such as "compress.run", in several processes that work together, without torchrun.

    variables: of the environment, in place of torchrun's.  number 1: alone, without any.
    """
    together = {"WORLD_SIZE": f"{number}", "LOCAL_WORLD_SIZE": f"{number}", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": "{rank}", "LOCAL_RANK": "{rank}"}
    variables = {} if number == 1 else variables or together
    started = []
    for rank in range(number):
        of_rank = {name: value.format(rank=rank) for name, value in variables.items()}
        started.append(forks.Command(["-m", command, *arguments], env=of_rank))
    return [process.completed() for process in started]


def torchrun(*arguments) -> list[str]:
    """A command in two processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return [*launcher, *map(str, arguments)]


def start(command, environment, **options) -> subprocess.Popen:
    """A command in the repository, each of its processes with one thread."""
    variables = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, **options)


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
