"""NAT, DiNAT and DiNAT_s: pyramids in which every token attends to a window of tokens around it.

Papers: "Neighborhood Attention Transformer", Hassani et al., CVPR 2023, arXiv 2204.07143 (NAT); "Dilated Neighborhood
Attention Transformer", Hassani and Shi, arXiv 2209.15001 (the others). Published code and weights:
SHI-Labs/Neighborhood-Attention-Transformer (MIT). Written from the papers and from measurements of that code.

There is one block and two skeletons: overlapping convolutions ("conv": NAT, DiNAT) and Swin's patches ("swin":
DiNAT_s). NAT is DiNAT with all dilations 1.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4, 8, 16, 32 -> logits (B, num_classes); NHWC inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build
from hybridzoo.backbones.dinat_dilations import STRIDES, Dilations, Skeleton, block_dilations
from hybridzoo.layers import NeighborhoodAttention2d, Stage, TransformerBlock
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.memory import channels_last
from hybridzoo.layers.neighborhood import Dilation, Padding
from hybridzoo.layers.patches import ConvDownsample, PatchStem

HEAD_DIM = 32


@dataclasses.dataclass(frozen=True)
class DiNATConfig:
    """A row of the papers' tables.

    `dilations`: for each stage the dilations of its blocks, repeated as needed; or `"auto"`, which alternates 1 and the
    largest that fits into the map; or the name of a published choice, see `dinat_dilations`.
    `layer_scale`: initial value, 0 for none.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    mlp_ratio: float
    dilations: Dilations | str = ((1,), (1,), (1,), (1,))
    skeleton: Skeleton = "conv"
    layer_scale: float = 0.0
    kernel_size: int = 7
    padding: Padding = "bias"  # rule for the padding of small maps, see NeighborhoodAttention2d


class ConvStem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, H/4, W/4, dim), rounded up: two 3x3 convolutions, nothing between them, norm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last from the first convolution on: every later permutation is then a view.
        x = self.conv2(self.conv1(channels_last(x)))
        return self.norm(x.permute(0, 2, 3, 1))


class DiNAT(Backbone):
    """NAT, DiNAT and DiNAT_s for images of any size from 32 x 32 pixels.

    Maps smaller than a window are padded as in training, see `NeighborhoodAttention2d`. For much smaller or larger
    images than the variant's size, choose suitable `dilations`.

    Args:
        cfg: the variant; its fields (`dilations`, `kernel_size`, `padding`, `layer_scale`, …) are also arguments of
            `timm.create_model`. Bias tables published for another kernel are resized while loading.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.2 (mini,
            tiny), 0.3 (small), 0.5 (base), 0.35 (large).

    Raises:
        ValueError: `dilations` is neither a known name nor one non-empty sequence of positive numbers for each stage.
    """

    layout = "NHWC"

    def __init__(
        self,
        cfg: DiNATConfig,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dilations = block_dilations(cfg.dilations, cfg.depths, cfg.skeleton)
        if any(dilation != 1 for stage in dilations for dilation in stage):
            self.for_other_sizes = {"dilations": "auto"}
        rates: list[Any] = calculate_drop_path_rates(drop_path_rate, list(cfg.depths), stagewise=True)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)

        def block(dim: int, dilation: Dilation, drop_path: float) -> TransformerBlock:
            attn = NeighborhoodAttention2d(dim, dim // HEAD_DIM, cfg.kernel_size, dilation, padding=cfg.padding)
            return TransformerBlock(dim, attn, cfg.mlp_ratio, layer_scale=cfg.layer_scale, drop_path=drop_path)

        conv = cfg.skeleton == "conv"
        self.stem = ConvStem(in_chans, cfg.dims[0]) if conv else PatchStem(in_chans, cfg.dims[0], STRIDES[0])
        merge: Callable[..., nn.Module] = ConvDownsample if conv else PatchMerging
        stages = []
        for i, dim in enumerate(cfg.dims):
            blocks = [block(dim, dilation, rate) for dilation, rate in zip(dilations[i], rates[i], strict=True)]
            stages.append(Stage(blocks, merge(cfg.dims[i - 1], dim) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(init_linear)


_224: Any = dict(dilations="in1k_224")
_SWIN: Any = dict(_224, mlp_ratio=4.0, skeleton="swin")
_MINI: Any = dict(depths=(3, 4, 6, 5), dims=(64, 128, 256, 512), mlp_ratio=3.0)
_TINY: Any = dict(depths=(3, 4, 18, 5), dims=(64, 128, 256, 512), mlp_ratio=3.0)
_SMALL: Any = dict(depths=(3, 4, 18, 5), dims=(96, 192, 384, 768), mlp_ratio=2.0)
_BASE: Any = dict(depths=(3, 4, 18, 5), dims=(128, 256, 512, 1024), mlp_ratio=2.0)
_LARGE: Any = dict(depths=(3, 4, 18, 5), dims=(192, 384, 768, 1536), mlp_ratio=2.0)


VARIANTS = {
    "nat_mini": DiNATConfig(**_MINI),
    "nat_tiny": DiNATConfig(**_TINY),
    "nat_small": DiNATConfig(**_SMALL, layer_scale=1e-5),
    "nat_base": DiNATConfig(**_BASE, layer_scale=1e-5),
    "dinat_mini": DiNATConfig(**_MINI, **_224),
    "dinat_tiny": DiNATConfig(**_TINY, **_224),
    "dinat_small": DiNATConfig(**_SMALL, **_224),  # without layer scale, unlike nat_small
    "dinat_base": DiNATConfig(**_BASE, **_224, layer_scale=1e-5),
    "dinat_large": DiNATConfig(**_LARGE, **_224),
    "dinat_s_tiny": DiNATConfig((2, 2, 6, 2), (96, 192, 384, 768), **_SWIN),
    "dinat_s_small": DiNATConfig((2, 2, 18, 2), (96, 192, 384, 768), **_SWIN),
    "dinat_s_base": DiNATConfig((2, 2, 18, 2), (128, 256, 512, 1024), **_SWIN),
    "dinat_s_large": DiNATConfig((2, 2, 18, 2), (192, 384, 768, 1536), **_SWIN),
}

default_cfgs = generate_default_cfgs(checkpoints.timm_cfgs("dinat", first_conv="stem.conv1", classifier="head.fc"))


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "nat_tiny", pretrained, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "nat_small", pretrained, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "nat_base", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_tiny", pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_small", pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_base", pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_large", pretrained, **kwargs)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_s_tiny", pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_s_small", pretrained, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_s_base", pretrained, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, VARIANTS, "dinat_s_large", pretrained, **kwargs)
