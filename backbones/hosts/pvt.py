"""PVT: four stages of patch embedding, position embedding and transformer blocks; no class token, no final norm.

Paper: "Pyramid Vision Transformer", Wang et al., ICCV 2021, arXiv 2102.12122. As a host, all its attention is the
family's, at full resolution (a spatial reduction of 1).

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, rounded down -> logits; NHWC inside.
"""

from __future__ import annotations

import dataclasses

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.backbones.hosts.common import Attention
from hybridzoo.backbones.hosts.pyramid import STRIDES, Pyramid
from hybridzoo.layers import TransformerBlock
from hybridzoo.layers.init import trunc_normal_
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.resize import resize_map


@dataclasses.dataclass(frozen=True)
class PVTConfig:
    """A variant; `img_size` is the (square) size that position tables are made for."""

    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 320, 512)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    img_size: int = 224


@register_notrace_module
class PatchEmbed(nn.Module):
    """NHWC (or, for the image, NCHW) map -> `(B, H/patch, W/patch, dim)`, with a position embedding of any size."""

    def __init__(self, in_dim: int, dim: int, patch: int, side: int, of_image: bool = False) -> None:
        super().__init__()
        self.of_image = of_image
        self.side = side
        self.proj = nn.Conv2d(in_dim, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, dim))
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x) if self.of_image else x.permute(0, 3, 1, 2)
        x = self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())
        grid = self.pos_embed.transpose(1, 2).unflatten(2, (self.side, self.side))
        return x + resize_map(grid, (x.shape[1], x.shape[2])).permute(0, 2, 3, 1)


class PVT(Pyramid):
    """PVT; arguments: see `Pyramid`."""

    per_stage = ("depths", "dims", "num_heads", "mlp_ratios")

    def make_stem(self, cfg: PVTConfig, in_chans: int) -> nn.Module:
        return PatchEmbed(in_chans, cfg.dims[0], STRIDES[0], cfg.img_size // STRIDES[0], of_image=True)

    def make_block(self, cfg: PVTConfig, attention: Attention, stage: int, index: int, drop_path: float) -> nn.Module:
        dim = cfg.dims[stage]
        attn = attention(stage, dim, cfg.num_heads[stage], cfg.img_size // STRIDES[stage])
        return TransformerBlock(dim, attn, cfg.mlp_ratios[stage], eps=1e-6, drop_path=drop_path)

    def make_downsampling(self, cfg: PVTConfig, stage: int) -> nn.Module:
        return PatchEmbed(cfg.dims[stage - 1], cfg.dims[stage], 2, cfg.img_size // STRIDES[stage])

    def make_norm(self, dim: int) -> nn.Module:
        return nn.Identity()
