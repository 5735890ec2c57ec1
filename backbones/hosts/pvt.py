"""PVT: four stages of patch embedding, position embedding and transformer blocks; no class token, no final norm.

Paper: "Pyramid Vision Transformer", Wang et al., ICCV 2021, arXiv 2102.12122. As a host all its attention is the
family's own, at full resolution (a spatial reduction of 1).

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, rounded down -> logits; NHWC inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from hybridzoo.backbones.base import Backbone, check_per_stage
from hybridzoo.backbones.hosts.common import Attention
from hybridzoo.layers import Stage, TransformerBlock
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.resize import resize_map

STRIDES = (4, 8, 16, 32)


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


class PVT(Backbone):
    """PVT for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        attention: the family's attention on `(B, H, W, dim)` maps.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    layout = "NHWC"

    def __init__(
        self,
        cfg: PVTConfig,
        attention: Attention,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        rows = dict(depths=cfg.depths, dims=cfg.dims, num_heads=cfg.num_heads, mlp_ratios=cfg.mlp_ratios)
        check_per_stage(len(STRIDES), **rows)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        self.stem = PatchEmbed(in_chans, cfg.dims[0], STRIDES[0], cfg.img_size // STRIDES[0], of_image=True)
        stages = []
        for i, (depth, dim) in enumerate(zip(cfg.depths, cfg.dims, strict=True)):
            side = cfg.img_size // STRIDES[i]
            blocks = [
                TransformerBlock(
                    dim,
                    attention(i, dim, cfg.num_heads[i], side),
                    cfg.mlp_ratios[i],
                    eps=1e-6,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            ]
            stages.append(Stage(blocks, PatchEmbed(cfg.dims[i - 1], dim, 2, side) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)
