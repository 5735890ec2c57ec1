"""FasterViT: convolutions at high resolution, then window attention; windows exchange information by carrier tokens.

Paper: "FasterViT: Fast Vision Transformers with Hierarchical Attention", Hatamizadeh et al., ICLR 2024,
arXiv 2306.06189.
Published code and weights: NVlabs/FasterViT, under the NVIDIA Source Code License-NC: NON-COMMERCIAL use only (research
and evaluation), for the weights too. This file contains none of that code: it was written from a description of the
network and from recorded outputs. Weights are loaded from their publisher and never re-hosted.

image (B, 3, H, W) -> maps (B, dim * 2^i, H/s, W/s), s = 4, 8, 16, 32 -> logits (B, num_classes); NCHW between stages,
channels-last in memory throughout.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build, check_per_stage
from hybridzoo.kernels.open_sizes import parts
from hybridzoo.layers import ConvNormAct, CoordinateBias, CoordinateEmbedding, Stage, TransformerBlock
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.resize import mean_pool
from hybridzoo.layers.windows import attend, from_windows, padding_mask, to_windows

_logger = logging.getLogger(__name__)

STRIDES = (4, 8, 16, 32)
CARRIER_SIDE = 2  # carrier tokens a side of each window
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class FasterViTConfig:
    """One variant. Stages are two of convolutions, then two of attention."""

    depths: tuple[int, ...]
    dim: int  # width of the first map, doubled by every stage
    stem_dim: int = 64
    num_heads: tuple[int, int] = (8, 16)  # of the attention stages
    window_size: tuple[int, int] = (7, 7)  # of the attention stages, in tokens a side
    hierarchical: bool = True  # carrier tokens in the third stage
    layer_scale: float | None = None
    propagate: bool = False  # carrier tokens are added to the map once more at the end of their stage


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a residual, nothing after the sum. `(B, dim, H, W)` in and out."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(dim, dim, 3, bias=True, act_layer=nn.GELU)
        self.conv2 = ConvNormAct(dim, dim, 3, bias=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv2(self.conv1(x)))


class BiasedAttention(nn.Module):
    """Multi-head attention over the tokens of a small map, biased by their offsets; `(batch, tokens, dim)` in and out.

    The `extra` tokens in front of the map's have no position: scores with them are not biased.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = CoordinateBias(num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int], extra: int = 0, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(query, key, value, self.num_heads, self.bias(size, extra), mask))


class CarrierTokens(nn.Module):
    """First carrier tokens of a map: 3x3 depthwise convolution, average pooling.

    `(B, dim, rows * window, columns * window)` -> `(B, rows * side, columns * side, dim)`. The pooling windows overlap
    and widen with the map, as published: the stride is `window // side` on any map.
    """

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.window // CARRIER_SIDE
        rows, columns = (side - (side // self.window * CARRIER_SIDE - 1) * stride for side in x.shape[2:])
        return mean_pool(self.conv(x), (rows, columns), (stride, stride)).permute(0, 2, 3, 1)


class AttentionBlock(nn.Module):
    """Attention inside windows; if hierarchical, among carrier tokens first, which then take part in their window.

    Windows `(B * rows * columns, window^2, dim)` and carrier tokens `(B, rows * side, columns * side, dim)`, or `None`,
    in and out. Embeddings are added in every block and stay in the residual stream.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        drop_path: float,
        layer_scale: float | None,
        hierarchical: bool,
        propagate: bool,
    ) -> None:
        super().__init__()
        self.window = (window, window)
        self.propagate = propagate
        self.pos_embed = CoordinateEmbedding(dim)
        rest: dict[str, Any] = dict(mlp_ratio=MLP_RATIO, layer_scale=layer_scale, drop_path=drop_path)
        self.tokens = TransformerBlock(dim, BiasedAttention(dim, num_heads), **rest)
        self.carrier_pos_embed = CoordinateEmbedding(dim) if hierarchical else None
        self.carriers = TransformerBlock(dim, BiasedAttention(dim, num_heads), **rest) if hierarchical else None

    def forward(self, x: Tensor, ct: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = x + self.pos_embed(self.window)
        if self.carriers is None or self.carrier_pos_embed is None or ct is None:
            return self.tokens(x, self.window, mask=mask), None
        side = (CARRIER_SIDE, CARRIER_SIDE)
        size = (ct.shape[1], ct.shape[2])
        ct = self.carriers(ct.flatten(1, 2) + self.carrier_pos_embed(size), size)
        carried = to_windows(ct.unflatten(1, size), side)
        x = torch.cat([carried.flatten(3, 4).flatten(0, 2), x], dim=1)
        x = self.tokens(x, self.window, extra=CARRIER_SIDE**2, mask=mask)
        per_window, x = x.tensor_split([CARRIER_SIDE**2], dim=1)
        if self.propagate:
            coarse = per_window.transpose(1, 2).unflatten(2, side)
            x = x + self.carriers.scale1(F.interpolate(coarse, self.window).flatten(2).transpose(1, 2))
        return x, from_windows(per_window.reshape(carried.shape), *size)


@register_notrace_module
class AttentionStage(Stage):
    """A stage of attention blocks: the map is padded, cut into windows once, and merged at the end. NCHW.

    As published, the padding at the bottom and right is zero before the first block, is attended to and gets position
    embeddings. With `mask_padding`, the windows' tokens do not attend to it. Carrier tokens are pooled over it in both
    cases.
    """

    def __init__(
        self, blocks: list[AttentionBlock], downsample: nn.Module, dim: int, hierarchical: bool, mask_padding: bool
    ) -> None:
        super().__init__(blocks, downsample)
        self.window = blocks[0].window
        self.mask_padding = mask_padding
        self.carrier_tokens = CarrierTokens(dim, self.window[0]) if hierarchical else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        height, width = x.shape[2:]
        rows, columns = (parts(side, tokens) * tokens for side, tokens in zip(x.shape[2:], self.window, strict=True))
        x = F.pad(x, (0, columns - width, 0, rows - height))
        ct = None if self.carrier_tokens is None else self.carrier_tokens(x)
        mask = padding_mask(height, width, self.window, device=x.device) if self.mask_padding else None
        if mask is not None and ct is not None:
            mask = F.pad(mask, (CARRIER_SIDE**2, 0), value=True)
        map_size = x.shape[2:]
        windows = to_windows(x.permute(0, 2, 3, 1), self.window)
        grid = windows.shape
        x = windows.flatten(3, 4).flatten(0, 2)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                x, ct = checkpoint(block, x, ct, mask, use_reentrant=False)
            else:
                x, ct = block(x, ct, mask)
        x = from_windows(x.view(grid), *map_size)[:, :height, :width]
        return x.contiguous().permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Layer norm over channels, 3x3 convolution of stride 2; `(B, dim, H, W)` -> `(B, 2 * dim, H/2, W/2)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-6)
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, stem_dim: int, dim: int) -> None:
        super().__init__()
        make = partial(ConvNormAct, norm_layer=partial(nn.BatchNorm2d, eps=1e-4), act_layer=nn.ReLU)
        self.conv1 = make(in_chans, stem_dim, 3, 2)
        self.conv2 = make(stem_dim, dim, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last from the first convolution on: every later permutation is then a view.
        return self.conv2(self.conv1(channels_last(x)))


class FasterViT(Backbone):
    """FasterViT for images of any size from 32 x 32 pixels. Published weights are for NON-COMMERCIAL use.

    Positions are functions of coordinates, so nothing is interpolated between sizes. At square window grids this is the
    published any-resolution model. At other grids that model has errors: it drops the carrier tokens' embedding, uses a
    square bias for a rectangular grid, and gives carrier tokens to the wrong windows. Here coordinates are rectangular.
    A map of one window keeps its carrier tokens, which the published code drops, so that the same parameters are used
    at every size.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.2 (0-2),
            0.3 (3-5), 0.5 (6), 0.42 (ImageNet-21k).
        mask_padding: mask padding tokens in the windows' attention; the published weights were evaluated without it.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        cfg: FasterViTConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        check_per_stage(len(STRIDES), depths=cfg.depths)
        check_per_stage(2, num_heads=cfg.num_heads, window_size=cfg.window_size)  # those of attention
        if min(cfg.window_size) < CARRIER_SIDE:
            raise ValueError(f"window_size must be {CARRIER_SIDE} or more in both stages; got {cfg.window_size}")
        dims = [cfg.dim * 2**i for i in range(len(cfg.depths))]
        if any(heads < 1 or dim % heads for heads, dim in zip(cfg.num_heads, dims[2:], strict=True)):
            raise ValueError(f"num_heads must divide {dims[2:]}, the widths of their stages; got {cfg.num_heads}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.set_feature_info(dims, STRIDES)
        self.stem = Stem(in_chans, cfg.stem_dim, cfg.dim)
        rates: list[Any] = calculate_drop_path_rates(drop_path_rate, list(cfg.depths), stagewise=True)
        stages: list[Stage] = []
        for i, (dim, stage_rates) in enumerate(zip(dims, rates, strict=True)):
            downsample = Downsample(dims[i - 1]) if i else nn.Identity()
            if i < 2:
                stages.append(Stage([ConvBlock(dim, rate) for rate in stage_rates], downsample))
                continue
            hierarchical = cfg.hierarchical and i == 2
            blocks = [
                AttentionBlock(
                    dim,
                    cfg.num_heads[i - 2],
                    cfg.window_size[i - 2],
                    rate,
                    cfg.layer_scale,
                    hierarchical,
                    propagate=cfg.propagate and hierarchical and j == len(stage_rates) - 1,
                )
                for j, rate in enumerate(stage_rates)
            ]
            stages.append(AttentionStage(blocks, downsample, dim, hierarchical, mask_padding))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        matcher = super().group_matcher(coarse)
        if not coarse:  # carrier tokens are made before the first block
            matcher["blocks"].insert(0, (r"^stages\.(\d+)\.carrier_tokens", (0,)))
        return matcher


_LARGE: dict[str, Any] = dict(num_heads=(16, 32), layer_scale=1e-5, propagate=True)

VARIANTS = {
    "fastervit_0": FasterViTConfig((2, 3, 6, 5), 64),
    "fastervit_1": FasterViTConfig((1, 3, 8, 5), 80, stem_dim=32),
    "fastervit_2": FasterViTConfig((3, 3, 8, 5), 96),
    "fastervit_3": FasterViTConfig((3, 3, 12, 5), 128, layer_scale=1e-5, propagate=True),
    "fastervit_4": FasterViTConfig((3, 3, 12, 5), 196, **_LARGE),
    "fastervit_5": FasterViTConfig((3, 3, 12, 5), 320, **_LARGE),
    "fastervit_6": FasterViTConfig((3, 3, 16, 8), 320, **_LARGE),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs("fastervit", first_conv="stem.conv1.conv", classifier="head.fc")
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> FasterViT:
    if pretrained:
        _logger.warning(
            "%s: the published weights are for NON-COMMERCIAL use only (NVIDIA Source Code License-NC)", name
        )
    return build(FasterViT, VARIANTS, name, pretrained, **kwargs)


@register_model
def fastervit_0(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_0", pretrained, **kwargs)


@register_model
def fastervit_1(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_1", pretrained, **kwargs)


@register_model
def fastervit_2(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_2", pretrained, **kwargs)


@register_model
def fastervit_3(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_3", pretrained, **kwargs)


@register_model
def fastervit_4(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_4", pretrained, **kwargs)


@register_model
def fastervit_5(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_5", pretrained, **kwargs)


@register_model
def fastervit_6(pretrained: bool = False, **kwargs: Any) -> FasterViT:
    return _create("fastervit_6", pretrained, **kwargs)
