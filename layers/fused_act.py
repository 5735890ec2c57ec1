"""A convolution or linear layer and its activation as one oneDNN kernel: wide maps are not read and written again."""

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
    """What torch.compile's inductor emits for the pair. It is PyTorch's own affair: where it is missing (builds without
    oneDNN) or takes other arguments than those known here, None, and the two modules run one after the other."""
    packet: Any = getattr(torch.ops.mkldnn, name, None)
    known = packet is not None and [a.name for a in packet.default._schema.arguments] == arguments
    return packet.default if known else None


_CONVOLUTION = _operator("_convolution_pointwise", ["X", "W", "B", *_GEOMETRY, *_POST_OPERATION])
_LINEAR = _operator("_linear_pointwise", ["X", "W", "B", *_POST_OPERATION])


def conv_act(conv: nn.Conv2d, act: nn.Module, x: Tensor) -> Tensor:
    """`act(conv(x))`; in evaluation on a CPU in float32 by one kernel, where there is one.

    Not where somebody watches the two modules (hooks) or PyTorch's operators (modes, which count them, say).
    """
    post = _post_operation(act)
    plain = type(conv) is nn.Conv2d and not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
    if _CONVOLUTION is None or post is None or not plain or not _fusable(conv, act, x):
        return in_turn(conv, act, x)
    attribute, algorithm = post
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    return _CONVOLUTION(x, conv.weight, conv.bias, *geometry, attribute, [], algorithm)


def linear_act(linear: nn.Linear, act: nn.Module | None, x: Tensor) -> Tensor:
    """`act(linear(x))`, as `conv_act`; without an activation too, because oneDNN's product is the faster one.

    Beside MKL's by a twentieth to a tenth, at these networks' widths, on an AMD CPU with AVX-512.
    """
    post = ("none", "") if act is None else _post_operation(act)
    if _LINEAR is None or post is None or type(linear) is not nn.Linear or not _fusable(linear, act, x):
        return linear(x) if act is None else in_turn(linear, act, x)
    attribute, algorithm = post
    return _LINEAR(x, linear.weight, linear.bias, attribute, [], algorithm)


def in_turn(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """`act(layer(x))`, one after the other; an activation in place leaves alone what a hook may have kept."""
    x = layer(x)
    return act(x.clone() if getattr(act, "inplace", False) and watched(layer, act) else x)


def _post_operation(act: nn.Module) -> tuple[str, str] | None:
    """What oneDNN calls the activation: kind and algorithm."""
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


def _fusable(layer: nn.Conv2d | nn.Linear, act: nn.Module | None, x: Tensor) -> bool:
    return bool(
        lean(x)
        and type(x) is Tensor
        and x.dtype == layer.weight.dtype == torch.float32
        and not (watched(layer) if act is None else watched(layer, act))
        and not _len_torch_dispatch_stack()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )
