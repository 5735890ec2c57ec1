"""EfficientViT of the MIT Han Lab: inverted bottlenecks, then multi-scale linear attention; B0 to B3 and L1 to L3.

Paper: "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction", Cai et al., ICCV 2023,
arXiv 2205.14756. Published code and weights: mit-han-lab/efficientvit (Apache-2.0). Not the Microsoft family of the
same name, see `efficientvit_msra`. Written from the paper and from measurements of that code.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, sizes rounded up -> logits (B, num_classes). Maps
are NCHW with channels last in memory; nothing depends on the image's size.

Weights in timm's layout load too, and use the authors' constants here: 1e-15 in the attention's denominator (timm's
port: 1e-5), and 1e-7 in all norms of L (timm's port: 1e-5 in the head's).
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.layers import (
    ConvNormAct,
    FusedMBConv,
    MBConv,
    MultiScaleLinearAttention,
    PooledHead,
    Residual,
    Stage,
)
from hybridzoo.layers.init import init_normal

STRIDES = (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class StageRow:
    """The blocks of one stage.

    Attributes:
        conv: inverted bottleneck, `MBConv` or `FusedMBConv`.
        entry: expansion of the first block, which halves the resolution.
        expansion: of the others.
        attends: the others attend before their bottleneck.
        norms: after every convolution of a bottleneck; `False`: after the last only.
    """

    conv: type[MBConv] | type[FusedMBConv]
    entry: int
    expansion: int = 4
    attends: bool = False
    norms: bool = True


# The paper's two series, stage by stage.
B = (
    StageRow(MBConv, entry=4),
    StageRow(MBConv, entry=4),
    StageRow(MBConv, entry=4, attends=True, norms=False),
    StageRow(MBConv, entry=4, attends=True, norms=False),
)
L = (
    StageRow(FusedMBConv, entry=16),
    StageRow(FusedMBConv, entry=16),
    StageRow(MBConv, entry=16, norms=False),
    StageRow(MBConv, entry=24, expansion=6, attends=True, norms=False),
)


@dataclasses.dataclass(frozen=True)
class EfficientViTMITConfig:
    """A published model.

    `depths` counts the blocks after a stage's first, the strided one. (The paper and timm count that one
    too, but only in B's first two stages.)
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    stem_dim: int
    head_dim: int  # channels of an attention head
    head_widths: tuple[int, int]  # of the classifier's hidden layers
    stem_depth: int = 1
    large: bool = False  # L: full convolutions early, GELU, attention in the last stage only

    @property
    def norm_eps(self) -> float:
        return 1e-7 if self.large else 1e-5

    @property
    def norm_layer(self) -> Any:
        return partial(nn.BatchNorm2d, eps=self.norm_eps)

    @property
    def act_layer(self) -> Any:
        return partial(nn.GELU, approximate="tanh") if self.large else nn.Hardswish


class Stem(nn.Module):
    """Image -> (B, dim, H/2, W/2): a strided 3x3 convolution, then residual pairs of convolutions.

    A pair is depthwise 3x3 and 1x1 in B, 3x3 and 3x3 in L.
    """

    def __init__(self, in_chans: int, cfg: EfficientViTMITConfig) -> None:
        super().__init__()
        dim, layers = cfg.stem_dim, dict(norm_layer=cfg.norm_layer, act_layer=cfg.act_layer)

        def pair() -> nn.Sequential:
            first = ConvNormAct(dim, dim, 3, groups=1 if cfg.large else dim, **layers)
            return nn.Sequential(first, ConvNormAct(dim, dim, 3 if cfg.large else 1, norm_layer=cfg.norm_layer))

        self.conv = ConvNormAct(in_chans, dim, 3, 2, **layers)
        self.pairs = nn.Sequential(*(Residual(pair()) for _ in range(cfg.stem_depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(self.conv(x))


class AttentionBlock(nn.Sequential):
    """Global context by linear attention, local detail by an inverted bottleneck; both residual, no norm before."""

    def __init__(self, attn: MultiScaleLinearAttention, local: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.attn = Residual(attn, drop_path)
        self.local = local


class EfficientViTMIT(Backbone):
    """EfficientViT (MIT) for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for the features that the classifier would read, `(batch, head_widths[1])`.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, or `""` for no head.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last residual branch, growing linearly over all branches of the stages.
            The published runs used 0.05 (b1, b2) and 0.1 (b3, l1, l2, l3).

    Raises:
        ValueError: a pooling that the head does not know, or channels that do not fit the heads.
    """

    channels_last = True
    head: PooledHead

    def __init__(
        self,
        cfg: EfficientViTMITConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features, self.head_hidden_size = cfg.dims[-1], cfg.head_widths[1]
        self.set_feature_info(cfg.dims, STRIDES)
        rows = L if cfg.large else B
        # A block has a residual branch, or two where it attends.
        branches = [1 + row.attends for row, depth in zip(rows, cfg.depths, strict=True) for _ in range(depth)]
        ends = [drop_path_rate * sum(branches[: i + 1]) / sum(branches) for i in range(len(branches))]
        step = drop_path_rate / max(1, sum(branches))

        def bottleneck(row: StageRow, in_dim: int, dim: int, expansion: int, **options: Any) -> nn.Module:
            if not row.norms:
                options["without_norm"] = ("expand", "depthwise")
            layers = dict(norm_layer=cfg.norm_layer, act_layer=cfg.act_layer)
            return row.conv(in_dim, dim, hidden_dim=expansion * in_dim, **layers, **options)

        def block(row: StageRow, dim: int, drop_path: float) -> nn.Module:
            local = bottleneck(row, dim, dim, row.expansion, shortcut=nn.Identity(), drop_path=drop_path)
            if not row.attends:
                return local
            attn = MultiScaleLinearAttention(dim, cfg.head_dim, norm_layer=cfg.norm_layer)
            return AttentionBlock(attn, local, drop_path - step)

        self.stem = Stem(in_chans, cfg)
        stages, in_dim, rates = [], cfg.stem_dim, iter(ends)
        for row, dim, depth in zip(rows, cfg.dims, cfg.depths, strict=True):
            blocks = [block(row, dim, rate) for rate in itertools.islice(rates, depth)]
            stages.append(Stage([bottleneck(row, in_dim, dim, row.entry, stride=2), *blocks]))
            in_dim = dim
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        first, second = cfg.head_widths
        mlp = nn.Sequential(
            nn.Linear(first, second, bias=False), nn.LayerNorm(second, eps=cfg.norm_eps), cfg.act_layer()
        )
        hidden = ConvNormAct(cfg.dims[-1], first, norm_layer=cfg.norm_layer, act_layer=cfg.act_layer)
        self.head = PooledHead(hidden, mlp, second, num_classes, global_pool, drop_rate)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    """The training script's: small normal weights; residual branches start at zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        init_normal(module)
    last: Any = None  # convolution of a residual branch; a module comes after those it contains
    if isinstance(module, Residual):
        branch: Any = module.branch
        last = branch.proj if isinstance(branch, MultiScaleLinearAttention) else branch[-1]
    elif isinstance(module, MBConv | FusedMBConv) and module.shortcut is not None:
        last = module.project
    if last is not None:
        nn.init.zeros_(last.norm.weight)


_L: dict[str, Any] = dict(head_dim=32, large=True)

VARIANTS = {
    "efficientvit_mit_b0": EfficientViTMITConfig(
        (16, 32, 64, 128), (1, 1, 2, 2), 8, head_dim=16, head_widths=(1024, 1280)
    ),
    "efficientvit_mit_b1": EfficientViTMITConfig(
        (32, 64, 128, 256), (1, 2, 3, 4), 16, head_dim=16, head_widths=(1536, 1600)
    ),
    "efficientvit_mit_b2": EfficientViTMITConfig(
        (48, 96, 192, 384), (2, 3, 4, 6), 24, head_dim=32, head_widths=(2304, 2560)
    ),
    "efficientvit_mit_b3": EfficientViTMITConfig(
        (64, 128, 256, 512), (3, 5, 6, 9), 32, head_dim=32, head_widths=(2304, 2560)
    ),
    "efficientvit_mit_l1": EfficientViTMITConfig((64, 128, 256, 512), (1, 1, 6, 6), 32, head_widths=(3072, 3200), **_L),
    "efficientvit_mit_l2": EfficientViTMITConfig((64, 128, 256, 512), (2, 2, 8, 8), 32, head_widths=(3072, 3200), **_L),
    "efficientvit_mit_l3": EfficientViTMITConfig(
        (128, 256, 512, 1024), (2, 2, 8, 8), 64, head_widths=(6144, 6400), **_L
    ),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs("efficientvit_mit", first_conv="stem.conv.conv", classifier="head.fc")
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    return build(EfficientViTMIT, VARIANTS, name, pretrained, **kwargs)


@register_model
def efficientvit_mit_b0(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_b0", pretrained, **kwargs)


@register_model
def efficientvit_mit_b1(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_b1", pretrained, **kwargs)


@register_model
def efficientvit_mit_b2(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_b2", pretrained, **kwargs)


@register_model
def efficientvit_mit_b3(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_b3", pretrained, **kwargs)


@register_model
def efficientvit_mit_l1(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_l1", pretrained, **kwargs)


@register_model
def efficientvit_mit_l2(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_l2", pretrained, **kwargs)


@register_model
def efficientvit_mit_l3(pretrained: bool = False, **kwargs: Any) -> EfficientViTMIT:
    return _create("efficientvit_mit_l3", pretrained, **kwargs)
