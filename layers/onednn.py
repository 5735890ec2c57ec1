"""oneDNN's own kernels, for evaluation on a CPU: a convolution and its activation in one, and what `Linear` is made of.

Wide maps are not read and written again for the activation. The operators are PyTorch's own affair, what
torch.compile's inductor emits: where one is missing (builds without oneDNN) or takes other arguments than those known
here, it is None and modules run one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from hybridzoo.layers.gelu import GELU, GELUTanh
from hybridzoo.layers.slicing import lean, watched

_GEOMETRY = ["padding", "stride", "dilation", "groups"]
_POST_OPERATION = ["attr", "scalars", "algorithm"]


def _operator(name: str, arguments: list[str]) -> Any:
    packet: Any = getattr(torch.ops.mkldnn, name, None)
    known = packet is not None and [a.name for a in packet.default._schema.arguments] == arguments
    return packet.default if known else None


CONVOLUTION = _operator("_convolution_pointwise", ["X", "W", "B", *_GEOMETRY, *_POST_OPERATION])
LINEAR = _operator("_linear_pointwise", ["X", "W", "B", *_POST_OPERATION])
_REORDER = _operator("_reorder_linear_weight", ["self", "batch_size"])


def conv_act(conv: nn.Conv2d, x: Tensor, act: nn.Module) -> Tensor:
    """`act(conv(x))`; in evaluation on a CPU in float32 by one kernel, where there is one.

    Not where somebody watches the two modules (hooks) or PyTorch's operators (modes, which count them, say).
    """
    post = post_operation(act)
    plain = type(conv) is nn.Conv2d and not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
    if CONVOLUTION is None or post is None or not plain or watched(conv, act) or not suits(x, conv.weight):
        return in_turn(conv, x, act)
    attribute, algorithm = post
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    return CONVOLUTION(x, conv.weight, conv.bias, *geometry, attribute, [], algorithm)


def reorder(weight: Tensor) -> Tensor:
    """A linear layer's weight as `LINEAR` reads it fastest."""
    return weight if _REORDER is None else _REORDER(weight, None)


def in_turn(layer: nn.Module, x: Tensor, act: nn.Module) -> Tensor:
    """`act(layer(x))`, one after the other; an activation in place leaves alone what a hook may have kept."""
    x = layer(x)
    return act(x.clone() if getattr(act, "inplace", False) and watched(layer, act) else x)


def post_operation(act: nn.Module | None) -> tuple[str, str] | None:
    """What oneDNN calls the activation, kind and algorithm; `None` if it has none like it."""
    if act is None:
        return "none", ""
    kind = type(act)  # subclasses may compute something else
    if kind is nn.ReLU:
        return "relu", ""
    if kind is nn.Hardswish:
        return "hardswish", ""
    if kind is GELU:
        return "gelu", "none"
    if kind is GELUTanh:
        return "gelu", "tanh"
    if isinstance(act, nn.GELU) and kind is nn.GELU:
        return "gelu", act.approximate
    return None


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain float32 numbers on a CPU: no quantized weights, which are tensors of a class of their own
    and call themselves float32, and nobody listening."""
    return bool(
        lean(x)  # first: compilers do not understand the rest
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and not _len_torch_dispatch_stack()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )
