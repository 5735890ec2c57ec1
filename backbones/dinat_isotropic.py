"""Isotropic NAT, DiNAT and their full-attention baseline: twelve blocks at one resolution, 16 pixels a token.

Paper: "Dilated Neighborhood Attention Transformer", Hassani and Shi, arXiv 2209.15001. Published code and weights:
SHI-Labs/Neighborhood-Attention-Transformer (MIT). The blocks are those of `backbones/dinat.py`.

Each block is a stage, so that maps can be taken after every block, as in timm's vision transformers.
image (B, 3, H, W) -> twelve maps (B, dim, H/16, W/16) -> logits (B, num_classes); NHWC inside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.backbones.dinat import HEAD_DIM, PatchStem
from hybridzoo.backbones.dinat_dilations import Dilations, block_dilations
from hybridzoo.layers import NeighborhoodAttention2d, RelativePositionBias, Stage, TransformerBlock
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.neighborhood import Dilation, Padding
from hybridzoo.layers.relative_position import gather_bias, resize_table
from hybridzoo.layers.windows import attend

STRIDE = 16
PUBLISHED_MAP = 14  # tokens a side at 224 pixels; vitrpb's bias table is made for it


@dataclasses.dataclass(frozen=True)
class IsotropicConfig:
    """A row of the paper's table; `dilations` as in `DiNATConfig`."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    dilations: Dilations | str = ((1,),) * 12
    full_attention: bool = False  # vitrpb: every token attends to all of them
    mlp_ratio: float = 4.0
    layer_scale: float = 0.0
    kernel_size: int = 7
    padding: Padding = "bias"  # rule for the padding of small maps, see NeighborhoodAttention2d


class MapBias(RelativePositionBias):
    """A table for maps of 14 x 14 tokens: smaller ones use its middle, larger ones a bicubically resized table."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads, (PUBLISHED_MAP, PUBLISHED_MAP), "bicubic")

    def forward(self, window: tuple[int, int] | None = None) -> Tensor:
        rows, columns = window or self.window
        table = resize_table(self.table, (max(rows, PUBLISHED_MAP), max(columns, PUBLISHED_MAP)), self.resize)
        return gather_bias(table, (rows, columns))


@register_notrace_module
class FullAttention(nn.Module):
    """Attention over the whole map with a relative position bias, `(B, H, W, dim)` in and out (vitrpb)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = MapBias(num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).flatten(1, 2).chunk(3, dim=-1)
        bias = self.bias((x.shape[1], x.shape[2]))
        return self.proj(attend(query, key, value, self.num_heads, bias)).view(x.shape)


class IsotropicDiNAT(Backbone):
    """For images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.1
            (small), 0.4 (base).

    Raises:
        ValueError: `dilations` is neither `"auto"` nor one non-empty sequence of positive numbers a block.
    """

    layout = "NHWC"

    def __init__(
        self,
        cfg: IsotropicConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dilations = block_dilations(cfg.dilations, cfg.depths, "isotropic")
        rates: list[Any] = calculate_drop_path_rates(drop_path_rate, list(cfg.depths), stagewise=True)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, [STRIDE] * len(cfg.dims))

        def block(dim: int, dilation: Dilation, drop_path: float) -> TransformerBlock:
            heads = dim // HEAD_DIM
            attn = (
                FullAttention(dim, heads)
                if cfg.full_attention
                else NeighborhoodAttention2d(dim, heads, cfg.kernel_size, dilation, padding=cfg.padding)
            )
            return TransformerBlock(dim, attn, cfg.mlp_ratio, layer_scale=cfg.layer_scale, drop_path=drop_path)

        self.stem = PatchStem(in_chans, cfg.dims[0], STRIDE)
        stages = []
        for dim, steps, stage_rates in zip(cfg.dims, dilations, rates, strict=True):
            stages.append(Stage([block(dim, step, rate) for step, rate in zip(steps, stage_rates, strict=True)]))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)


_SMALL: Any = dict(depths=(1,) * 12, dims=(384,) * 12)
_BASE: Any = dict(depths=(1,) * 12, dims=(768,) * 12)
_DILATED = ((1,), (2,)) * 6

VARIANTS = {
    "nat_isotropic_small": IsotropicConfig(**_SMALL),
    "nat_isotropic_base": IsotropicConfig(**_BASE),
    "dinat_isotropic_small": IsotropicConfig(**_SMALL, dilations=_DILATED),
    "dinat_isotropic_base": IsotropicConfig(**_BASE, dilations=_DILATED),
    "vitrpb_small": IsotropicConfig(**_SMALL, full_attention=True),
    "vitrpb_base": IsotropicConfig(**_BASE, full_attention=True),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs("dinat_isotropic", first_conv="stem.conv1", classifier="head.fc", reduction=STRIDE)
)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicDiNAT:
    return build(IsotropicDiNAT, VARIANTS, "nat_isotropic_small", pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicDiNAT:
    return build(IsotropicDiNAT, VARIANTS, "nat_isotropic_base", pretrained, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicDiNAT:
    return build(IsotropicDiNAT, VARIANTS, "dinat_isotropic_small", pretrained, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicDiNAT:
    return build(IsotropicDiNAT, VARIANTS, "dinat_isotropic_base", pretrained, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicDiNAT:
    """The baseline of the paper: full attention, everything else the same."""
    return build(IsotropicDiNAT, VARIANTS, "vitrpb_small", pretrained, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicDiNAT:
    return build(IsotropicDiNAT, VARIANTS, "vitrpb_base", pretrained, **kwargs)
