"""GELU for what a layer has just made: exact in place, its tanh form without waiting for PyTorch's kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers.slicing import lean

# tanh's form, x / 2 * (1 + tanh(u)), is x * sigmoid(2 * u) with 2 * u = x * (LINEAR + CUBIC * x^2).
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR

SLICE = 2**16  # elements a thread works on at a time: half a megabyte with the sigmoid's


class GELU(nn.Module):
    """The exact `F.gelu`, in place where no gradient needs the input."""

    inplace = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x) if lean(x) else F.gelu(x)


class GELUTanh(nn.Module):
    """`F.gelu(x, approximate="tanh")`, any shape.

    On CPUs that kernel takes four times as long as the exact GELU's; evaluation there takes a sigmoid instead, slice by
    slice in the cache, which is the same function and nearly twice as fast.

    Args:
        inplace: the input may be overwritten where no gradient needs it; for inputs that nobody else holds.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        # Several roundings are too coarse for half precision, several calls too slow for small tensors.
        if lean(x) and x.dtype in (torch.float32, torch.float64) and x.numel() >= SLICE:
            order = _memory_order(x)
            if order is not None:
                return _by_sigmoid(x, order, self.inplace)
        return F.gelu(x, approximate="tanh")

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The permutation that makes `x` contiguous, if it is channels-last or contiguous already; else `None`."""
    if x.is_contiguous():
        return tuple(range(x.ndim))
    return (0, 2, 3, 1) if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else None


def _by_sigmoid(x: Tensor, order: tuple[int, ...], inplace: bool) -> Tensor:
    out = x if inplace else torch.empty_like(x)
    linear = x.new_tensor(LINEAR)
    size = SLICE * torch.get_num_threads()
    source, target = (t.permute(order).view(-1).split(size) for t in (x, out))
    for part, result in zip(source, target, strict=True):
        gate = torch.addcmul(linear, part, part, value=CUBIC).mul_(part).sigmoid_()
        torch.mul(part, gate, out=result)
    return out
