"""A model made ready for sampling: how it lies in memory, compiled steps, parts that visit a small device in turns."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.ldm.packed import pack_weights

MOST_SHAPES = 64
"""Shapes of a batch that are compiled for; torch's own limit of 8 is less than the sizes that photographs come in."""

log = logging.getLogger(__name__)


def make_ready(model: ControlLDM, *, compile: bool = False, low_memory: bool = False) -> None:
    """Choose, by device, what is fastest there; the model's outputs change by rounding alone.

    GPU: convolution weights channels last, the order that tensor cores read.  CPU: packed weights (ldm/packed.py).
    compile: torch.compile for the denoising step and the decoder; takes minutes for each size of picture, once a run.
    low_memory: leave the weights where and as they are.
    """
    if compile:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
        freeze = model.device.type == "cpu" and not low_memory  # weights as constants, which it then packs
        for name in ("apply_model", "decode_first_stage"):
            if not isinstance(getattr(model, name), _Compiled):
                setattr(model, name, _Compiled(getattr(model, name), {"freezing": True} if freeze else None))
    if low_memory:
        return
    if model.device.type != "cpu":
        model.to(memory_format=torch.channels_last)
    elif not compile:
        for name, part in model.named_children():
            if name != "cond_stage_model":  # runs once a text
                pack_weights(part)


class _Compiled:
    """A function through torch.compile; where that fails, as without a compiler, the function itself."""

    def __init__(self, function: Callable, options: dict | None):
        self.plain = function
        self.function = torch.compile(function, dynamic=False, options=options)

    def __call__(self, *args, **kwargs):
        try:
            return self.function(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            log.warning("torch.compile does not work here, going on without it: %s", reason)
            self.function = self.plain
            return self.plain(*args, **kwargs)


@contextmanager
def visiting(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """Inside, the networks' tensors are on the device; afterwards they are what they were, without a copy back."""
    tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = moved(tensor.data, device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a convolution's weight channels last on a GPU."""
    channels_last = tensor.ndim == 4 and device.type == "cuda"
    return tensor.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
