"""EfficientViT of Microsoft Research Asia: sandwich blocks around cascaded group attention, M0 to M5.

Paper: "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", Liu et al., CVPR 2023,
arXiv 2305.07027. Published code and weights: microsoft/Cream (MIT). Not the MIT family of the same name, see
`efficientvit_mit`. Written from the paper and from measurements of that code.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 16, 32, 64, sizes rounded up -> logits (B, num_classes). Maps
are NCHW with channels last in memory.

Windows at other sizes than 224: the trained ones, (7, 7, 4) tokens. A map that fits into its window is attended to as
it is; a larger one is padded with zeros at the bottom and right, as the published code does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build, check_per_stage
from hybridzoo.layers import CascadedGroupAttention, ConvNormAct, MBConv, PooledHead, Residual, Stage
from hybridzoo.layers.init import init_linear

STRIDES = (16, 32, 64)
STEM_STRIDES = (4, 8)
FFN_RATIO = 2
MERGE_RATIO = 4


@dataclasses.dataclass(frozen=True)
class EfficientViTMSRAConfig:
    """A row of the paper's Table 1."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    kernel_sizes: tuple[int, ...] = (7, 5, 3, 3)  # over the queries, by head, the same in all stages
    windows: tuple[int, ...] = (7, 7, 4)  # by stage; 4 is what is left of a 224-pixel image at stride 64


class FFN(nn.Sequential):
    """Two 1x1 convolutions with ReLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = ConvNormAct(dim, FFN_RATIO * dim, act_layer=nn.ReLU)
        self.fc2 = ConvNormAct(FFN_RATIO * dim, dim)
        _start_at_zero(self.fc2)


def local(dim: int, drop_path: float = 0.0, quiet: bool = True) -> Residual:
    """Residual depthwise 3x3 convolution; starts as the identity if `quiet`."""
    conv = ConvNormAct(dim, dim, 3, groups=dim)
    if quiet:
        _start_at_zero(conv)
    return Residual(conv, drop_path)


class Block(nn.Sequential):
    """The sandwich: one attention between two pairs of depthwise convolution and FFN, all residual."""

    def __init__(self, dim: int, attn: CascadedGroupAttention, drop_path: float) -> None:
        super().__init__()
        _start_at_zero(attn.proj)
        self.local0 = local(dim, drop_path)
        self.ffn0 = Residual(FFN(dim), drop_path)
        self.attn = Residual(attn, drop_path)
        self.local1 = local(dim, drop_path)
        self.ffn1 = Residual(FFN(dim), drop_path)


class Downsample(nn.Sequential):
    """(B, dim, H, W) -> (B, out_dim, H/2, W/2): an inverted bottleneck between two pairs of convolution and FFN."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.local0 = local(dim, quiet=False)
        self.ffn0 = Residual(FFN(dim))
        self.merge = MBConv(
            dim, out_dim, 2, hidden_dim=MERGE_RATIO * dim, se_dim=dim, act_layer=nn.ReLU, se_act_layer=nn.ReLU
        )
        self.local1 = local(out_dim, quiet=False)
        self.ffn1 = Residual(FFN(out_dim))


class Stem(nn.Sequential):
    """Image -> (B, dim, H/16, W/16): four strided 3x3 convolutions, no activation after the last."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, dim // 8, 3, 2, act_layer=nn.ReLU)
        self.conv2 = ConvNormAct(dim // 8, dim // 4, 3, 2, act_layer=nn.ReLU)
        self.conv3 = ConvNormAct(dim // 4, dim // 2, 3, 2, act_layer=nn.ReLU)
        self.conv4 = ConvNormAct(dim // 2, dim, 3, 2)


class EfficientViTMSRA(Backbone):
    """EfficientViT (MSRA) for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`. `windows=(7, 7, 7)` makes the published
            detectors' backbone: bias tables of other windows are resized while they are loaded.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, `"avgmax"`, or `""` for no head.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used none.
        stem_taps: offer the stem's maps at strides 4 and 8 (`dims[0] / 4` and `/ 2` channels) as the first two levels,
            for dense heads that want a finer pyramid than the published strides 16, 32, 64.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    channels_last = True
    head: PooledHead

    def __init__(
        self,
        cfg: EfficientViTMSRAConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        stem_taps: bool = False,
    ) -> None:
        super().__init__()
        check_per_stage(len(STRIDES), dims=cfg.dims, depths=cfg.depths, heads=cfg.heads, windows=cfg.windows)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        if stem_taps:
            self.set_stem_info((cfg.dims[0] // 4, cfg.dims[0] // 2), STEM_STRIDES, ("stem.conv2", "stem.conv3"))
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))

        self.stem = Stem(in_chans, cfg.dims[0])
        stages = []
        for i, (dim, depth, heads) in enumerate(zip(cfg.dims, cfg.depths, cfg.heads, strict=True)):
            blocks = []
            for _ in range(depth):
                attn = CascadedGroupAttention(dim, heads, cfg.windows[i], cfg.kernel_sizes)
                blocks.append(Block(dim, attn, next(rates)))
            stages.append(Stage(blocks, Downsample(cfg.dims[i - 1], dim) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = PooledHead(
            nn.Identity(), nn.BatchNorm1d(self.num_features), self.num_features, num_classes, global_pool, drop_rate
        )
        init_linear(self.head.fc)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}

    def stem_maps(self, x: Tensor) -> list[Tensor]:
        stem: Any = self.stem
        quarter = stem.conv2(stem.conv1(x))
        eighth = stem.conv3(quarter)
        return [quarter, eighth, stem.conv4(eighth)]


def _start_at_zero(last: Any) -> None:
    """Zero the norm of a residual branch's last convolution, so that the branch adds nothing at first."""
    nn.init.zeros_(last.norm.weight)


VARIANTS = {
    "efficientvit_msra_m0": EfficientViTMSRAConfig((64, 128, 192), (1, 2, 3), (4, 4, 4), kernel_sizes=(5, 5, 5, 5)),
    "efficientvit_msra_m1": EfficientViTMSRAConfig((128, 144, 192), (1, 2, 3), (2, 3, 3)),
    "efficientvit_msra_m2": EfficientViTMSRAConfig((128, 192, 224), (1, 2, 3), (4, 3, 2)),
    "efficientvit_msra_m3": EfficientViTMSRAConfig((128, 240, 320), (1, 2, 3), (4, 3, 4), kernel_sizes=(5, 5, 5, 5)),
    "efficientvit_msra_m4": EfficientViTMSRAConfig((128, 256, 384), (1, 2, 3), (4, 4, 4)),
    "efficientvit_msra_m5": EfficientViTMSRAConfig((192, 288, 384), (1, 3, 4), (3, 3, 4)),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs(
        "efficientvit_msra", first_conv="stem.conv1.conv", classifier="head.fc", reduction=STRIDES[-1]
    )
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    return build(EfficientViTMSRA, VARIANTS, name, pretrained, **kwargs)


@register_model
def efficientvit_msra_m0(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return _create("efficientvit_msra_m0", pretrained, **kwargs)


@register_model
def efficientvit_msra_m1(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return _create("efficientvit_msra_m1", pretrained, **kwargs)


@register_model
def efficientvit_msra_m2(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return _create("efficientvit_msra_m2", pretrained, **kwargs)


@register_model
def efficientvit_msra_m3(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return _create("efficientvit_msra_m3", pretrained, **kwargs)


@register_model
def efficientvit_msra_m4(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return _create("efficientvit_msra_m4", pretrained, **kwargs)


@register_model
def efficientvit_msra_m5(pretrained: bool = False, **kwargs: Any) -> EfficientViTMSRA:
    return _create("efficientvit_msra_m5", pretrained, **kwargs)
