"""oneDNN's kernels on a CPU: a linear layer or convolution together with its activation, with packed weights.

Maps are not read and written again for the activation, and batches are processed a few images at a time, so that
results stay in the cache. The operators are private ones of PyTorch that torch.compile's inductor uses. If one is
missing or has other arguments than expected here, modules stay unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, Mlp, pad_same
from torch import Tensor, nn

from hybridzoo.layers.conv_norm_act import ConvNormAct, SameConv2d
from hybridzoo.layers.depthwise_mlp import DepthwiseMlp
from hybridzoo.layers.inference.fusing import swaps

if TYPE_CHECKING:
    from typing_extensions import Self

# Elements of the largest tensor of a slice: 8 MB in float32. A few of them fit into what glibc's malloc keeps when they
# are freed, twice the largest block that it ever asked the operating system for, and into a server's last-level cache.
SLICE = 2**21

_GEOMETRY = ["padding", "stride", "dilation", "groups"]
_POST_OPERATION = ["attr", "scalars", "algorithm"]


def _operator(name: str, arguments: list[str]) -> Any:
    packet: Any = getattr(torch.ops.mkldnn, name, None)
    known = packet is not None and [a.name for a in packet.default._schema.arguments] == arguments
    return packet.default if known else None


CONVOLUTION = _operator("_convolution_pointwise", ["X", "W", "B", *_GEOMETRY, *_POST_OPERATION])
LINEAR = _operator("_linear_pointwise", ["X", "W", "B", *_POST_OPERATION])
PACK_LINEAR = _operator("_reorder_linear_weight", ["self", "batch_size"])
PACK_CONVOLUTION = _operator("_reorder_convolution_weight", ["self", *_GEOMETRY, "input_size"])


def _on_intel() -> bool:
    file = Path("/proc/cpuinfo")
    return file.exists() and "GenuineIntel" in file.read_text()


# With fewer multiplications, calling oneDNN takes longer than computing. On Intel processors MKL, PyTorch's default,
# is as fast at any size and cheaper to call.
SMALL = math.inf if torch.backends.mkl.is_available() and _on_intel() else 2**23


def post_operation(act: nn.Module) -> tuple[str, str] | None:
    """oneDNN's name of the activation and its algorithm; `None` if it does not have it."""
    kind = type(act)  # subclasses may compute something else
    if kind is nn.Identity:
        return "none", ""
    if kind is nn.ReLU:
        return "relu", ""
    if kind is nn.Hardswish:
        return "hardswish", ""
    if isinstance(act, nn.GELU) and kind is nn.GELU:
        return "gelu", act.approximate
    return None


class _Packed(nn.Module):
    """Packed weights, and the same in PyTorch's order for calls that oneDNN's kernels do not support (gradients, other
    dtypes, recorded programs).

    Copies, pickles and moves pack the weights again.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, act: nn.Module, post: tuple[str, str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        self.act = act
        self.post = post

    def pack(self) -> None:
        """Pack the weights again, after they were moved or copied."""
        raise NotImplementedError

    def takes(self, x: Tensor) -> bool:
        plain = x.dtype == self.weight.dtype == torch.float32 and type(x) is Tensor  # not a fake one
        return plain and not x.requires_grad and computes_now(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()


class PackedLinear(_Packed):
    """`act(linear(x))`."""

    def __init__(self, linear: nn.Linear | PackedLinear, act: nn.Module, post: tuple[str, str]) -> None:
        super().__init__(linear, act, post)
        self.pack()

    def pack(self) -> None:
        weight = self.weight.detach()
        suits = PACK_LINEAR is not None and weight.device.type == "cpu" and weight.dtype == torch.float32
        self.packed = PACK_LINEAR(weight, None) if suits else weight

    def forward(self, x: Tensor) -> Tensor:
        if self.takes(x) and (self.post[0] != "none" or x.numel() * self.weight.shape[0] >= SMALL):
            return LINEAR(x, self.packed, self.bias, self.post[0], [], self.post[1])
        return self.act(F.linear(x, self.weight, self.bias))


class PackedConv(_Packed):
    """`act(conv(x))`; timm's "same" padding is put around the map before.

    oneDNN's order of the weights depends on the map's shape. In the order of another shape, a convolution can take
    twenty times as long, so the weights are packed for each of the last two shapes (parts of a batch have two).
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module, post: tuple[str, str]) -> None:
        super().__init__(conv, act, post)
        self.same = isinstance(conv, Conv2dSame)
        self.padding: Any = [0, 0] if self.same else list(conv.padding)
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        self.pack()

    def pack(self) -> None:
        self.packed: dict[torch.Size, Tensor] = {}  # packed in the next call

    def packed_for(self, x: Tensor) -> Tensor:
        packed = self.packed.get(x.shape)
        if packed is None:
            packed = self.weight.detach()
            if PACK_CONVOLUTION is not None:
                geometry = (self.padding, self.stride, self.dilation, self.groups)
                packed = PACK_CONVOLUTION(packed, *geometry, list(x.shape))
            # Another dict, because another thread may read this one.
            self.packed = dict([*self.packed.items(), (x.shape, packed)][-2:])
        return packed

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            x = pad_same(x, list(self.weight.shape[-2:]), self.stride, self.dilation)
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        if self.takes(x):
            return CONVOLUTION(x, self.packed_for(x), self.bias, *geometry, self.post[0], [], self.post[1])
        return self.act(F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups))


def computes_now(x: Tensor) -> bool:
    """Whether a call computes on a CPU. Compilers, exporters and tracers only record it: they need operators that they
    know, and do better with the whole batch."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


class FewTokens(nn.Module):
    """Layers that act on each token alone, applied to a few tokens `(..., dim)` at a time."""

    def __init__(self, layers: nn.Sequential, hidden_dim: int) -> None:
        super().__init__()
        self.layers = layers
        self.tokens = max(1, SLICE // hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        if not computes_now(x):
            return self.layers(x)
        tokens = x.flatten(0, -2)
        if len(tokens) <= self.tokens:
            return self.layers(x)
        parts = -(-len(tokens) // self.tokens)
        return torch.cat([self.layers(part) for part in tokens.chunk(parts)]).unflatten(0, x.shape[:-1])


class FewImages(nn.Module):
    """A module that acts on each image alone, applied to a few images at a time.

    Args:
        module: from one tensor to another, batch first.
        growth: elements of the largest tensor inside, divided by those of the input.
    """

    def __init__(self, module: nn.Module, growth: float) -> None:
        super().__init__()
        self.module = module
        self.growth = growth

    def forward(self, x: Tensor) -> Tensor:
        if not computes_now(x):
            return self.module(x)
        parts = min(len(x), math.ceil(x.numel() * self.growth / SLICE))
        return torch.cat([self.module(part) for part in x.chunk(parts)]) if parts > 1 else self.module(x)


@swaps(Mlp, on_cpu=True)
def _(mlp: Mlp) -> nn.Module:
    post = post_operation(mlp.act)
    fc1: Any = mlp.fc1
    linear = type(fc1) in (nn.Linear, PackedLinear) and isinstance(mlp.norm, nn.Identity)
    if LINEAR is None or post is None or not linear:
        return mlp
    return FewTokens(nn.Sequential(PackedLinear(fc1, mlp.act, post), mlp.fc2), fc1.weight.shape[0])


@swaps(DepthwiseMlp, on_cpu=True)
def _(mlp: Any) -> nn.Module:
    post = post_operation(mlp.act)
    if LINEAR is None or CONVOLUTION is None or post is None or mlp.residual:
        return mlp
    hidden, dim = mlp.fc1.weight.shape
    if mlp.act_first:
        mlp.fc1 = PackedLinear(mlp.fc1, mlp.act, post)
    else:
        mlp.conv = PackedConv(mlp.conv, mlp.act, post)
    mlp.act = nn.Identity()
    return FewImages(mlp, hidden / dim)


@swaps(nn.Linear, on_cpu=True)
def _(linear: nn.Linear) -> nn.Module:
    return linear if LINEAR is None or math.inf == SMALL else PackedLinear(linear, nn.Identity(), ("none", ""))


@swaps(ConvNormAct, on_cpu=True)
def _(block: ConvNormAct) -> nn.Module:
    conv, post = block.conv, post_operation(block.act)
    plain = (
        type(conv) in (nn.Conv2d, Conv2dSame, SameConv2d)
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
    )
    if CONVOLUTION is None or post is None or not plain or not isinstance(block.norm, nn.Identity):
        return block
    return PackedConv(conv, block.act, post)
