"""A linear layer that evaluates by oneDNN on a CPU, with an activation in the same kernel."""

from __future__ import annotations

import math
from typing import TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers import onednn
from hybridzoo.layers.eval_cache import BUDGET, EvalCache
from hybridzoo.layers.slicing import watched


def _on_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return "GenuineIntel" in file.read(1024)
    except OSError:
        return False


# Multiplications below which oneDNN takes longer to call than to compute. On an Intel processor MKL, PyTorch's own way,
# is as fast at any size and cheaper to call.
SMALL = math.inf if _on_intel() and torch.backends.mkl.is_available() else 2**23
NOTHING = np.empty(0, np.float32)


class Linear(EvalCache, nn.Linear):
    """`nn.Linear`, with the same weights under the same names.

    In evaluation on a CPU in float32 the product is oneDNN's, unless it is small, and the weights are kept in its own
    order (`EvalCache`; not those of more than 8 MiB): beside MKL's a tenth faster at these networks' widths, a quarter
    and more where tokens are many or few (AMD, AVX-512). On an Intel processor only products with an activation are
    oneDNN's, which then costs no pass of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def rows(self, x: Tensor, start: int = 0, stop: int | None = None, act: nn.Module | None = None) -> Tensor:
        """Output channels from `start` to before `stop`, after the activation `act`, if one is given.

        Calls no hooks of this layer.
        """
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        stop = weight.shape[0] if stop is None else stop
        part = start > 0 or stop < weight.shape[0]
        if part and bias is not None:
            bias = bias[start:stop]
        post = onednn.post_operation(act)
        suited = onednn.LINEAR is not None and post is not None and onednn.suits(x, weight)
        if not suited or (act is None and x.numel() * (stop - start) < SMALL):  # compilers must not ask for the size
            out = F.linear(x, weight[start:stop] if part else weight, bias)
            return out if act is None else act(out)
        assert post is not None
        attribute, algorithm = post
        return onednn.LINEAR(x, self._ordered(weight, start, stop), bias, attribute, [], algorithm)

    def _ordered(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """These rows of the weight, in oneDNN's order if they can be kept that way."""
        if (stop - start) * weight.shape[1] * weight.element_size() > BUDGET:
            return weight[start:stop]

        def order() -> tuple[Tensor, np.ndarray, bytes]:
            row = weight[start].numpy()
            return onednn.reorder(weight[start:stop]), row, row.tobytes()

        key = (start, stop)
        ordered, row, written = self.cached(key, order, otherwise=lambda: (weight[start:stop], NOTHING, b""))
        # Writing through `.data` counts no version (manual updates, merged adapters): look at the first row.
        if row.tobytes() != written:
            self._results.clear()
            ordered, *_ = self.cached(key, order)
        return ordered


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
