"""RAVLT: rank-augmented linear attention at high resolution, softmax attention at low, gated and rotary both.

Paper: "Breaking the Low-Rank Dilemma of Linear Attention", Fan et al., CVPR 2025, arXiv 2411.07635. Published code:
qhfan/RALA (no licence stated). Written from the paper and from measurements of that code.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, sizes rounded up -> logits (B, num_classes); NHWC
inside. Weights and positions do not depend on the image size; the cost of the last two stages' attention grows with the
square of the area.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build, check_per_stage
from hybridzoo.layers import (
    ConvNormAct,
    DepthwiseMlp,
    GatedAttention,
    PooledHead,
    RankAugmentedAttention,
    Stage,
    TransformerBlock,
)
from hybridzoo.layers.init import trunc_normal_
from hybridzoo.layers.memory import channels_last

STRIDES = (4, 8, 16, 32)
MLP_RATIO = 3.5
HEAD_WIDTH = 1024
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class RAVLTConfig:
    """A variant of the paper; all tuples are by stage."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    layer_scale: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # initial values
    linear: tuple[int, ...] = (1, 1, 0, 0)  # 1: rank-augmented linear attention, 0: softmax


class Block(TransformerBlock):
    """Convolutional position embedding, attention, MLP, on a `(B, H, W, dim)` map."""

    def __init__(self, dim: int, attn: nn.Module, layer_scale: float, drop_path: float) -> None:
        mlp = DepthwiseMlp(dim, int(MLP_RATIO * dim), residual=True, act_first=True)
        super().__init__(dim, attn, eps=EPS, layer_scale=layer_scale, drop_path=drop_path, mlp=mlp)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nothing else for the attention
        x = x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return super().forward(x)


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, H/4, W/4, dim): four 3x3 convolutions, no activation after the last."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, 3, 2, act_layer=nn.GELU, bias=True)
        self.conv2 = ConvNormAct(half, half, 3, act_layer=nn.GELU, bias=True)
        self.conv3 = ConvNormAct(half, half, 3, act_layer=nn.GELU, bias=True)
        self.conv4 = ConvNormAct(half, dim, 3, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv4(self.conv3(self.conv2(self.conv1(channels_last(x)))))
        return x.permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """(B, H, W, dim) -> (B, H/2, W/2, out_dim): a 3x3 convolution and its norm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = ConvNormAct(dim, out_dim, 3, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class RAVLT(Backbone):
    """RAVLT for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`. `linear=(1, 1, 1, 1)` makes the whole
            network's cost linear in the area, with the same weights' shapes (nobody published such weights).
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, or `""` for no head.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.1 (tiny),
            0.15 (small), 0.4 (base), 0.55 (large).

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    layout = "NHWC"
    head: PooledHead

    def __init__(
        self,
        cfg: RAVLTConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        rows = dict(dims=cfg.dims, depths=cfg.depths, num_heads=cfg.num_heads)
        check_per_stage(len(STRIDES), **rows, layer_scale=cfg.layer_scale, linear=cfg.linear)
        self.num_classes = num_classes
        self.num_features = cfg.dims[-1]
        self.head_hidden_size = HEAD_WIDTH
        self.set_feature_info(cfg.dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        self.stem = Stem(in_chans, cfg.dims[0])
        stages = []
        for i, (dim, depth) in enumerate(zip(cfg.dims, cfg.depths, strict=True)):
            attention = RankAugmentedAttention if cfg.linear[i] else GatedAttention
            blocks = [
                Block(dim, attention(dim, cfg.num_heads[i]), cfg.layer_scale[i], next(rates)) for _ in range(depth)
            ]
            stages.append(Stage(blocks, Downsample(cfg.dims[i - 1], dim) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        before = ConvNormAct(self.num_features, HEAD_WIDTH, act_layer=nn.SiLU, bias=True)
        self.head = PooledHead(before, nn.Identity(), HEAD_WIDTH, num_classes, global_pool, drop_rate)
        self.apply(_init)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS = {
    "ravlt_tiny": RAVLTConfig((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8)),
    "ravlt_small": RAVLTConfig((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
    "ravlt_base": RAVLTConfig((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), (1.0, 1.0, 1e-6, 1e-6)),
    "ravlt_large": RAVLTConfig((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), (1e-6, 1e-6, 1e-6, 1e-6)),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs("ravlt", first_conv="stem.conv1.conv", classifier="head.fc", reduction=STRIDES[-1])
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    return build(RAVLT, VARIANTS, name, pretrained, **kwargs)


@register_model
def ravlt_tiny(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    return _create("ravlt_tiny", pretrained, **kwargs)


@register_model
def ravlt_small(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    return _create("ravlt_small", pretrained, **kwargs)


@register_model
def ravlt_base(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    return _create("ravlt_base", pretrained, **kwargs)


@register_model
def ravlt_large(pretrained: bool = False, **kwargs: Any) -> RAVLT:
    return _create("ravlt_large", pretrained, **kwargs)
