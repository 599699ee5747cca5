"""Prepare a model for sampling: memory layout, torch.compile, and moving parts to a small device in turns."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.ldm.packed import pack_weights

MOST_SHAPES = 64
"""Batch shapes to compile for.  Photographs come in more sizes than torch's default limit of 8."""

log = logging.getLogger(__name__)


def make_ready(model: ControlLDM, *, compile: bool = False, low_memory: bool = False) -> None:
    """Apply the optimisations that suit the model's device; its outputs change by rounding alone.

    GPU: channels-last convolution weights.  CPU: packed weights (ldm/packed.py).
    compile: torch.compile the denoising step and the decoder, which takes minutes for each picture size in each run.
    low_memory: change neither layout nor device of the weights.
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
    """A compiled function that falls back to the plain one where torch.compile fails, as without a compiler."""

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
    """Within the context the networks' tensors are on `device`; on leaving, the original tensors are put back."""
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
    """The tensor on the device; convolution weights channels last on a GPU."""
    channels_last = tensor.ndim == 4 and device.type == "cuda"
    return tensor.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
