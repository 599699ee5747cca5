"""Prepare a model for sampling: packed weights, torch.compile, OpenVINO, parts that visit a small device in turns."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ControlNet.cldm.cldm import ControlLDM
from ControlNet.cldm.openvino_engine import use_openvino

MOST_SHAPES = 64
"""Batch shapes to compile for.  Photographs come in more sizes than torch's default limit of 8."""

log = logging.getLogger(__name__)


def make_ready(model: ControlLDM, *, engine: str = "torch", low_memory: bool = False, precision: str = "fp32") -> None:
    """Apply the optimisations that suit the model's device; its outputs change by rounding alone.

    engine: "torch" (GPU: channels-last convolution weights; CPU: packed weights); "compile": torch.compile the
    denoising step, on a GPU as CUDA graphs, and the decoder, which takes minutes for each picture size in each run;
    "openvino": see openvino_engine.py, with this precision.
    low_memory: change neither layout nor device of the weights.
    """
    on_cpu = model.device.type == "cpu"
    if engine == "openvino":
        use_openvino(model, precision)
        pack_weights(model.control_model.input_hint_block)  # which torch still computes, as the encoder
        pack_weights(model.first_stage_model.encoder)
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


_OPS = torch.ops.mkldnn  # no public name, but what torch.compile's back end for CPUs is built on


@functools.cache
def _computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in it on this CPU."""
    ask = getattr(_OPS, "_is_mkldnn_bf16_supported", lambda: False)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ask())


class _Packed:
    """A layer whose weight is reordered once, instead of at every call, into the blocks that oneDNN computes from.

    Given plain weights, a convolution reorders them at each call, which at the UNet's small feature maps takes longer
    than the arithmetic; a plain linear layer goes through MKL, which is slower than oneDNN on AMD processors.  Measured
    at full size, 256x256 pictures, a step of one copy: 1.5 times the speed, in float32 on an AMD EPYC and in bfloat16
    on a Xeon with AMX, for as much memory again as the weights take.
    The packed weight is made when it is first needed, and made again after the weight has changed.
    """

    weight: Tensor
    _pack: Callable[[Tensor, Tensor], Tensor]
    """(weight, input) -> packed weight."""

    def _packed(self, x: Tensor) -> Tensor | None:
        """The weight for input x; None where the plain one is used: on a GPU, in training, for other precisions."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weight = self.weight
        if x.dtype != weight.dtype or not _computes(x.dtype):
            return None
        key = (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        if self.__dict__.get("_key") != key:
            self.__dict__.update(_key=key, _packed_weight=self._pack(weight.detach(), x))
        return self.__dict__["_packed_weight"]

    def __getstate__(self) -> dict:
        """Copies and pickles make their own: the blocks are no memory that could be copied."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_key", "_packed_weight")}


class PackedConv2d(_Packed, nn.Conv2d):
    def _pack(self, weight: Tensor, x: Tensor) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        shape = list(x.shape)
        return reorder(weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, shape)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._packed(x)
        if weight is None:
            return super().forward(x)
        return _OPS._convolution_pointwise(
            x, weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


class PackedLinear(_Packed, nn.Linear):
    def _pack(self, weight: Tensor, x: Tensor) -> Tensor:
        return _OPS._reorder_linear_weight(weight, x.shape[:-1].numel())

    def forward(self, x: Tensor) -> Tensor:
        weight = self._packed(x)
        if weight is None:
            return super().forward(x)
        return _OPS._linear_pointwise(x, weight, self.bias, "none", [], "")


def pack_weights(network: nn.Module) -> None:
    """Turn the network's convolutions and linear layers into packed ones, where this build of torch has oneDNN.

    Outputs change by rounding alone.  Parameters, their names and training stay as they are.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(_OPS, "_linear_pointwise")):
        return
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.__class__ = PackedConv2d
        elif type(module) is nn.Linear:
            module.__class__ = PackedLinear
