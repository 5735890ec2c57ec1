"""Heads of an attention: apart for the attention, together for the projection; products of all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(batch, tokens, dim)` -> `(batch, heads, tokens, head_dim)`, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`(batch, heads, tokens, head_dim)` -> `(batch, tokens, dim)`; no copy of what fused attention returns."""
    x = x.transpose(1, 2)
    if torch.compiler.is_exporting():
        # ONNX takes fused attention apart, whose result then lies differently in memory: a view recorded here would not
        # fit it.
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


def add_product(base: Tensor, left: Tensor, right: Tensor, *, keep: bool = False) -> Tensor:
    """`base + left @ right`, all with one batch axis, in one pass.

    `base` is lost where nothing needs a gradient, unless somebody else holds it (`keep`).
    """
    if keep or torch.is_grad_enabled() or not base.dtype == left.dtype == right.dtype:
        return torch.baddbmm(base, left, right)
    return base.baddbmm_(left, right)
