"""Arguments of the neighborhood operators, grouped as their implementations pass them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """Which keys a query sees, along rows and columns, and the factor on the dot products."""

    kernel: tuple[int, int]
    dilation: tuple[int, int]
    scale: float

    @classmethod
    def of(cls, kernel: Sequence[int], dilation: Sequence[int], scale: float) -> Window:
        """From the arguments of an operator, which are lists."""
        return cls((kernel[0], kernel[1]), (dilation[0], dilation[1]), scale)


class Maps(NamedTuple):
    """Query, key and value, or their gradients: `(batch, height, width, heads, head_dim)`, any strides."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor | None, value: Tensor | None) -> Maps:
        """From an operator's arguments. If only `query` is given, it is packed, `(B, H, W, 3, heads, d)`."""
        if key is None or value is None:
            return cls(*query.unbind(3))
        return cls(query, key, value)
