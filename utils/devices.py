"""Starting devices and processes, with Lightning Fabric: one CPU or GPU, several, torchrun's processes, SLURM's."""

import torchvision_compat  # noqa: F401  (before torchvision and Lightning)

# isort: split
import atexit
import os
from datetime import timedelta

import torch

from utils.errors import UserError
from utils.fabric import Fabric

# isort: split
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.strategies import DDPStrategy


def launch(
    accelerator: str, devices: int | list[int], precision: str = "32-true", patience: timedelta | None = None
) -> Fabric:
    """The launched Fabric.

    accelerator: "auto", "cpu" or "cuda"; devices: how many, or which ones.  Where torchrun or SLURM has started the
    processes, it says how many there are, and `devices` gives way.
    patience: for processes that only meet at the end of long and unequal work, how long one may wait for another; they
    then talk over the network of the CPUs.  None for processes that train together.
    Raises UserError for a device that this machine has not, for more processes than it has GPUs, and for a precision
    that the device has not.
    """
    per_node, nodes = started_processes()
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "auto":
        accelerator = "cuda" if found else "cpu"
    if per_node * nodes > 1:
        if accelerator == "cuda" and per_node > found:
            raise UserError(f"{per_node} processes were started on this machine, which shows them {found} GPUs.")
        devices = per_node
    elif accelerator == "cuda":
        asked = max(devices) if isinstance(devices, list) else devices - 1
        if asked >= found:
            there = f"this machine has CUDA devices 0 to {found - 1}" if found else "this machine has no CUDA device"
            raise UserError(f'device cuda:{asked} is not there; {there}. Choose another, or "cpu".')
    if precision == "16-mixed" and accelerator == "cpu":
        raise UserError("precision: 16-mixed needs a GPU, and this runs on the CPU. Take 32-true or bf16-mixed.")
    strategy = "auto"
    if patience is not None and per_node * nodes > 1:
        strategy = DDPStrategy(process_group_backend="gloo", timeout=patience)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, precision=precision, strategy=strategy)
    fabric.launch()
    if torch.distributed.is_initialized():
        atexit.register(_part)
    return fabric


def _part() -> None:
    """A process that ends in the midst of its connections may bring another down that is about to end too (gloo)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def started_processes() -> tuple[int, int]:
    """(processes on each node, nodes), as torchrun or SLURM has started them; (1, 1) where neither has.

    Raises UserError where SLURM does not say how many tasks a node has.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_WORLD_SIZE"])
    try:
        if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
            SLURMEnvironment()  # looks at its variables
            return int(os.environ["SLURM_NTASKS_PER_NODE"]), int(os.environ["SLURM_NNODES"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"SLURM's variables don't say what was started: {error}. Use srun --ntasks-per-node."
        ) from error
    return 1, 1


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile does not work for a device, as without a C++ compiler."""
    torch.compiler.reset()
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler may say
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = said[0] if said else type(error).__name__
        raise UserError(f"compile: torch.compile does not work here ({reason[:200]}). Set compile to false.") from error


def nb_cores() -> int:
    """CPU cores that this process may use (macOS only tells how many there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator(device: str) -> tuple[str, int | list[int]]:
    """A device's name as Lightning Fabric's (accelerator, devices): auto, cpu, cuda, cuda:N.

    Raises UserError for another.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and index.isdecimal():
        return "cuda", [int(index)]
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"a device is auto, cpu, cuda or cuda:N, not {device!r}.")
    return device, 1
