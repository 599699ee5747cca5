"""Devices and processes, through Lightning Fabric: one CPU or GPU, several, or the processes of torchrun or SLURM.

Fabric imports torchmetrics only to see whether it is installed, which takes seconds (transformers, scipy) and serves
two monitors that this project does not use.  Import Fabric from here.
"""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
import atexit
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from utils.errors import UserError

if "torchmetrics" not in sys.modules:
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # "not installed", for the time of this import
    try:
        importlib.import_module("lightning_fabric")
    finally:
        del sys.modules["torchmetrics"]

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.strategies import DDPStrategy

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # a process may make copies alone for hours; where one ends, torchrun ends the others
_ENDED = "escort: exit code of the first process that ended"
_LEFT = "escort: processes that know"

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

_device: torch.device | None = None  # of the Fabric that was launched last


def launch(device: str | list[int], precision: Precision = "32-true", patience: timedelta | None = None) -> Fabric:
    """The launched Fabric.  On GPUs too float32 is float32, which cuDNN would round to TensorFloat-32's 10 bits, and
    kernels are not chosen by timing (cudnn.benchmark), so that equal runs choose equal ones.

    device: auto, cpu, cuda, cuda:N or the indices of CUDA devices; which ones is ignored where torchrun or SLURM has
    started the processes; patience: how long a process waits for the others, where they work separately and meet at the
    end (through gloo); None for processes that train together.
    Raises UserError for a device that is not there, more processes than GPUs, or a precision that the device lacks.
    """
    per_node, nodes = _started_processes()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(device, str) and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"a device is auto, cpu, cuda or cuda:N, not {device!r}.")
    on_cpu = device == "cpu" or (device == "auto" and not gpus)
    devices: int | list[int] = 1
    if per_node * nodes > 1:
        if not on_cpu and per_node > gpus:
            raise UserError(f"{per_node} processes were started on this machine, which has {gpus} GPUs for them.")
        devices = per_node
    elif not on_cpu:
        devices = device if isinstance(device, list) else [int(device.partition(":")[2] or 0)]
        if max(devices) >= gpus:
            available = f"this machine has CUDA devices 0 to {gpus - 1}" if gpus else "this machine has no CUDA device"
            raise UserError(f'there is no device cuda:{max(devices)}; {available}. Choose another, or "cpu".')
    if precision == "16-mixed" and on_cpu:
        raise UserError("precision: 16-mixed needs a GPU, and this runs on the CPU. Use 32-true or bf16-mixed.")
    accelerator = "cpu" if on_cpu else "cuda"
    strategy: DDPStrategy | Literal["auto"] = "auto"
    if per_node * nodes > 1 or (isinstance(devices, list) and len(devices) > 1):
        backend = None if patience is None else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, timeout=patience or _PATIENCE)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, precision=precision, strategy=strategy)
    fabric.launch()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    global _device
    _device = fabric.device
    if torch.distributed.is_initialized():
        atexit.register(_leave)
        fabric.barrier()  # a process that fails at once must not cut connections that another one still makes
    return fabric


def process_device() -> torch.device:
    """This process's device, in all of its threads: the launched Fabric's, else the first GPU or the CPU."""
    return _device or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _leave() -> None:
    """Destroy the process group at exit: under gloo, a rank that exits early can crash one that is shutting down."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_together(code: int) -> tuple[int, bool]:
    """Let the processes of a run end, one of them after an error or a signal.

    Returns the exit code of the first that ends, and whether it is this one, which then says why.
    """
    store, world_size = _get_default_store(), torch.distributed.get_world_size()
    own = f"{code} {torch.distributed.get_rank()}"
    try:
        first = store.compare_set(_ENDED, "", own).decode()
        store.add(_LEFT, 1)
        if torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()  # others that wait for this process fail now
        if own.endswith(" 0") and "TORCHELASTIC_RUN_ID" not in os.environ:  # this process has the store
            deadline = time.monotonic() + 5
            while store.add(_LEFT, 0) < world_size and time.monotonic() < deadline:
                time.sleep(0.05)
        return int(first.partition(" ")[0]), first == own
    except RuntimeError:  # the process that had the store has ended before
        return code, False


def ended_by_another(error: Exception) -> tuple[int, str] | None:
    """The exit code, and a message or "", where an error is but the end of another process; else None."""
    store = _get_default_store()
    try:
        if store.check([_ENDED]):
            store.add(_LEFT, 1)
            return int(store.get(_ENDED).decode().partition(" ")[0]), ""
    except RuntimeError:
        return 2, ""
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
        return 1, "another process of this run has ended without a message (killed, or out of memory?)"
    return None


def _started_processes() -> tuple[int, int]:
    """(processes on each node, nodes) that torchrun or SLURM has started; (1, 1) without them.

    Raises UserError where SLURM has several tasks but srun has not started them, or where it does not say how many
    tasks a node has.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    try:
        if not SLURMEnvironment.detect() or (tasks := int(os.environ["SLURM_NTASKS"])) == 1:
            return 1, 1
        if not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys():
            raise UserError(
                f"SLURM's job has {tasks} tasks, but srun has not started this process: the others would never join. "
                "Put srun before the command, or use --ntasks=1."
            )
        SLURMEnvironment()  # checks its variables
        return int(os.environ["SLURM_NTASKS_PER_NODE"]), int(os.environ["SLURM_NNODES"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"SLURM's variables don't say how many tasks a node has ({error}). Use srun --ntasks-per-node."
        ) from error


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work on a device, as without a C++ compiler."""
    torch.compiler.reset()
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # compilers raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"compile: torch.compile does not work here ({reason[:200]}). Set compile to false.") from error


# What processes tell each other


def all_reduce(fabric: Fabric, tensor: Tensor, op: str) -> Tensor:
    """Fabric's, of one tensor.  op: "sum", "mean" or "max"."""
    return cast(Tensor, fabric.all_reduce(tensor, reduce_op=op))


def by_all(fabric: Fabric, function: Callable[[], T]) -> list[T]:
    """What each process's call returns, by rank, in all of them.  UserErrors end them all; process 0 prints one."""
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


def by_first(fabric: Fabric, function: Callable[[], T]) -> T:
    """What process 0's call returns, in all of them.  A UserError ends them all, and is printed by process 0."""
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
