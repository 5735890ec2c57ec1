"""BiFormer: a pyramid whose early stages attend by bi-level routing, the last one fully.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu et al., CVPR 2023, arXiv 2303.08810.
Published code and weights: rayleizhu/BiFormer (MIT). Written from the paper and from measurements of that code; its
quirks that the weights depend on are kept and marked below.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32 -> logits (B, num_classes); NHWC inside.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any, Literal

from timm.layers import ClassifierHead, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.layers import BiLevelRoutingAttention, Stage, TransformerBlock
from hybridzoo.layers.bi_level_routing import Padding
from hybridzoo.layers.heads import softmax_attention
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.memory import channels_last

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 32  # in routed stages
LAST_STAGE_HEADS = 8  # for every width
REGION_PIXELS = 32  # side of a region in input pixels, at 224 with 7 regions


@dataclasses.dataclass(frozen=True)
class BiFormerConfig:
    """A row of the paper's Table 1, and the differences between the two published code bases."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratio: float = 3.0
    topk: tuple[int, ...] = (1, 4, 16)
    overlapping: bool = True  # 3x3 stem and downsampling with conv position embeddings; else Swin's skeleton (stl)
    padding: Padding = "bias"  # rule for the padding, see BiLevelRoutingAttention
    last_lepe_of_value: bool = False  # stage 4's LePE reads v in stl_nchw, the attention's input elsewhere
    init_linear: bool = True  # stl_nchw's projections are convolutions, with PyTorch's initialisation


@register_notrace_module
class FullAttention(nn.Module):
    """Stage 4: softmax attention over the whole map plus LePE. `(B, H, W, dim)` in and out."""

    def __init__(self, dim: int, num_heads: int, lepe_of_value: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.lepe_of_value = lepe_of_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        qkv = self.qkv(x)
        query, key, value = qkv.flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = softmax_attention(query, key, value).transpose(1, 2).reshape(-1, height, width, dim)
        local = qkv[..., 2 * dim :] if self.lepe_of_value else x
        return self.proj(out + self.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(TransformerBlock):
    """Conv position embedding (not in stl), attention, MLP, on a `(B, H, W, dim)` map."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, pos_embed: bool, drop_path: float) -> None:
        super().__init__(dim, attn, mlp_ratio, eps=1e-6, drop_path=drop_path)
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if pos_embed else None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no further arguments of the attention
        if self.pos_embed is not None:  # outside of drop path, on the un-normalised stream
            x = x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return super().forward(x)


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, H/4, W/4, dim): two 3x3 convolutions, or one of 4x4 (stl)."""

    def __init__(self, in_chans: int, dim: int, overlapping: bool) -> None:
        super().__init__()
        self.act: nn.Module = nn.Identity()
        self.conv2: nn.Module = nn.Identity()
        self.norm2: nn.Module = nn.Identity()
        if overlapping:  # sizes round up; no activation after the second norm
            self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
            self.norm1 = nn.BatchNorm2d(dim // 2)
            self.act = nn.GELU()
            self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
            self.norm2 = nn.BatchNorm2d(dim)
        else:
            self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4)
            self.norm1 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last from the first convolution on, so that every later permutation is a view.
        x = self.norm1(self.conv1(channels_last(x)))
        return self.norm2(self.conv2(self.act(x))).permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """(B, H, W, dim) -> (B, H/2, W/2, out_dim): 3x3 convolution then norm, or norm then 2x2 convolution (stl)."""

    def __init__(self, dim: int, out_dim: int, overlapping: bool) -> None:
        super().__init__()
        self.norm_first = not overlapping
        kernel, padding = (3, 1) if overlapping else (2, 0)
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride=2, padding=padding)
        self.norm = nn.BatchNorm2d(out_dim if overlapping else dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        x = self.conv(self.norm(x)) if self.norm_first else self.norm(self.conv(x))
        return x.permute(0, 2, 3, 1).contiguous()


class BiFormer(Backbone):
    """BiFormer for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.1
            (tiny, stl), 0.15 (small), 0.4 (base).
        regions: regions per axis on every map, 7 as published for classification (the authors took 8 for 512-pixel
            crops, 16 for COCO). `"auto"`: one region per 32 x 32 pixels, the same grid at 224, cost linear in the area.

    Raises:
        ValueError: `regions` is neither positive nor `"auto"`.
    """

    layout = "NHWC"
    for_other_sizes = types.MappingProxyType({"regions": "auto"})

    def __init__(
        self,
        cfg: BiFormerConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        regions: int | tuple[int, int] | Literal["auto"] = 7,
    ) -> None:
        super().__init__()
        if isinstance(regions, str) and regions != "auto":
            raise ValueError(f'regions must be a number, (rows, columns) or "auto"; got {regions!r}')
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))

        def attention(stage: int, dim: int) -> nn.Module:
            if stage == len(cfg.dims) - 1:
                return FullAttention(dim, LAST_STAGE_HEADS, cfg.last_lepe_of_value)
            grid = dict(region_size=REGION_PIXELS // STRIDES[stage]) if regions == "auto" else dict(regions=regions)
            return BiLevelRoutingAttention(dim, dim // HEAD_DIM, cfg.topk[stage], padding=cfg.padding, **grid)

        self.stem = Stem(in_chans, cfg.dims[0], cfg.overlapping)
        stages = []
        for i, (depth, dim) in enumerate(zip(cfg.depths, cfg.dims, strict=True)):
            blocks = [Block(dim, attention(i, dim), cfg.mlp_ratio, cfg.overlapping, next(rates)) for _ in range(depth)]
            stages.append(Stage(blocks, Downsample(cfg.dims[i - 1], dim, cfg.overlapping) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        if cfg.init_linear:
            self.apply(init_linear)


_SMALL_DEPTHS = (4, 4, 18, 4)
_STL: dict[str, Any] = dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), mlp_ratio=4.0)

VARIANTS = {
    "biformer_tiny": BiFormerConfig((2, 2, 8, 2), (64, 128, 256, 512)),
    "biformer_small": BiFormerConfig(_SMALL_DEPTHS, (64, 128, 256, 512)),
    "biformer_base": BiFormerConfig(_SMALL_DEPTHS, (96, 192, 384, 768)),
    "biformer_stl": BiFormerConfig(**_STL, overlapping=False),
    "biformer_stl_nchw": BiFormerConfig(
        **_STL, overlapping=False, padding="zeros", last_lepe_of_value=True, init_linear=False
    ),
}

default_cfgs = generate_default_cfgs(checkpoints.timm_cfgs("biformer", first_conv="stem.conv1", classifier="head.fc"))


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return build(BiFormer, VARIANTS, "biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return build(BiFormer, VARIANTS, "biformer_small", pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return build(BiFormer, VARIANTS, "biformer_base", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """The Swin-tiny layout ("Swin-tiny-layout" ablation of the paper), legacy code base."""
    return build(BiFormer, VARIANTS, "biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """The Swin-tiny layout, rewritten code base: padding after the projection, another region grid at odd sizes."""
    return build(BiFormer, VARIANTS, "biformer_stl_nchw", pretrained, **kwargs)
