"""Prepare a model for sampling: memory layout, torch.compile, OpenVINO, and moving parts to a small device in turns."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.openvino_engine import use_openvino
from ControlNet.ldm.packed import pack_weights

MOST_SHAPES = 64
"""Batch shapes to compile for.  Photographs come in more sizes than torch's default limit of 8."""

log = logging.getLogger(__name__)


def make_ready(model: ControlLDM, *, engine: str = "torch", low_memory: bool = False, precision: str = "fp32") -> None:
    """Apply the optimisations that suit the model's device; its outputs change by rounding alone.

    engine: "torch" (GPU: channels-last convolution weights; CPU: packed weights, see ldm/packed.py); "compile":
    torch.compile the denoising step, on a GPU as CUDA graphs, and the decoder, which takes minutes for each picture
    size in each run; "openvino": see openvino_engine.py, with this precision.
    low_memory: change neither layout nor device of the weights.
    """
    on_cpu = model.device.type == "cpu"
    if engine == "openvino":
        use_openvino(model, precision)
        return
    if engine == "compile":
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
        freeze = {"freezing": True} if on_cpu and not low_memory else None  # weights as constants, which it then packs
        graphs = {"triton.cudagraphs": True} if not on_cpu and not low_memory else None
        for name, options in (("apply_model", freeze or graphs), ("decode_first_stage", freeze)):
            if not isinstance(getattr(model, name), _Compiled):
                setattr(model, name, _Compiled(getattr(model, name), options))
    if low_memory:
        return
    if not on_cpu:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    elif engine != "compile":
        for name, part in model.named_children():
            if name != "cond_stage_model":  # runs once a text
                pack_weights(part)


def release(model: ControlLDM) -> None:
    """Take away what `make_ready` put on a model, which refers back to it: the model is freed with its last owner."""
    for name in ("apply_model", "decode_first_stage"):
        vars(model).pop(name, None)


def is_out_of_memory(error: Exception) -> bool:
    """A GPU's allocator has an error of its own; cuDNN, cuBLAS and the CPU's allocator say so in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def pin(*networks: nn.Module) -> None:
    """Put tensors into page-locked memory, from which they get to a GPU several times as fast.

    Where the system does not lock as much, the others stay as they are.
    """
    try:
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.data = tensor.data.pin_memory()
    except RuntimeError as error:
        log.warning("no more page-locked memory, weights get to the GPU more slowly: %s", str(error).splitlines()[0])


class _Compiled:
    """A compiled function that falls back to the plain one where torch.compile fails, as without a compiler.

    CUDA graphs write all results of a function to the same memory: they are copied, so that they outlast the next call.
    """

    def __init__(self, function: Callable, options: dict | None):
        self.plain = function
        self.graphs = bool(options and options.get("triton.cudagraphs"))
        self.function = torch.compile(function, dynamic=False, options=options)

    def __call__(self, *args, **kwargs):
        if self.function is self.plain:
            return self.plain(*args, **kwargs)
        try:
            result = self.function(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ImportError, OSError) as error:
            if is_out_of_memory(error):
                raise
            cause = getattr(error, "inner_exception", error)
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            result = self.plain(*args, **kwargs)  # what fails here too is no fault of torch.compile
            log.warning("torch.compile does not work here, going on without it: %s", reason)
            self.function = self.plain
            return result
        if not self.graphs:
            return result
        for deep in [arg["deep"] for arg in args if isinstance(arg, dict) and arg.get("deep") is not None]:
            deep.features = deep.features.clone()
        return result.clone()


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
    """The tensor on the device; convolution weights channels last on a GPU.  Pinned memory is copied meanwhile."""
    on_device = tensor.to(device, non_blocking=tensor.is_pinned())
    channels_last = tensor.ndim == 4 and device.type == "cuda"
    return on_device.to(memory_format=torch.channels_last) if channels_last else on_device
