"""MaxViT: every block convolves, attends inside windows, and attends over a grid spread across the map.

Paper: "MaxViT: Multi-Axis Vision Transformer", Tu et al., ECCV 2022, arXiv 2204.01697.
Published code: google-research/maxvit (TensorFlow, Apache-2.0). Published weights in PyTorch: timm's conversions,
`maxvit_*_tf_*` (Apache-2.0). Written from the paper and from measurements of both.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32 -> logits (B, num_classes); NHWC inside.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from timm.layers import (
    DropPath,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    register_notrace_module,
    to_2tuple,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build, check_per_stage
from hybridzoo.layers import ConvNormAct, MBConv, PoolShortcut, Stage, WindowAttention
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.relative_position import Resize
from hybridzoo.layers.windows import fit_window, from_windows, padding_mask, to_windows

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 32
EXPANSION = 4  # of MBConv (counted from its output's width) and of the MLPs
SE_RATIO = 0.25  # of MBConv's output width, not of its hidden width

batch_norm = partial(nn.BatchNorm2d, eps=1e-3)  # TensorFlow's
gelu: Any = partial(nn.GELU, approximate="tanh")


@dataclasses.dataclass(frozen=True)
class MaxViTConfig:
    """One variant of the paper."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem_dim: int = 64


@register_notrace_module
class PartitionAttention(nn.Module):
    """Attention in windows (`dilated=False`) or on the grid (`True`), then an MLP; `(B, H, W, dim)` in and out.

    Sizes that the window does not divide are padded and masked, so that results do not depend on the padding.
    """

    def __init__(
        self, dim: int, window: tuple[int, int], dilated: bool, drop_path: float, table_resize: Resize
    ) -> None:
        super().__init__()
        self.window = window
        self.dilated = dilated
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, dim // HEAD_DIM, window, table_resize)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, EXPANSION * dim, act_layer=gelu)  # type: ignore[arg-type]  # not a class alone
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        window = fit_window(height, width, self.window, self.dilated)
        mask = padding_mask(height, width, window, self.dilated, x.device)
        attended = self.attn(to_windows(self.norm1(x), window, self.dilated), mask)
        x = x + self.drop_path(from_windows(attended, height, width, self.dilated))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Block(nn.Module):
    """MBConv, window attention, grid attention: `(B, H, W, in_dim)` -> `(B, H/stride, W/stride, dim)`.

    One stochastic depth rate for all five residuals.
    """

    def __init__(
        self, in_dim: int, dim: int, stride: int, window: tuple[int, int], drop_path: float, table_resize: Resize
    ) -> None:
        super().__init__()
        self.conv = MBConv(
            in_dim,
            dim,
            stride,
            hidden_dim=EXPANSION * dim,
            without_norm=("project",),
            pre_norm=True,
            se_dim=int(SE_RATIO * dim),
            act_layer=gelu,
            norm_layer=batch_norm,
            padding="same",
            shortcut=PoolShortcut(in_dim, dim, stride) if stride > 1 else nn.Identity(),
            drop_path=drop_path,
        )
        self.attn_block = PartitionAttention(dim, window, False, drop_path, table_resize)
        self.attn_grid = PartitionAttention(dim, window, True, drop_path, table_resize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.attn_grid(self.attn_block(x))


class Stem(nn.Module):
    """Image `(B, in_chans, H, W)` -> `(B, H/2, W/2, dim)`; neither norm nor activation after the second convolution."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, dim, 3, 2, padding="same", bias=True, norm_layer=batch_norm, act_layer=gelu)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last from the first convolution on: every later permutation is then a view.
        x = self.conv2(self.conv1(channels_last(x)))
        return x.permute(0, 2, 3, 1).contiguous()


class MaxViT(Backbone):
    """MaxViT for images of any size from 32 x 32 pixels.

    Windows and grid keep the size they were trained with; their number follows the image.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for the head's hidden features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.2 (tiny),
            0.3 (small), 0.4 (base), 0.6 (large).
        window_size: tokens a side of window and grid, one number or (rows, columns): 7 at 224 pixels, 12 at 384, 16 at
            512. Bias tables of other windows are resized bilinearly when weights are loaded, as the authors do.
        img_size: instead of `window_size`, timm's rule: windows as large as the last stage's map of this image (pixels,
            one number or (height, width)), and timm's own resampling of the bias tables. Cost then grows with the
            square of the area; other image sizes still work.

    Raises:
        ValueError: `window_size` is not positive, `img_size` below 32 pixels, or `dims` no multiples of 32.
    """

    layout = "NHWC"

    def __init__(
        self,
        cfg: MaxViTConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        window_size: int | tuple[int, int] = 7,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        window = to_2tuple(window_size)
        if len(window) != 2 or min(window) < 1:
            raise ValueError(f"window_size must be positive, a number or (rows, columns); got {window_size!r}")
        if img_size is not None:
            window = tuple(side // STRIDES[-1] for side in to_2tuple(img_size))
            if len(window) != 2 or min(window) < 1:
                raise ValueError(f"img_size must be at least 32, a number or (height, width); got {img_size!r}")
        check_per_stage(len(STRIDES), dims=cfg.dims, depths=cfg.depths)
        if any(dim < 1 or dim % HEAD_DIM for dim in cfg.dims):
            raise ValueError(f"dims must be multiples of {HEAD_DIM}, the width of an attention head; got {cfg.dims}")
        table_resize: Resize = "bilinear" if img_size is None else "geometric"
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        self.stem = Stem(in_chans, cfg.stem_dim)
        rates: list[Any] = calculate_drop_path_rates(drop_path_rate, list(cfg.depths), stagewise=True)
        stages = []
        in_dim = cfg.stem_dim
        for dim, stage_rates in zip(cfg.dims, rates, strict=True):
            blocks = []
            for i, rate in enumerate(stage_rates):
                blocks.append(Block(in_dim, dim, 1 if i else 2, window, rate, table_resize))
                in_dim = dim
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()  # features are raw; the head has its own norm, after pooling
        self.head = NormMlpClassifierHead(
            in_dim, num_classes, hidden_size=in_dim, pool_type=global_pool, drop_rate=drop_rate
        )
        self.head.norm.eps = 1e-5
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".bias.table")}

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.head.reset(0, "", reset_other=True)  # the head's norm and hidden layer too
        return take


def _init_weights(module: nn.Module) -> None:
    """As the published code: every kernel normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SMALL, _BASE = (2, 2, 5, 2), (2, 6, 14, 2)

VARIANTS = {
    "maxvit_tiny": MaxViTConfig(_SMALL, (64, 128, 256, 512)),
    "maxvit_small": MaxViTConfig(_SMALL, (96, 192, 384, 768)),
    "maxvit_base": MaxViTConfig(_BASE, (96, 192, 384, 768)),
    "maxvit_large": MaxViTConfig(_BASE, (128, 256, 512, 1024), 128),
    "maxvit_xlarge": MaxViTConfig(_BASE, (192, 384, 768, 1536), 192),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs("maxvit", first_conv="stem.conv1.conv", classifier="head.fc")
)


@register_model
def maxvit_tiny(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return build(MaxViT, VARIANTS, "maxvit_tiny", pretrained, **kwargs)


@register_model
def maxvit_small(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return build(MaxViT, VARIANTS, "maxvit_small", pretrained, **kwargs)


@register_model
def maxvit_base(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return build(MaxViT, VARIANTS, "maxvit_base", pretrained, **kwargs)


@register_model
def maxvit_large(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return build(MaxViT, VARIANTS, "maxvit_large", pretrained, **kwargs)


@register_model
def maxvit_xlarge(pretrained: bool = False, **kwargs: Any) -> MaxViT:
    return build(MaxViT, VARIANTS, "maxvit_xlarge", pretrained, **kwargs)
