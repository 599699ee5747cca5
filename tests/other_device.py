"""A device that no machine has: tensors that count as its own, with their numbers on the CPU.

Within `other_device()`, `torch.device("meta")` stands for it.  Operations compute what they compute on the CPU, so that
whole trainings run; one that mixes its tensors with others fails, as it would on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("meta")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Which take indices from the CPU, as CUDA's do."""


class Elsewhere(Tensor):
    """A tensor of the other device.  inner: its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=DEVICE)

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    with _Calls(), _Operations():
        yield


class _Calls(TorchFunctionMode):
    """What Python's calls do before they come to operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") in (DEVICE, str(DEVICE)):
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    flat, shape = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    plain = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    if any(tensor.device == DEVICE for tensor in plain):
        raise RuntimeError(f"{func}: a tensor of the meta device was made outside other_device()")
    if there and func not in MOVES | INDEXING and any(tensor.dim() > 0 for tensor in plain):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found the CPU's and another's")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device) == DEVICE
    inner_args, inner_kwargs = tree_unflatten(
        [value.inner if isinstance(value, Elsewhere) else value for value in flat], shape
    )
    if device is not None and there:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if func.__name__.partition(".")[0].endswith("_") and not func.__name__.startswith("__"):
        return args[0] if isinstance(args[0], Tensor) else result  # in place
    return tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, result) if there else result
