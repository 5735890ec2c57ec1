"""PATNet and PartialNet: convolve a quarter of the channels, and weight the others with cheap attention.

Papers: "Partial Convolution Meets Visual Attention" (PATNet), arXiv 2503.03148, and "Partial Channel Network: Compute
Fewer, Perform Better" (PartialNet), arXiv 2502.01303, by the same authors. Code: haiduo/PartialNet (MIT); no weights
were published. Written from the papers and from measurements of that code.

The code's configurations are not the papers' models. `patnet_*` have the papers' parameters and FLOPs: a spatial gate
in every block, depths 1-2-6-4 of T0 and T1, six heads from T1 on (depths and heads are inferred,
not read). `partialnet_*` are the networks that the code builds: the spatial gate in T1 only, depths 1-2-8-2, four
heads.

image (B, 3, H, W) -> maps (B, dim * 2**i, H // s, W // s), s = 4, 8, 16, 32 -> logits (B, num_classes). Maps
are NCHW with channels last in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.layers import ConvNormAct, PooledHead, Stage
from hybridzoo.layers.conv_norm_act import ActLayer
from hybridzoo.layers.init import init_normal
from hybridzoo.layers.partial_attention import (
    DynamicPartialConv,
    PartialAttention,
    PartialChannelAttention,
    SpatialGate,
)

STRIDES = (4, 8, 16, 32)
PARTS = 4  # one of them is convolved
MLP_RATIO = 2
HIDDEN_DIM = 1280  # between pooling and classifier
ACTIVATIONS: dict[str, ActLayer] = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclasses.dataclass(frozen=True)
class PATNetConfig:
    """A size of either form; stage i has `embed_dim * 2**i` channels."""

    depths: tuple[int, ...]
    embed_dim: int
    num_heads: int  # in the last stage
    act: str  # "gelu" or "relu"
    spatial_gate: bool = True  # PAT_sp at the end of every MLP


class Mlp(nn.Module):
    """1x1 convolution, batch norm, activation, 1x1 convolution, spatial gate (PAT_sp) if asked."""

    def __init__(self, dim: int, act: str, spatial_gate: bool) -> None:
        super().__init__()
        self.expand = ConvNormAct(dim, MLP_RATIO * dim, act_layer=ACTIVATIONS[act])
        self.project = nn.Conv2d(MLP_RATIO * dim, dim, 1, bias=False)
        self.gate = SpatialGate(dim) if spatial_gate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.project(self.expand(x)))


class Block(nn.Module):
    """Token mixer and MLP around one residual, or, where the mixer attends over pixels, one residual each.

    Stochastic depth drops the MLP's branch only, as published.
    """

    def __init__(self, mixer: nn.Module, mlp: Mlp, two_residuals: bool, drop_path: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = mlp
        self.two_residuals = two_residuals
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x)
        if self.two_residuals:
            x = mixed = x + mixed
        return x + self.drop_path(self.mlp(mixed))


class PATNet(Backbone):
    """PATNet or PartialNet for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, or `""` for the map (then without classes).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block's MLP, growing linearly from 0. The published recipes use 0
            (T0), 0.02 (T1), 0.05 (T2), 0.1 (S), 0.2 (M), 0.3 (L).
        attn_drop_rate: dropout of the last stage's attention matrix; the published code always trains with 0.1.
        proj_drop_rate: dropout after that attention's projection; the published code always trains with 0.1.
        dynamic: replace every token mixer by a `DynamicPartialConv` (PartialNet's DPConv), for widths that are powers
            of two (T0, T2, M). The published code has it as an option that no published configuration uses.
        feature_norms: give `forward_intermediates` (hence `features_only`) maps after a batch norm of their own, as the
            published detection form does; the next stage reads the map before it.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    channels_last = True

    def __init__(
        self,
        cfg: PATNetConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        dynamic: bool = False,
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        if cfg.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {cfg.act!r}")
        if cfg.embed_dim < PARTS or cfg.embed_dim % PARTS:
            raise ValueError(f"embed_dim must be a multiple of {PARTS}; got {cfg.embed_dim}")
        dims = [cfg.embed_dim * 2**i for i in range(len(cfg.depths))]
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.head_hidden_size = HIDDEN_DIM
        self.set_feature_info(dims, STRIDES[: len(dims)])
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))

        def mixer(dim: int, last: bool) -> nn.Module:
            if dynamic:
                return DynamicPartialConv(dim)
            if last:
                return PartialAttention(dim, dim // PARTS, cfg.num_heads, attn_drop_rate, proj_drop_rate)
            return PartialChannelAttention(dim, dim // PARTS)

        # Kernels equal their stride, without padding: incomplete patches are cut off.
        self.stem = ConvNormAct(in_chans, dims[0], 4, 4, padding=0)
        stages = []
        for i, (depth, dim) in enumerate(zip(cfg.depths, dims, strict=True)):
            last = i == len(dims) - 1
            blocks = [
                Block(mixer(dim, last), Mlp(dim, cfg.act, cfg.spatial_gate), last, next(rates)) for _ in range(depth)
            ]
            stages.append(Stage(blocks, ConvNormAct(dims[i - 1], dim, 2, 2, padding=0) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        hidden = nn.Sequential(nn.Linear(self.num_features, HIDDEN_DIM, bias=False), ACTIVATIONS[cfg.act]())
        self.head = PooledHead(nn.Identity(), hidden, HIDDEN_DIM, num_classes, global_pool, drop_rate)
        self.feature_norms = nn.ModuleList(nn.BatchNorm2d(dim) for dim in dims) if feature_norms else None
        self.apply(_init)

    def _offered(self, x: Any, level: int, norm: bool = False) -> Tensor:
        """With `feature_norms` the maps come out normalised."""
        feature = self._to_nchw(x, norm)
        return feature if self.feature_norms is None else self.feature_norms[level](feature)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        init_normal(module)


_T0: dict[str, Any] = dict(embed_dim=32, num_heads=4, act="gelu")
_T1: dict[str, Any] = dict(embed_dim=48, act="gelu")
_T2: dict[str, Any] = dict(depths=(2, 2, 6, 4), embed_dim=64, act="relu")
_S: dict[str, Any] = dict(depths=(2, 2, 9, 4), embed_dim=96, act="relu")
_M: dict[str, Any] = dict(depths=(2, 3, 16, 4), embed_dim=128, act="relu")
_L: dict[str, Any] = dict(depths=(2, 3, 20, 4), embed_dim=160, act="relu")

VARIANTS = {
    "patnet_t0": PATNetConfig((1, 2, 6, 4), **_T0),
    "patnet_t1": PATNetConfig((1, 2, 6, 4), num_heads=6, **_T1),
    "patnet_t2": PATNetConfig(num_heads=6, **_T2),
    "patnet_s": PATNetConfig(num_heads=6, **_S),
    "patnet_m": PATNetConfig(num_heads=6, **_M),
    "patnet_l": PATNetConfig(num_heads=6, **_L),
    "partialnet_t0": PATNetConfig((1, 2, 8, 2), **_T0, spatial_gate=False),
    "partialnet_t1": PATNetConfig((1, 2, 8, 2), num_heads=4, **_T1),
    "partialnet_t2": PATNetConfig(num_heads=4, **_T2, spatial_gate=False),
    "partialnet_s": PATNetConfig(num_heads=4, **_S, spatial_gate=False),
    "partialnet_m": PATNetConfig(num_heads=4, **_M, spatial_gate=False),
    "partialnet_l": PATNetConfig(num_heads=4, **_L, spatial_gate=False),
}

default_cfgs = generate_default_cfgs(checkpoints.timm_cfgs("patnet", first_conv="stem.conv", classifier="head.fc"))


@register_model
def patnet_t0(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "patnet_t0", pretrained, **kwargs)


@register_model
def patnet_t1(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "patnet_t1", pretrained, **kwargs)


@register_model
def patnet_t2(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "patnet_t2", pretrained, **kwargs)


@register_model
def patnet_s(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "patnet_s", pretrained, **kwargs)


@register_model
def patnet_m(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "patnet_m", pretrained, **kwargs)


@register_model
def patnet_l(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "patnet_l", pretrained, **kwargs)


@register_model
def partialnet_t0(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "partialnet_t0", pretrained, **kwargs)


@register_model
def partialnet_t1(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "partialnet_t1", pretrained, **kwargs)


@register_model
def partialnet_t2(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "partialnet_t2", pretrained, **kwargs)


@register_model
def partialnet_s(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "partialnet_s", pretrained, **kwargs)


@register_model
def partialnet_m(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "partialnet_m", pretrained, **kwargs)


@register_model
def partialnet_l(pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build(PATNet, VARIANTS, "partialnet_l", pretrained, **kwargs)
