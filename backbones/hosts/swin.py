"""Swin: a pyramid whose own attention is softmax in shifted windows.

Paper: "Swin Transformer", Liu et al., ICCV 2021, arXiv 2103.14030.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, rounded up -> logits; NHWC inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from hybridzoo.backbones.base import Backbone, check_per_stage
from hybridzoo.backbones.hosts.common import ALL, Attention
from hybridzoo.layers import ShiftedWindowAttention, Stage, TransformerBlock
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.memory import channels_last

STRIDES = (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """A variant; `img_size` is the (square) size that tables are made for, windows have a 32nd of it."""

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    linear: tuple[int, ...] = (ALL, ALL, ALL, 0)  # blocks at the start of each stage with the family's attention
    img_size: int = 224


class PatchEmbed(nn.Module):
    """Image, extended by zeros to a multiple of 4 -> `(B, H/4, W/4, dim)`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, STRIDES[0], stride=STRIDES[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % STRIDES[0], 0, -x.shape[2] % STRIDES[0]))
        x = self.proj(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())


class PatchMerging(nn.Module):
    """`(B, H, W, dim)`, extended by zeros to even sides -> `(B, H/2, W/2, 2 * dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, row, W/2, column, dim)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Swin(Backbone):
    """Swin for images of any size from 32 x 32 pixels.

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
        cfg: SwinConfig,
        attention: Attention,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_per_stage(len(STRIDES), depths=cfg.depths, num_heads=cfg.num_heads, linear=cfg.linear)
        dims = [cfg.dim * 2**i for i in range(len(cfg.depths))]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.set_feature_info(dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        self.stem = PatchEmbed(in_chans, cfg.dim)
        window = cfg.img_size // STRIDES[-1]
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(cfg.depths, dims, cfg.num_heads, strict=True)):
            blocks = []
            for j in range(depth):
                attn = (
                    attention(i, dim, heads, cfg.img_size // STRIDES[i])
                    if j < cfg.linear[i]
                    # Every second block of the stage, the family's included, is a shifted one.
                    else ShiftedWindowAttention(dim, heads, window, window // 2 if j % 2 else 0)
                )
                blocks.append(TransformerBlock(dim, attn, drop_path=next(rates)))
            stages.append(Stage(blocks, PatchMerging(dims[i - 1]) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}
