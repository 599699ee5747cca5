"""The work of all processes that torchrun or SLURM has started (through Lightning Fabric): one plan, one summary."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed

from compress.plan import Plan
from compress.regenerate import Progress, Regenerator
from compress.result import Result
from utils.errors import UserError
from utils.fabric import Fabric

PATIENCE = timedelta(days=30)
"""How long a process may wait for the others, whose disks and GPUs may be slower."""

T = TypeVar("T")


def by_first(fabric: Fabric, function: Callable[[], T]) -> T:
    """What process 0's call returns, in all of them.

    A UserError that it raises ends them all, and is printed by process 0 alone.
    """
    value: Any = None
    error: UserError | None = None
    if fabric.is_global_zero:
        try:
            value = function()
        except UserError as raised:
            error = raised
    value, failed = fabric.broadcast((value, error is not None))
    if failed:
        raise error or SystemExit(2)
    return value


def by_all(fabric: Fabric, function: Callable[[], T]) -> list[T]:
    """What each process's call returns, by rank, in all of them.

    UserErrors end them all; the first one is printed by process 0.
    """
    value: Any = None
    error: str | None = None
    try:
        value = function()
    except UserError as raised:
        error = str(raised)
    values: list[Any] = [(value, error)] * fabric.world_size
    if fabric.world_size > 1:
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
    """Make every n-th task of a plan, which is the same in all n processes.  Returns the result of all, in all of them.

    A process that dies ends the run (torchrun ends the others, srun --kill-on-bad-exit=1 too), and the same command
    makes the rest.  progress: in each process, called with the numbers of copies that it has made.
    """
    result = regenerator.run(plan, progress, own_part(fabric, plan.tasks))
    whole = Result()
    for part in by_all(fabric, lambda: result):
        whole.add(part)
    return whole
