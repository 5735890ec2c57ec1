"""The tensors of dynamic convolution as one object."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Mix(NamedTuple):
    """Tensor arguments of `neighborhood_mix2d`, or their gradients."""

    query: Tensor
    taps: Tensor
    value: Tensor
    tap_bias: Tensor | None
    rpb: Tensor | None
