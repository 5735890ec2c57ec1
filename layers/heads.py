"""Heads of an attention: apart for the attention, together for the projection; products of all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """`softmax(query @ key^T * head_dim ** -0.5 + bias) @ value`, all `(batch, heads, tokens, ...)`.

    By PyTorch's fused attention, except where a CPU trains the bias: there that is several slower operators.
    """
    if bias is None or query.device.type != "cpu" or not (torch.is_grad_enabled() and bias.requires_grad):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    scores = query * query.shape[-1] ** -0.5 @ key.mT + bias
    return scores.softmax(-1).to(value.dtype) @ value


def add_product(base: Tensor, left: Tensor, right: Tensor, *, keep: bool = False) -> Tensor:
    """`base + left @ right`, all with one batch axis, in one pass.

    `base` is lost where nothing needs a gradient, unless somebody else holds it (`keep`).
    """
    if keep or torch.is_grad_enabled() or not base.dtype == left.dtype == right.dtype:
        return torch.baddbmm(base, left, right)
    return base.baddbmm_(left, right)
