"""AsCAN-style networks: convolutional blocks (C) and transformer blocks (T) in an asymmetric arrangement.

THIS IS A RECONSTRUCTION. The paper, "AsCAN: Asymmetric Convolution-Attention Networks for Efficient Recognition and
Generation", Kag et al., NeurIPS 2024, arXiv 2411.04967, has no public code and no public weights, and its tables could
not be read when this was written. Known: fused MBConv for C, ordinary transformer layers with full attention for T,
four stages, more C early and more T late. The rest was chosen here, so that sizes come close to values that are
remembered but not verified:

              stage 1, 2, 3, 4         widths             parameters (wanted)   GMACs at 224 (wanted)
ascan_tiny    CC/CC/CTTTT/CTTTTT       96 … 768            54.34 M  (55)         7.61  (7.7)
ascan_base    CC/CC/CCCTTTTTT/CTTT     128 … 1024          98.15 M  (98)        16.87 (16.7)
ascan_large   CC/CCCC/CCCTTTT/CTTTT    160 … 1280         170.86 M (173)        31.07 (30.7)

Thousands of other patterns come as close, so this is no evidence for the paper's layout. Every unknown detail is an
argument, so that the true configuration can be set once it is known. Do not expect the paper's accuracies.

image (B, 3, H, W) -> maps (B, dims[i], ceil(H / s), ceil(W / s)), s = 4, 8, 16, 32 -> logits (B, num_classes). Maps are
NCHW with channels last in memory, so that maps and tokens are views of each other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.layers import (
    ConvNormAct,
    FusedMBConv,
    MBConv,
    PooledHead,
    PoolShortcut,
    RelativePositionBias,
    Stage,
    TransformerBlock,
)
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.relative_position import gather_bias, resize_table
from hybridzoo.layers.windows import attend

TABLE_PIXELS = 224  # image side for which a bias table has an entry for every offset
ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}
NORMS = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


@dataclasses.dataclass(frozen=True)
class AsCANConfig:
    """The arrangement, and every choice that the public parts of the paper leave open.

    Attributes:
        pattern: blocks of every stage, "CC/CC/CTTTT/CTTTTT" or a tuple ("CC", "CC", …).
        dims: width of every stage.
        stem_dim: width of both convolutions of the stem.
        expansion: hidden width of C over the width that `expand_from` names.
        expand_from: "in" or "out": from which side of C its hidden width is counted.
        fused: fused MBConv; False for MBConv.
        se_ratio: hidden width of squeeze-and-excitation over C's input width, 0 for none.
        conv_norm: "batch" or "layer", in stem, C and downsampling.
        act: "gelu", "silu" or "relu", everywhere.
        head_dim: of T's attention heads.
        mlp_ratio: of T's MLP.
        qkv_bias: whether T's projection to queries, keys and values has a bias.
        position: "bias", a learned table over offsets, resized bicubically to other maps; "conv", a depthwise 3x3
            convolution before every T; "none". Flash attention is only possible without a table, and a table's memory
            grows with the square of the map's area.
        downsample: of a stage that starts with T: "pool", 2x2 average and 1x1 convolution; "conv", 3x3 with stride 2.
            A stage that starts with C downsamples in it.
    """

    pattern: str | tuple[str, ...]
    dims: tuple[int, ...]
    stem_dim: int = 64
    expansion: float = 4.0
    expand_from: Literal["in", "out"] = "in"
    fused: bool = True
    se_ratio: float = 0.0
    conv_norm: Literal["batch", "layer"] = "batch"
    act: Literal["gelu", "silu", "relu"] = "gelu"
    head_dim: int = 32
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    position: Literal["bias", "conv", "none"] = "bias"
    downsample: Literal["pool", "conv"] = "pool"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[CT]+(/[CT]+)*", "/".join(self.stages)):
            raise ValueError(f'pattern must be stages of C and T such as "CC/CC/CTTTT/CTTTTT"; got {self.pattern!r}')
        if len(self.dims) != len(self.stages):
            raise ValueError(f"dims must have one width for each of the {len(self.stages)} stages; got {self.dims}")
        for field in ("stem_dim", "head_dim", "expansion", "mlp_ratio"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} must be positive; got {getattr(self, field)}")
        if min(self.dims) < 1:
            raise ValueError(f"dims must be positive; got {self.dims}")
        for field, allowed in (
            ("expand_from", ("in", "out")),
            ("conv_norm", NORMS),
            ("act", ACTIVATIONS),
            ("position", ("bias", "conv", "none")),
            ("downsample", ("pool", "conv")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}")
        for blocks, dim in zip(self.stages, self.dims, strict=True):
            if "T" in blocks and dim % self.head_dim:
                raise ValueError(f"head_dim must divide the width of a stage with T; got {self.head_dim} and {dim}")

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.pattern.split("/")) if isinstance(self.pattern, str) else tuple(self.pattern)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(len(blocks) for blocks in self.stages)


class PositionBias(RelativePositionBias):
    """A bias table for square maps of `side` tokens; the whole table is resized for other maps."""

    def __init__(self, num_heads: int, side: int) -> None:
        super().__init__(num_heads, (side, side), "bicubic")

    def forward(self, window: tuple[int, int] | None = None) -> Tensor:
        size = window or self.window
        return gather_bias(resize_table(self.table, size, self.resize), size)


@register_notrace_module
class Attention(nn.Module):
    """Full softmax attention over the map's tokens, `(B, tokens, dim)` in and out."""

    def __init__(self, dim: int, head_dim: int, qkv_bias: bool, table_side: int) -> None:
        super().__init__()
        self.num_heads = dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = PositionBias(self.num_heads, table_side) if table_side else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        bias = None if self.bias is None else self.bias(size)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(query, key, value, self.num_heads, bias))


class Transformer(TransformerBlock):
    """T: pre-norm attention and MLP, `(B, dim, H, W)` in and out."""

    def __init__(self, cfg: AsCANConfig, dim: int, table_side: int, drop_path: float) -> None:
        attn = Attention(dim, cfg.head_dim, cfg.qkv_bias, table_side if cfg.position == "bias" else 0)
        super().__init__(dim, attn, cfg.mlp_ratio, eps=1e-6, drop_path=drop_path, act_layer=ACTIVATIONS[cfg.act])
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if cfg.position == "conv" else None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a map; the attention gets its size
        size = (x.shape[2], x.shape[3])
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        return super().forward(x.flatten(2).transpose(1, 2), size).transpose(1, 2).unflatten(2, size)


class AsCAN(Backbone):
    """An AsCAN-style network, a reconstruction (see the module), for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`:
            `timm.create_model("ascan_tiny", pattern="CC/CC/TTT/TTT", dims=(64, 128, 256, 512), position="none")`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, or `""` for the map (then without classes).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0; 0.1, 0.3, 0.4 are our guess.
        depths: keep only this many last blocks of every stage; all by default.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    channels_last = True

    def __init__(
        self,
        cfg: AsCANConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        depths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if depths is not None:
            if len(depths) != len(cfg.stages) or not all(
                0 < n <= whole for n, whole in zip(depths, cfg.depths, strict=False)
            ):
                raise ValueError(f"depths must be from 1 to {cfg.depths} in every stage; got {tuple(depths)}")
            kept = (blocks[-n:] for blocks, n in zip(cfg.stages, depths, strict=True))
            cfg = dataclasses.replace(cfg, pattern=tuple(kept))
        strides = [4 * 2**i for i in range(len(cfg.dims))]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, strides)
        norm, act = NORMS[cfg.conv_norm], ACTIVATIONS[cfg.act]
        stem = partial(ConvNormAct, out_dim=cfg.stem_dim, kernel_size=3, norm_layer=norm, act_layer=act)
        self.stem = nn.Sequential(stem(in_chans, stride=2), stem(cfg.stem_dim))
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        stages, width = [], cfg.stem_dim
        for kinds, dim, stride in zip(cfg.stages, cfg.dims, strides, strict=True):
            downsample: nn.Module | None = None
            if kinds[0] == "T" and cfg.downsample == "pool":
                downsample = PoolShortcut(width, dim, 2, norm_layer=norm, project=True)
            elif kinds[0] == "T":
                downsample = ConvNormAct(width, dim, 3, 2, norm_layer=norm)
            blocks: list[nn.Module] = []
            for i, kind in enumerate(kinds):
                if kind == "C":
                    blocks.append(_conv_block(cfg, width, dim, 1 if i else 2, next(rates)))
                else:
                    blocks.append(Transformer(cfg, dim, -(-TABLE_PIXELS // stride), next(rates)))
                width = dim
            stages.append(Stage(blocks, downsample))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        norm_after_pool = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head = PooledHead(nn.Identity(), norm_after_pool, self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}


def _conv_block(cfg: AsCANConfig, in_dim: int, dim: int, stride: int, drop_path: float) -> nn.Module:
    """C: the branch and its shortcut. With a stride, the shortcut averages and projects."""
    norm = NORMS[cfg.conv_norm]
    shortcut = nn.Identity() if stride == 1 else PoolShortcut(in_dim, dim, stride, norm_layer=norm, project=True)
    return (FusedMBConv if cfg.fused else MBConv)(
        in_dim,
        dim,
        stride,
        hidden_dim=round(cfg.expansion * (in_dim if cfg.expand_from == "in" else dim)),
        se_dim=round(cfg.se_ratio * in_dim),
        act_layer=ACTIVATIONS[cfg.act],
        norm_layer=norm,
        shortcut=shortcut,
        drop_path=drop_path,
    )


VARIANTS = {
    "ascan_tiny": AsCANConfig(("CC", "CC", "CTTTT", "CTTTTT"), (96, 192, 384, 768)),
    "ascan_base": AsCANConfig(("CC", "CC", "CCCTTTTTT", "CTTT"), (128, 256, 512, 1024)),
    "ascan_large": AsCANConfig(("CC", "CCCC", "CCCTTTT", "CTTTT"), (160, 320, 640, 1280)),
}

default_cfgs = generate_default_cfgs(checkpoints.timm_cfgs("ascan", first_conv="stem.0.conv", classifier="head.fc"))


@register_model
def ascan_tiny(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """A reconstruction; see the module."""
    return build(AsCAN, VARIANTS, "ascan_tiny", pretrained, **kwargs)


@register_model
def ascan_base(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """A reconstruction; see the module."""
    return build(AsCAN, VARIANTS, "ascan_base", pretrained, **kwargs)


@register_model
def ascan_large(pretrained: bool = False, **kwargs: Any) -> AsCAN:
    """A reconstruction; see the module."""
    return build(AsCAN, VARIANTS, "ascan_large", pretrained, **kwargs)
