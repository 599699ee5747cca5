"""Layers whose weights are reordered once, instead of at every call, into the layout that the CPU's kernels read.

oneDNN computes from weights in blocks.  Given plain weights, a convolution reorders them at each call, which at the
UNet's small feature maps takes longer than the arithmetic; a plain linear layer goes through MKL, which is slower than
oneDNN on AMD processors.  torch has no public function for this outside torch.compile, hence the private operators.
Measured at full size, 256x256 pictures, a step of one copy: 1.5 times the speed, in float32 on an AMD EPYC and in
bfloat16 on a Xeon with AMX, for as much memory again as the weights take.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_OPS = torch.ops.mkldnn  # no public name, but what torch.compile's back end for CPUs is built on


@functools.cache
def _computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in it on this CPU."""
    ask = getattr(_OPS, "_is_mkldnn_bf16_supported", lambda: False)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ask())


class _Packed:
    """The packed weight, made when it is first needed, and made again after the weight has changed."""

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
