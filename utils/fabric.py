"""Lightning Fabric, imported without torchmetrics.

Fabric imports torchmetrics only to see whether it is installed, which takes seconds (transformers, scipy) and serves
two monitors that this project does not use.  Import Fabric from here.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch.distributed
from torch import Tensor

from utils.errors import UserError

if "torchmetrics" not in sys.modules:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # "not installed", for the time of this import
    try:
        importlib.import_module("lightning_fabric")
    finally:
        del sys.modules["torchmetrics"]

from lightning_fabric import Fabric

T = TypeVar("T")


def all_reduce(fabric: Fabric, tensor: Tensor, op: str) -> Tensor:
    """Fabric's, of one tensor.  op: "sum", "mean" or "max"."""
    return cast(Tensor, fabric.all_reduce(tensor, reduce_op=op))


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


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """For what all processes do alike: a UserError that all meet is printed by process 0 alone."""
    try:
        yield
    except UserError:
        if fabric.is_global_zero:
            raise
        raise SystemExit(2) from None


def own_part(fabric: Fabric, items: Sequence[T]) -> Sequence[T]:
    """Every n-th of the items, for each of n processes."""
    return items[fabric.global_rank :: fabric.world_size]
