"""DAT, DAT+ and DAT++: pyramids with deformable attention in every second block.

Papers: "Vision Transformer with Deformable Attention", Xia et al., CVPR 2022, arXiv 2201.00520 (DAT); "DAT++: Spatially
Dynamic Vision Transformer with Deformable Attention", Xia et al., arXiv 2309.01430 (the others). Published code and
weights: LeapLabTHU/DAT (Apache-2.0). Written from the papers and from measurements of that code.

The other blocks have window attention (DAT: Swin's, shifted in the fine stages) or neighborhood attention.
DAT++ adds convolutions: in the stem, between stages, before every block and in every MLP; DAT+ (`dat_plain_*`) is DAT++
without them.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32, rounded up -> logits (B, num_classes); NHWC inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build, check_per_stage
from hybridzoo.layers import (
    DeformableAttention,
    DepthwiseMlp,
    NeighborhoodAttention2d,
    RelativePositionBias,
    ShiftedWindowAttention,
    Stage,
    TransformerBlock,
)
from hybridzoo.layers.init import trunc_normal_
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.patches import ConvDownsample, PatchStem

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 32
MLP_RATIO = 4
KINDS = "DLNS"  # deformable, local windows, neighborhood, shifted windows


@dataclasses.dataclass(frozen=True)
class DATConfig:
    """A variant of the papers; tuples are by stage.

    `kinds`: the blocks' attention, one letter each (D deformable, L windows, S shifted windows, N neighborhoods),
    repeated to the length in `depths`; a stage ends with the last letter.
    `groups`, `key_strides`, `offset_kernels`, `offset_range`: of D, see `DeformableAttention`.
    `convolutional`: DAT++'s convolutions.
    `img_size`: the (square) image size for D's tables; L's windows have a 32nd of it. Other images work too, and
    weights of another size are resized while loading.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    kinds: tuple[str, ...]
    groups: tuple[int, ...]
    key_strides: tuple[int, ...]
    offset_kernels: tuple[int, ...]
    offset_range: float | None = None
    convolutional: bool = False
    img_size: int = 224


class ConvStem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, H/4, W/4, dim), rounded up: two 3x3 convolutions, a norm after each."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(channels_last(x)).permute(0, 2, 3, 1)
        x = self.act(self.norm1(x)).permute(0, 3, 1, 2)
        return self.norm2(self.conv2(x).permute(0, 2, 3, 1))


class ConvolutionalBlock(TransformerBlock):
    """DAT++'s block on a `(B, H, W, dim)` map: local perception (a depthwise residual), attention, MLP."""

    def __init__(self, dim: int, attn: nn.Module, drop_path: float) -> None:
        mlp = DepthwiseMlp(dim, MLP_RATIO * dim, residual=True)
        super().__init__(dim, attn, drop_path=drop_path, mlp=mlp)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nothing else for the attention
        x = x + self.local(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return super().forward(x)


class DAT(Backbone):
    """DAT, DAT+ and DAT++ for images of any size from 32 x 32 pixels.

    For sizes that the published code does not support: patches, merged patches and windows that do not divide the image
    are padded with zeros at the bottom and right; bias tables are resized with the map; a single key or query on an
    axis is in its middle. None of this happens at the published sizes.

    Args:
        cfg: the variant; its fields (`depths`, `img_size`, …) are also arguments of `timm.create_model`.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.2, 0.3,
            0.5 (DAT) and 0.2, 0.4, 0.7 (DAT++) in order of size.

    Raises:
        ValueError: a tuple without an entry for every stage, or an unknown letter in `kinds`.
    """

    layout = "NHWC"

    def __init__(
        self,
        cfg: DATConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        tuples = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
        check_per_stage(len(STRIDES), **{name: value for name, value in tuples.items() if isinstance(value, tuple)})
        if unknown := sorted({*"".join(cfg.kinds)} - {*KINDS}):
            raise ValueError(f"kinds must be made of the letters {', '.join(KINDS)}; got {', '.join(unknown)}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        stem = ConvStem(in_chans, cfg.dims[0]) if cfg.convolutional else PatchStem(in_chans, cfg.dims[0], STRIDES[0])
        self.stem: nn.Module = stem
        stages = []
        for i, (dim, depth, kinds) in enumerate(zip(cfg.dims, cfg.depths, cfg.kinds, strict=True)):
            blocks: list[nn.Module] = []
            for kind in (kinds * depth)[-depth:]:
                attn, drop_path = _attention(cfg, i, kind), next(rates)
                if cfg.convolutional:
                    blocks.append(ConvolutionalBlock(dim, attn, drop_path))
                else:
                    blocks.append(TransformerBlock(dim, attn, MLP_RATIO, drop_path=drop_path))
            down = ConvDownsample(cfg.dims[i - 1], dim, kernel_size=3 if cfg.convolutional else 2) if i else None
            stages.append(Stage(blocks, down))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(_init)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("bias.table")}


def _attention(cfg: DATConfig, stage: int, kind: str) -> nn.Module:
    dim = cfg.dims[stage]
    heads = dim // HEAD_DIM
    if kind == "N":
        return NeighborhoodAttention2d(dim, heads, kernel_size=7)
    if kind == "D":
        side = max(2, -(-cfg.img_size // STRIDES[stage]))
        numbers = cfg.groups[stage], side, cfg.key_strides[stage], cfg.offset_kernels[stage]
        return DeformableAttention(dim, heads, *numbers, offset_range=cfg.offset_range)
    window = max(1, cfg.img_size // STRIDES[-1])
    return ShiftedWindowAttention(dim, heads, window, shift=-(-window // 2) if kind == "S" else 0)  # Swin rounds down


def _init(module: nn.Module) -> None:
    """Initialise the tables as in the papers; all other parameters keep PyTorch's initialisation, as in the published
    code."""
    if isinstance(module, RelativePositionBias):
        trunc_normal_(module.table, std=0.01)


_DAT: Any = dict(kinds=("LS", "LS", "LD", "LD"), groups=(1, 1, 3, 6), offset_range=1.0)
_DAT |= dict(key_strides=(1, 1, 1, 1), offset_kernels=(9, 7, 5, 3))  # those of stages 1 and 2 are not used
_PLAIN: Any = dict(kinds=("ND", "ND", "ND", "D"), depths=(2, 4, 18, 2))
_PLAIN |= dict(key_strides=(8, 4, 2, 1), offset_kernels=(9, 7, 5, 3))
_PLUS: Any = dict(_PLAIN, convolutional=True)

VARIANTS = {
    "dat_tiny": DATConfig((96, 192, 384, 768), (2, 2, 6, 2), **_DAT),
    "dat_small": DATConfig((96, 192, 384, 768), (2, 2, 18, 2), **_DAT),
    "dat_base": DATConfig((128, 256, 512, 1024), (2, 2, 18, 2), **_DAT | dict(groups=(1, 1, 4, 8))),
    "dat_plain_tiny": DATConfig((64, 128, 256, 512), groups=(1, 2, 4, 8), **_PLAIN),
    "dat_plus_tiny": DATConfig((64, 128, 256, 512), groups=(1, 2, 4, 8), **_PLUS),
    "dat_plus_small": DATConfig((96, 192, 384, 768), groups=(1, 2, 3, 6), **_PLUS),
    "dat_plus_base": DATConfig((128, 256, 512, 1024), groups=(2, 4, 8, 16), **_PLUS),
}

default_cfgs = generate_default_cfgs(checkpoints.timm_cfgs("dat", first_conv="stem.conv1", classifier="head.fc"))


@register_model
def dat_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_tiny", pretrained, **kwargs)


@register_model
def dat_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_small", pretrained, **kwargs)


@register_model
def dat_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_base", pretrained, **kwargs)


@register_model
def dat_plain_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_plain_tiny", pretrained, **kwargs)


@register_model
def dat_plus_tiny(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_plus_tiny", pretrained, **kwargs)


@register_model
def dat_plus_small(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_plus_small", pretrained, **kwargs)


@register_model
def dat_plus_base(pretrained: bool = False, **kwargs: Any) -> DAT:
    return build(DAT, VARIANTS, "dat_plus_base", pretrained, **kwargs)
