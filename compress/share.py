"""One plan for all the processes that torchrun or SLURM has started, and one summary (through Lightning Fabric)."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed
from lightning_fabric import Fabric

from compress.plan import Plan
from compress.result import Result
from utils.errors import UserError

PATIENCE = timedelta(days=30)
"""How long a process that is done waits for the others: their shares may take very unequal times."""

T = TypeVar("T")


def by_first(fabric: Fabric, function: Callable[[], T]) -> T | None:
    """What process 0's call returns; None in the others, which wait for it.

    What it raises for the user ends them all, and is told by process 0 alone.
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


def deal(fabric: Fabric, plan: Plan | None) -> Plan:
    """This process's part of the plan of process 0 (None in the others).

    As one process has looked at the disk, before any has written, no copy is made twice and none is left out.
    """
    if fabric.world_size == 1:
        return plan
    shares = [plan.share(rank, fabric.world_size) for rank in range(fabric.world_size)] if plan else None
    mine: list[Plan] = [None]
    torch.distributed.scatter_object_list(mine, shares)
    return mine[0]


def gather(fabric: Fabric, result: Result) -> Result:
    """The sum of all processes' results, once all are done."""
    if fabric.world_size == 1:
        return result
    results: list[Result] = [None] * fabric.world_size
    torch.distributed.all_gather_object(results, result)
    whole = Result()
    for part in results:
        whole.add(part)
    return whole
