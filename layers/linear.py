"""A linear layer that evaluates by oneDNN on a CPU, with an activation in the same kernel."""

from __future__ import annotations

from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers import onednn
from hybridzoo.layers.eval_cache import BUDGET, EvalCache
from hybridzoo.layers.slicing import watched


class Linear(EvalCache, nn.Linear):
    """`nn.Linear`, with the same weights under the same names.

    In evaluation on a CPU in float32 the product is oneDNN's, and the weights are kept in its own order (`EvalCache`;
    not those of more than 8 MiB): beside MKL's a tenth faster at these networks' widths, a quarter and more where
    tokens are many or few (AMD, AVX-512).
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def rows(self, x: Tensor, start: int = 0, stop: int | None = None, act: nn.Module | None = None) -> Tensor:
        """Output channels from `start` to before `stop`, after the activation `act`, if one is given.

        Calls no hooks of this layer.
        """
        channels = slice(start, self.out_features if stop is None else stop)
        bias = None if self.bias is None else self.bias[channels]
        post = onednn.post_operation(act)
        if onednn.LINEAR is None or post is None or not onednn.suits(x, self.weight):
            out = F.linear(x, self.weight[channels], bias)
            return out if act is None else act(out)
        attribute, algorithm = post
        return onednn.LINEAR(x, self._ordered(channels), bias, attribute, [], algorithm)

    def _ordered(self, channels: slice) -> Tensor:
        """These rows of the weight, in oneDNN's order if they can be kept that way."""
        weight = self.weight[channels]
        if weight.nbytes > BUDGET:
            return weight
        # Writing through `.data` counts no version (manual updates, merged adapters): look at the first row.
        key = (channels.start, channels.stop, weight[0].sum().item())
        return self.cached(key, lambda: onednn.reorder(weight), otherwise=lambda: weight)


def linear_act(layer: nn.Module, x: Tensor, act: nn.Module) -> Tensor:
    """`act(layer(x))`, of a `Linear` that nobody watches (hooks) at once."""
    if type(layer) is Linear and not watched(layer, act):
        return layer.rows(x, act=act)
    return onednn.in_turn(layer, x, act)


def linear_rows(layer: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """`layer(x)[..., start:stop]`, of a `Linear` without the rest; what stands in its place (adapted, quantized), or is
    watched, is asked for all."""
    return layer.rows(x, start, stop) if is_plain(layer) else layer(x)[..., start:stop]


def is_plain(layer: nn.Module) -> TypeGuard[Linear]:
    """Whether `layer` is its weight and bias and nothing more: neither another module in its place nor hooks on it.

    Hooks on all modules are for those that are called; counters of operations need not see more of them than there are.
    """
    return type(layer) is Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
