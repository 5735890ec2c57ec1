"""CSwin: a pyramid whose own attention is softmax in cross-shaped stripes.

Paper: "CSWin Transformer", Dong et al., CVPR 2022, arXiv 2107.00652.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32 -> logits; NHWC inside.
"""

from __future__ import annotations

import dataclasses

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.backbones.hosts.common import ALL, Attention
from hybridzoo.backbones.hosts.pyramid import STRIDES, Pyramid, doubled
from hybridzoo.kernels.open_sizes import parts
from hybridzoo.layers import TransformerBlock
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.windows import attend, from_windows, padding_mask, to_windows


@dataclasses.dataclass(frozen=True)
class CSwinConfig:
    """A variant; `img_size` is the (square) image size of the tables; the widest stripes have a 32nd of it."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    linear: tuple[int, ...] = (ALL, ALL, 0, 0)  # blocks at the start of each stage with the family's attention
    img_size: int = 224

    @property
    def dims(self) -> tuple[int, ...]:
        return doubled(self.dim, self.depths)


@register_notrace_module
class StripeAttention(nn.Module):
    """Softmax attention of half the heads in vertical, half in horizontal stripes of a `(B, H, W, dim)` map.

    A depthwise 3x3 convolution of the values, stripe by stripe, encodes positions (LePE). If stripes do not divide the
    map, they get equal widths of at most `stripe`; padding tokens are masked.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads, an even number with stripes.
        stripe: width of a stripe in tokens, or `None` for all heads on the whole map.

    Raises:
        ValueError: `num_heads` does not fit.
    """

    def __init__(self, dim: int, num_heads: int, stripe: int | None) -> None:
        super().__init__()
        branches = 1 if stripe is None else 2
        if num_heads < 1 or num_heads % branches or dim % num_heads:
            even = "" if stripe is None else "even, and "
            raise ValueError(f"num_heads must be {even}a divisor of the stage's {dim} channels; got {num_heads}")
        self.stripe = stripe
        self.num_heads = num_heads // branches
        self.qkv = nn.Linear(dim, 3 * dim)
        width = dim // branches
        self.lepe = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(branches))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        windows = stripes(x, self.stripe)
        branches = self.qkv(x).unflatten(-1, (3, len(windows), -1)).unbind(-2)
        parts = zip(branches, self.lepe, windows, strict=True)
        return self.proj(torch.cat([self._attend(qkv.flatten(3), lepe, window) for qkv, lepe, window in parts], dim=-1))

    def _attend(self, qkv: Tensor, lepe: nn.Module, window: tuple[int, int]) -> Tensor:
        """Attention of one branch's heads: map `(B, H, W, 3 * channels)` -> `(B, H, W, channels)`."""
        _, height, width, _ = qkv.shape
        windows = to_windows(qkv, window)
        query, key, value = windows.flatten(3, 4).flatten(0, 2).chunk(3, dim=-1)
        local = lepe(value.unflatten(1, window).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        mask = padding_mask(height, width, window, device=qkv.device)
        out = attend(query, key, value, self.num_heads, mask=mask) + local
        return from_windows(out.view(*windows.shape[:-1], out.shape[-1]), height, width)


def stripes(x: Tensor, stripe: int | None) -> list[tuple[int, int]]:
    """Windows of the branches on a map `(B, H, W, dim)`: vertical and horizontal stripes, or all of it for `None`."""
    _, height, width, _ = x.shape
    if stripe is None:
        return [(height, width)]
    return [(height, _even(width, stripe)), (_even(height, stripe), width)]


def _even(side: int, stripe: int) -> int:
    """Width of the fewest equal stripes of at most `stripe` tokens that cover `side`."""
    return parts(side, parts(side, stripe))


class Stem(nn.Module):
    """Image -> `(B, H/4, W/4, dim)`, by overlapping patches."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 7, stride=4, padding=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())


class Merge(nn.Module):
    """`(B, H, W, dim)` -> `(B, H/2, W/2, out_dim)`, rounded up."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous())


class CSwin(Pyramid):
    """CSwin; arguments: see `Pyramid`."""

    linear_block: type[TransformerBlock] = TransformerBlock  # of the blocks with the family's attention

    def make_stem(self, cfg: CSwinConfig, in_chans: int) -> nn.Module:
        return Stem(in_chans, cfg.dim)

    def make_block(self, cfg: CSwinConfig, attention: Attention, stage: int, index: int, drop_path: float) -> nn.Module:
        dim, heads = cfg.dims[stage], cfg.num_heads[stage]
        if index < cfg.linear[stage]:
            attn = attention(stage, dim, heads, cfg.img_size // STRIDES[stage])
            return self.linear_block(dim, attn, drop_path=drop_path)
        stripe = (1, 2, cfg.img_size // 32, None)[stage]
        return TransformerBlock(dim, StripeAttention(dim, heads, stripe), drop_path=drop_path)

    def make_downsampling(self, cfg: CSwinConfig, stage: int) -> nn.Module:
        return Merge(cfg.dims[stage - 1], cfg.dims[stage])
