"""Multi-scale ReLU linear attention (EfficientViT of MIT, arXiv 2205.14756, section 3.1)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers.conv_norm_act import ConvNormAct, NormLayer

EPS = 1e-15  # of the published weights; exists in float32, is 0 in float16


class MultiScaleLinearAttention(nn.Module):
    """Global attention whose cost is linear in the map's area, over tokens and over aggregates of their neighbourhoods.

    `(B, dim, H, W)` in and out, any height and width. Every scale adds `dim // head_dim` heads whose queries, keys and
    values are a depthwise convolution of the plain ones, mixed inside a head.

    Sums over the map are in float32 whatever the input and whether or not autocast is on (float64 stays float64): the
    published code overflows in float16 and loses half of bfloat16's digits there.

    Args:
        dim: channels, a multiple of `head_dim`.
        head_dim: channels of a head.
        scales: odd sizes of the aggregating convolutions.
        norm_layer: of the output projection.

    Raises:
        ValueError: `dim` is no multiple of `head_dim`, or a scale is even.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import MultiScaleLinearAttention
        >>> MultiScaleLinearAttention(64, head_dim=16)(torch.randn(1, 64, 9, 14)).shape
        torch.Size([1, 64, 9, 14])
    """

    def __init__(
        self, dim: int, head_dim: int, scales: Sequence[int] = (5,), norm_layer: NormLayer = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim must be a multiple of head_dim; got dim={dim}, head_dim={head_dim}")
        if any(scale % 2 == 0 for scale in scales):
            raise ValueError(f"scales must be odd, so that maps keep their size; got {tuple(scales)}")
        self.head_dim = head_dim
        width = 3 * dim
        # Channels by head: q, k, v of the first, then of the second, …
        self.qkv = nn.Conv2d(dim, width, 1, bias=False)
        self.aggregate = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, scale, padding=scale // 2, groups=width, bias=False),
                nn.Conv2d(width, width, 1, groups=width // head_dim, bias=False),
            )
            for scale in scales
        )
        self.proj = ConvNormAct(dim * (1 + len(scales)), dim, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        images = (batch, height * width)
        qkv = self.qkv(x)
        # One scale after the other: joining their outputs moves a third of what joining their inputs would.
        # By head, each part (heads, batch, tokens, head_dim):
        outs = [self._attend(*self._rows(qkv).permute(2, 1, 0, 3).contiguous().unflatten(2, images))]
        scale: Any  # a pair of convolutions
        for scale in self.aggregate:
            depthwise, mix = scale
            # The grouped 1x1 convolution as batched products: faster, and they leave the parts as they are wanted.
            rows, weight = self._rows(depthwise(qkv)), mix.weight.view(-1, 3, self.head_dim, self.head_dim)
            parts = (torch.bmm(rows[:, :, i].transpose(0, 1), weight[:, i].mT) for i in range(3))
            outs.append(self._attend(*(part.unflatten(1, images) for part in parts)))
        tokens = torch.cat([out.permute(1, 2, 0, 3) for out in outs], dim=2).flatten(2)
        return self.proj(tokens.mT.unflatten(2, (height, width)))  # a map with channels last

    def _rows(self, qkv: Tensor) -> Tensor:
        """`(B, heads * 3 * head_dim, H, W)` -> `(B * tokens, heads, 3, head_dim)`, a view where channels are last."""
        return qkv.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (-1, 3, self.head_dim))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return relu_linear_attention(F.relu(query), F.relu(key), value)


def relu_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each query's mean of the values, weighted by the products of non-negative keys with it.

    `out[n] = sum_m value[m] * w(n, m) / (sum_m w(n, m) + 1e-15)`, `w(n, m) = <query[n], key[m]>`, unscaled; with the
    sums over m taken first. All are `(..., tokens, head_dim)`; query and key are already non-negative.
    """
    dtype = value.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    with without_autocast(value):
        query, key, value = query.to(accurate), key.to(accurate), value.to(accurate)
        # Columns 0..d-1: sum of key x value; column d: sum of the keys.
        state = torch.cat([key.mT @ value, key.sum(-2).unsqueeze(-1)], dim=-1)
        sums = query @ state
        return (sums[..., :-1] / (sums[..., -1:] + EPS)).to(dtype)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A region where matrix products keep their inputs' precision; nothing if autocast is off, for exporters' sake."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
