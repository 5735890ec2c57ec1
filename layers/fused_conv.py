"""A convolution and its activation as one oneDNN kernel: the expanded map is not read and written a second time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from hybridzoo.layers.gelu_tanh import GELUTanh
from hybridzoo.layers.slicing import lean

_ARGUMENTS = ["X", "W", "B", "padding", "stride", "dilation", "groups", "attr", "scalars", "algorithm"]


def _operator() -> Any:
    """What torch.compile's inductor emits for the pair. It is PyTorch's own affair: where it is missing (builds without
    oneDNN) or takes other arguments than those known here, None, and the two modules run one after the other."""
    packet: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    known = packet is not None and [a.name for a in packet.default._schema.arguments] == _ARGUMENTS
    return packet.default if known else None


_OPERATOR = _operator()


def conv_act(conv: nn.Conv2d, act: nn.Module, x: Tensor) -> Tensor:
    """`act(conv(x))`; in evaluation on a CPU in float32 by one kernel, where there is one.

    Not where somebody watches the two modules (hooks) or PyTorch's operators (modes, which count them, say).
    """
    post = _post_operation(act)
    if post is None or not _fusable(conv, act, x):
        return act(conv(x))
    attribute, algorithm = post
    geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    return _OPERATOR(x, conv.weight, conv.bias, *geometry, attribute, [], algorithm)


def _post_operation(act: nn.Module) -> tuple[str, str] | None:
    """What oneDNN calls the activation: kind and algorithm."""
    kind = type(act)  # subclasses may compute something else
    if kind is nn.ReLU:
        return "relu", ""
    if kind is nn.Hardswish:
        return "hardswish", ""
    if kind is GELUTanh:
        return "gelu", "tanh"
    if isinstance(act, nn.GELU) and kind is nn.GELU:
        return "gelu", act.approximate
    return None


def _fusable(conv: nn.Conv2d, act: nn.Module, x: Tensor) -> bool:
    watched = conv._forward_hooks or conv._forward_pre_hooks or act._forward_hooks or act._forward_pre_hooks
    return bool(
        _OPERATOR is not None
        and lean(x)
        and x.dtype == conv.weight.dtype == torch.float32
        and type(conv) is nn.Conv2d  # not one that pads by itself
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and not watched
        and not _len_torch_dispatch_stack()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )
