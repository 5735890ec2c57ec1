"""Multi-scale ReLU linear attention (EfficientViT of MIT, arXiv 2205.14756, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.conv_norm_act import ConvNormAct, NormLayer
from hybridzoo.layers.heads import merge_heads
from hybridzoo.layers.precision import without_autocast

EPS = 1e-15  # of the published weights; exists in float32, is 0 in float16


@register_notrace_module
class MultiScaleLinearAttention(nn.Module):
    """Global attention with cost linear in the map's area, over tokens and over aggregated neighborhoods.

    `(B, dim, H, W)` in and out, any height and width. Every scale adds `dim // head_dim` heads. Their queries, keys and
    values are a depthwise convolution of the original ones, mixed inside a head.

    Sums over the map are in float32 for any input type, also under autocast (float64 stays float64): the
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
        qkv = self.qkv(x)
        scales = [qkv, *(aggregate(qkv) for aggregate in self.aggregate)]
        return self.proj(self._attend(torch.cat(scales, dim=1)))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Channels of queries, keys and values, head by head -> those of the attended values, `(B, dim, H, W)`."""
        size = qkv.shape[2:]
        tokens = qkv.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (-1, 3, self.head_dim))
        query, key, value = tokens.permute(3, 0, 2, 1, 4).unbind(0)
        out = relu_linear_attention(F.relu(query), F.relu(key), value)
        return merge_heads(out).transpose(1, 2).unflatten(2, size)


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
        state = torch.cat([key.transpose(-2, -1) @ value, key.sum(-2).unsqueeze(-1)], dim=-1)
        sums = query @ state
        return (sums[..., :-1] / (sums[..., -1:] + EPS)).to(dtype)
