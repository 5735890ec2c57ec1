"""Other implementations of our operators: neighborhoods gathered or masked, windows unfolded, grouped convolutions.

They compute the same results as ours, and are written from the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.neighborhood import reference

Function = Callable[..., Tensor]
Pair = tuple[int, int]


def tables(size: Pair, kernel: Pair, dilation: Pair, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every row, then for every column of a map: indices of the neighbors, and of the entries in the bias table."""
    axes = []
    for length, k, d in zip(size, kernel, dilation, strict=True):
        keys, entries = zip(*reference.axis_table(length, k, d), strict=True)
        axes += [torch.tensor(keys, device=device), torch.tensor(entries, device=device)]
    return axes[0], axes[1], axes[2], axes[3]


def na2d_gather(size: Pair, kernel: int, dilation: int, device: torch.device) -> Function:
    """Every query's keys and values gathered by indexing; `(query, key, value, rpb) -> out`. The window must fit into
    the map."""
    keys_h, entries_h, keys_w, entries_w = tables(size, (kernel,) * 2, (dilation,) * 2, device)

    def neighbours(x: Tensor) -> Tensor:  # (B, H, W, kernel * kernel, heads, d)
        return x[:, keys_h[:, None, :, None], keys_w[None, :, None, :]].flatten(3, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        bias = rpb[:, entries_h[:, None, :, None], entries_w[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
        scores = torch.einsum("byxhd,byxnhd->byxhn", q * q.shape[-1] ** -0.5, neighbours(k)) + bias
        return torch.einsum("byxhn,byxnhd->byxhd", scores.softmax(-1).to(v.dtype), neighbours(v))

    return attend


def na2d_dense(size: Pair, kernel: int, dilation: int, device: torch.device) -> Function:
    """PyTorch's fused attention over the whole map, mask and bias given as one matrix."""
    (seen_h, entries_h), (seen_w, entries_w) = (
        [t.to(device) for t in reference.dense_axis(side, kernel, dilation)] for side in size
    )
    hidden = ~(seen_h[:, None, :, None] & seen_w[None, :, None, :]).flatten(2).flatten(0, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        bias = rpb[:, entries_h[:, None, :, None], entries_w[None, :, None, :]].flatten(3).flatten(1, 2)
        bias = bias.masked_fill(hidden, -torch.inf).to(q.dtype)
        return dense_attention(q, k, v, bias)

    return attend


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """All tokens of `(B, H, W, heads, d)` attend to all, with PyTorch's fused attention."""
    size = q.shape[1:3]
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).unflatten(1, size)


def na2d_flex(size: Pair, kernel: int, dilation: int, device: torch.device) -> Function:
    """FlexAttention, compiled, with the same mask and bias."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width = size

    def seen(query: Tensor, key: Tensor, length: int) -> Tensor:
        residue, members = query % dilation, (length - query % dilation - 1) // dilation + 1
        start = (query // dilation - kernel // 2).clamp(torch.zeros_like(members), (members - kernel).clamp(0))
        place = key // dilation
        return (key % dilation == residue) & (place >= start) & (place < start + kernel)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen(i // width, j // width, height) & seen(i % width, j % width, width)

    tokens = height * width
    block_mask = create_block_mask(mask, None, None, tokens, tokens, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            steps_h = torch.div(j // width - i // width, dilation, rounding_mode="floor")
            steps_w = torch.div(j % width - i % width, dilation, rounding_mode="floor")
            # The bias of masked pairs is looked up too, so their indices must stay inside the table.
            row, column = (s.clamp(1 - kernel, kernel - 1) + kernel - 1 for s in (steps_h, steps_w))
            return score + rpb[h, row, column]

        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, score_mod=add_bias, block_mask=block_mask).transpose(1, 2).unflatten(1, size)

    return attend


def mix_gather(size: Pair, kernel: int, device: torch.device) -> Function:
    """Materialises the kernels of all tokens and all windows of values;  `(query, taps, value, tap_bias, rpb) ->
    out`."""
    keys_h, entries_h, keys_w, entries_w = tables(size, (kernel,) * 2, (1, 1), device)

    def mix(query: Tensor, taps: Tensor, value: Tensor, tap_bias: Tensor, rpb: Tensor) -> Tensor:
        bias = rpb[:, entries_h[:, None, :, None], entries_w[None, :, None, :]].flatten(3).permute(1, 2, 0, 3)
        scores = torch.einsum("byxhd,bhtd->byxht", query * query.shape[-1] ** -0.5, taps) + tap_bias + bias
        windows = value[:, keys_h[:, None, :, None], keys_w[None, :, None, :]].flatten(3, 4)
        return torch.einsum("byxht,byxthe->byxhe", scores.softmax(-1).to(value.dtype), windows)

    return mix


def depthwise_grouped(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """One convolution with batch * channels groups, as published; the map is copied to NCHW and back."""
    batch, height, width, channels = x.shape
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * channels, height, width)
    out = F.conv2d(maps, kernels.reshape(-1, 1, 3, 3), bias.flatten(), padding=1, groups=batch * channels)
    return out.view(batch, channels, height, width).permute(0, 2, 3, 1)


def depthwise_unfold(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Materialises every pixel's window."""
    size = x.shape[1:3]
    windows = F.unfold(x.permute(0, 3, 1, 2), 3, padding=1).unflatten(1, (-1, 9))  # (B, C, 9, H * W)
    out = torch.einsum("bckn,bck->bnc", windows, kernels) + bias[:, None]
    return out.unflatten(1, size)


def check_agreement(name: str, found: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> None:
    """Raise a ValueError if a form's result differs, relative to the largest value."""
    for one, right in zip(found, expected, strict=True):
        error = ((one.float() - right.float()).abs().max() / right.float().abs().max()).item()
        if not error <= allowed:
            raise ValueError(f"{name} disagrees with ours by {error:.1e} of the largest value")
