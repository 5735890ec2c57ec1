"""OverLoCK: a coarse overview of the whole image first, then convolutions whose kernels are computed with it.

Paper: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", Lou and Yu, CVPR
2025, arXiv 2502.20087. Published code and weights: LMMMEng/OverLoCK (Apache-2.0). Written from the paper and from
measurements of that code.

Three parts: the Base-Net (stages 1 to 3), the Overview-Net (a short stage 4, whose map is the *context*), and the
Focus-Net (stages 3 and 4 again, with kernels computed from the context). As a pyramid of four stages, the Overview-Net
is one of stage 3's blocks, between the Base-Net's and the Focus-Net's.

image (B, 3, H, W) -> maps (B, width, ceil(H / s), ceil(W / s)), s = 4, 8, 16, 32, with the context's dims[3] // 4
channels appended to those of the last two -> logits (B, num_classes). Maps are NCHW with channels last in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from timm.layers import (
    DropPath,
    LayerNorm2d,
    SqueezeExcite,
    calculate_drop_path_rates,
    register_notrace_module,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.layers import ContextMixing, ConvNormAct, DilatedReparamConv, PooledHead, Stage
from hybridzoo.layers.init import init_normal
from hybridzoo.layers.resize import resize_map

STRIDES = (4, 8, 16, 32)
KERNELS = (17, 15, 13, 7)
HEAD_DIM = 1024  # between the last map and the classifier
FeatureNorms = Literal["", "segmentation", "detection"]
# State of the Focus-Net: features, running context, the context at their size and at stride 32, Overview-Net's map.
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class OverLoCKConfig:
    """A row of the paper's table 1.

    Attributes:
        depths: blocks of the Base-Net's three stages and of the Overview-Net.
        focus_depths: blocks of the Focus-Net's two stages.
        dims: widths of the four stages.
        num_heads: groups of channels with their own kernels, in the Focus-Net's two stages.
    """

    depths: tuple[int, ...]
    focus_depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_heads: tuple[int, ...]


class ResidualDepthwise(nn.Module):
    """`x` plus a depthwise 3x3 convolution of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ScaleShift(nn.Module):
    """A factor and a summand for every channel."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), scale))  # not 1-D, because the published runs decay it
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, 0])


class ConvMlp(nn.Module):
    """1x1 convolution, GELU, residual depthwise convolution, global response norm, 1x1 convolution."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.local = ResidualDepthwise(hidden_dim)
        self.norm = GlobalResponseNorm(hidden_dim, channels_last=False)
        self.project = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(self.local(self.act(self.expand(x)))))


def _squeeze_excite(dim: int) -> SqueezeExcite:
    gelu: Any = lambda inplace: nn.GELU()  # noqa: E731  # timm asks for a class, takes any factory
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=gelu)


class RepConvBlock(nn.Module):
    """The Base-Net's and the Overview-Net's block: a large depthwise convolution and an MLP in one residual branch."""

    def __init__(self, dim: int, kernel_size: int, layer_scale: bool, merged: bool, drop_path: float) -> None:
        super().__init__()
        self.dwconv = ResidualDepthwise(dim)
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.large = DilatedReparamConv(dim, kernel_size, merged)
        self.large_norm = nn.BatchNorm2d(dim)
        self.se = _squeeze_excite(dim)
        self.mlp = ConvMlp(dim, 4 * dim)
        self.scale = ScaleShift(dim) if layer_scale else nn.Identity()  # of the identity
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.scale(x) + self.drop_path(self.mlp(self.se(self.large_norm(self.large(self.norm(x))))))


@register_notrace_module
class Overview(nn.Module):
    """The Overview-Net: stage 3's map -> the initial state of the Focus-Net."""

    def __init__(self, dim: int, out_dim: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = ConvNormAct(dim, out_dim, 3, 2)
        self.blocks = nn.Sequential(*blocks)
        self.project = nn.Conv2d(out_dim, out_dim // 4, 1)

    def forward(self, x: Tensor) -> State:
        overview = self.blocks(self.downsample(x))
        coarse = self.project(overview)
        context = resize_map(coarse, (x.shape[2], x.shape[3]))
        return x, context, context, coarse, overview


class FocusDownsample(nn.Module):
    """The Focus-Net's state at half the resolution."""

    def __init__(self, dim: int, out_dim: int, context_dim: int) -> None:
        super().__init__()
        self.features = ConvNormAct(dim, out_dim, 3, 2)
        self.context = ConvNormAct(context_dim, context_dim, 3, 2)

    def forward(self, state: State) -> State:
        x, context, _, coarse, overview = state
        return self.features(x), self.context(context), coarse, coarse, overview


class FocusBlock(nn.Module):
    """The Focus-Net's block: context-mixing dynamic convolution, gated, then an MLP, over features and context.

    Args:
        dim: channels of the features.
        context_dim: channels of the context, `E` below.
        num_heads: of the dynamic convolution.
        kernel_size: its large window, and the static convolution's.
        first: the block starts with the unchanged context.
        merged: see `DilatedReparamConv`.
        drop_path: rate of stochastic depth of both branches.
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, kernel_size: int, first: bool, merged: bool, drop_path: float
    ) -> None:
        super().__init__()
        width = dim + context_dim
        self.widths = (dim, context_dim)
        self.context_scale = None if first else ScaleShift(context_dim)
        self.guide_scale = None if first else ScaleShift(context_dim)
        self.dwconv1 = ResidualDepthwise(width)
        self.norm1 = LayerNorm2d(width, eps=1e-6)
        self.fuse_local = ConvNormAct(width, width, 3, groups=width, bias=True, act_layer=nn.GELU)
        self.fuse_project = nn.Conv2d(width, dim, 1)
        self.fuse_norm = GlobalResponseNorm(dim, channels_last=False)
        self.gate = ConvNormAct(dim, dim, act_layer=nn.SiLU)
        self.large = DilatedReparamConv(dim, kernel_size, merged)
        self.large_norm = nn.BatchNorm2d(dim)
        self.mixing = ContextMixing(dim, context_dim, num_heads, kernel_size)
        self.se = _squeeze_excite(dim)
        self.out_norm = nn.BatchNorm2d(dim)
        self.out_project = nn.Conv2d(dim, width, 1)
        self.dwconv2 = ResidualDepthwise(width)
        self.norm2 = LayerNorm2d(width, eps=1e-6)
        self.mlp = ConvMlp(width, 3 * dim)
        self.scale1, self.scale2 = ScaleShift(width), ScaleShift(width)  # of the identities
        self.drop_path = DropPath(drop_path)

    def forward(self, state: State) -> State:
        x, context, guide, coarse, overview = state
        if self.context_scale is not None and self.guide_scale is not None:
            context = self.context_scale(context) + self.guide_scale(guide)
        x = self.dwconv1(torch.cat([x, context], 1))
        x = self.scale1(x) + self.drop_path(self.mix(self.norm1(x)))
        x = self.dwconv2(x)
        x = self.scale2(x) + self.drop_path(self.mlp(self.norm2(x)))
        x, context = x.split(self.widths, 1)
        return x, context, guide, coarse, overview

    def mix(self, x: Tensor) -> Tensor:
        """Normalised features and context together, `(B, dim + E, H, W)` in and out."""
        value = self.fuse_norm(self.fuse_project(self.fuse_local(x)))
        features, context = x.split(self.widths, 1)
        mixed = self.mixing(features, context, value) + self.large_norm(self.large(value))
        return self.out_project(self.out_norm(self.gate(value) * self.se(mixed)))


class NormStage(Stage):
    """A stage whose map is normalised before it is used, also by the next stage."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module, dim: int) -> None:
        super().__init__(blocks, downsample)
        self.norm = LayerNorm2d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class OverLoCK(Backbone):
    """OverLoCK for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, or `""` for the map (then without classes).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.1, 0.15,
            0.4, 0.5 (xtiny, tiny, small, base).
        merged: build every large kernel with its dilated branches as one convolution, which is equal in evaluation, as
            in the published files `*_reparam`. For inference; training needs the branches. Weights of both forms load
            into both.
        aux_head: add a second classifier on the Overview-Net's map. In training, the network then returns logits and
            auxiliary logits; the published runs weight the auxiliary loss by 0.4.
        feature_norms: `"segmentation"` or `"detection"`: give `forward_intermediates` (hence `features_only`) the maps
            of the published dense networks, after layer norms of their own, in detection with the Overview-Net's map
            added to the last one. As published, stage 3 reads stage 2's map normalised, so the features differ from
            the classifier's from there on.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    channels_last = True
    stages_give_maps = False  # the last two give a `State`
    optional = ("aux_head.", "stages.1.norm.", "feature_norms.", "overview_")

    def __init__(
        self,
        cfg: OverLoCKConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        merged: bool = False,
        aux_head: bool = False,
        feature_norms: FeatureNorms = "",
    ) -> None:
        super().__init__()
        for name, length in (("depths", 4), ("focus_depths", 2), ("dims", 4), ("num_heads", 2)):
            if len(getattr(cfg, name)) != length or min(getattr(cfg, name)) < 1:
                raise ValueError(f"{name} must be {length} positive numbers; got {getattr(cfg, name)!r}")
        if feature_norms not in ("", "segmentation", "detection"):
            raise ValueError(f"feature_norms must be '', 'segmentation' or 'detection'; got {feature_norms!r}")
        dims, context_dim = cfg.dims, cfg.dims[3] // 4
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths) + sum(cfg.focus_depths)))

        def blocks(stage: int) -> list[nn.Module]:
            return [
                RepConvBlock(dims[stage], KERNELS[stage], stage > 1, merged, next(rates))
                for _ in range(cfg.depths[stage])
            ]

        def focus_blocks(stage: int) -> list[nn.Module]:
            heads = cfg.num_heads[stage - 2]
            return [
                FocusBlock(dims[stage], context_dim, heads, KERNELS[stage], stage == 2 and i == 0, merged, next(rates))
                for i in range(cfg.focus_depths[stage - 2])
            ]

        widths = (*dims[:2], dims[2] + context_dim, dims[3] + context_dim)
        self.num_classes = num_classes
        self.num_features = widths[3]
        self.head_hidden_size = HEAD_DIM
        self.set_feature_info(widths, STRIDES)
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, dims[0] // 2, 3, 2, act_layer=nn.GELU),
            ConvNormAct(dims[0] // 2, dims[0] // 2, 3, act_layer=nn.GELU),
            ConvNormAct(dims[0] // 2, dims[0], 3, 2, act_layer=nn.GELU),
            ConvNormAct(dims[0], dims[0], 3),
        )
        first = Stage(blocks(0))
        merge = ConvNormAct(dims[0], dims[1], 3, 2)
        second = NormStage(blocks(1), merge, dims[1]) if feature_norms else Stage(blocks(1), merge)
        base = blocks(2)
        overview = Overview(dims[2], dims[3], blocks(3))
        third = Stage([*base, overview, *focus_blocks(2)], ConvNormAct(dims[1], dims[2], 3, 2))
        fourth = Stage(focus_blocks(3), FocusDownsample(dims[2], dims[3], context_dim))
        self.stages = nn.Sequential(first, second, third, fourth)
        self.feature_norms: nn.ModuleDict | None = None
        self.overview_norm: nn.Module | None = None
        if feature_norms:
            self.feature_norms = nn.ModuleDict({str(i): LayerNorm2d(widths[i], eps=1e-6) for i in (0, 2, 3)})
        if feature_norms == "detection":
            self.overview_norm = LayerNorm2d(dims[3], eps=1e-6)
            self.overview_project = nn.Conv2d(dims[3], widths[3], 1)
            self.overview_scale = ScaleShift(widths[3], 1e-5)
        self.norm = nn.Identity()
        before = ConvNormAct(widths[3], HEAD_DIM, act_layer=nn.SiLU)
        self.head = PooledHead(before, nn.Identity(), HEAD_DIM, num_classes, global_pool, drop_rate)
        self.aux_head: PooledHead | None = None
        if aux_head:
            self.aux_head = PooledHead(nn.BatchNorm2d(dims[3]), nn.Identity(), dims[3], num_classes)
        self.apply(_init)

    def forward(self, x: Tensor) -> Any:
        """Logits; of a training network with an auxiliary head, logits and its logits."""
        if self.aux_head is None or not self.training:
            return super().forward(x)
        state = self.stages(self.stem(self._in_order(x)))
        return self.forward_head(self._final(state)), self.aux_head(state[4])

    def fit_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert large kernels to the form of this network; drop an auxiliary head that it does not have."""
        state = dict(state)
        if self.aux_head is None:
            state = {name: value for name, value in state.items() if not name.startswith("aux_head.")}
        for name, module in self.named_modules():
            if isinstance(module, DilatedReparamConv):
                state = module.fit_state(state, name)
        return state

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.aux_head is not None:
            self.aux_head = None if num_classes == 0 else self.aux_head
        if self.aux_head is not None:
            self.aux_head.reset(num_classes)
            self.aux_head.to(next(self.stem.parameters()))

    def _to_nchw(self, x: Any, norm: bool = False) -> Tensor:
        """A map unchanged; for the Focus-Net's state, features and context."""
        return torch.cat(x[:2], 1) if isinstance(x, tuple) else x

    def _offered(self, x: Any, level: int, norm: bool = False) -> Tensor:
        feature = self._to_nchw(x)
        if self.feature_norms is None:
            return feature
        if str(level) in self.feature_norms:
            feature = self.feature_norms[str(level)](feature)
        if level == 3 and self.overview_norm is not None:
            feature = feature + self.overview_scale(self.overview_project(self.overview_norm(x[4])))
        return feature


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) or (
        isinstance(module, nn.Linear) and module.bias is None
    ):  # taps, not a classifier
        init_normal(module)


VARIANTS = {
    "overlock_xtiny": OverLoCKConfig((2, 2, 3, 2), (6, 2), (56, 112, 256, 336), (8, 12)),
    "overlock_tiny": OverLoCKConfig((4, 4, 6, 2), (12, 2), (64, 128, 256, 512), (8, 16)),
    "overlock_small": OverLoCKConfig((6, 6, 8, 3), (16, 3), (64, 128, 320, 512), (16, 32)),
    "overlock_base": OverLoCKConfig((8, 8, 10, 4), (20, 4), (80, 160, 384, 576), (12, 18)),
}

default_cfgs = generate_default_cfgs(checkpoints.timm_cfgs("overlock", first_conv="stem.0.conv", classifier="head.fc"))


@register_model
def overlock_xtiny(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    return build(OverLoCK, VARIANTS, "overlock_xtiny", pretrained, **kwargs)


@register_model
def overlock_tiny(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    return build(OverLoCK, VARIANTS, "overlock_tiny", pretrained, **kwargs)


@register_model
def overlock_small(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    return build(OverLoCK, VARIANTS, "overlock_small", pretrained, **kwargs)


@register_model
def overlock_base(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    return build(OverLoCK, VARIANTS, "overlock_base", pretrained, **kwargs)
