"""LITv2: convolutional MLPs at high resolution, HiLo attention at low, deformable token merging between.

Paper: "Fast Vision Transformers with HiLo Attention", Pan et al., NeurIPS 2022, arXiv 2205.13213. Published code and
weights: ziplab/LITv2 (Apache 2.0). Written from the paper and from measurements of that code.

image (B, 3, H, W) -> maps (B, dims[i], H/s, W/s), s = 4 rounded up, then halved rounding down -> logits
(B, num_classes); NHWC inside. There is no position embedding: the zero padding of the MLPs' convolutions gives
positions.

Other sizes than 224 use the rule of the published detectors and segmentors: the image is padded with zeros at the
bottom and right to a multiple of 4 pixels, and so is the map if HiLo's windows do not divide it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.backbones.base import Backbone, build, check_per_stage
from hybridzoo.kernels.open_sizes import parts, surely
from hybridzoo.layers import DeformableMerging, DepthwiseMlp, HiLoAttention, Residual, Stage
from hybridzoo.layers.init import init_linear
from hybridzoo.layers.memory import channels_last

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 32
MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class LITv2Config:
    """A row of the paper's Table 10."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    windows: tuple[int, ...] = (0, 0, 2, 1)  # of HiLo by stage: 0 for no attention, 1 for ordinary attention
    alpha: float = 0.9  # share of the heads that are Lo-Fi


class Block(nn.Sequential):
    """Attention, where the stage has any, and an MLP with a depthwise convolution; pre-norm residuals."""

    def __init__(self, dim: int, attn: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        if attn is not None:
            self.attn = _residual(dim, attn, drop_path)
        self.mlp = _residual(dim, DepthwiseMlp(dim, MLP_RATIO * dim), drop_path)


def _residual(dim: int, update: nn.Module, drop_path: float) -> Residual:
    return Residual(nn.Sequential(OrderedDict(norm=nn.LayerNorm(dim), update=update)), drop_path)


@register_notrace_module
class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, ceil(H/4), ceil(W/4), dim): patches of 4 x 4 pixels."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, STRIDES[0], stride=STRIDES[0])
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = (parts(side, STRIDES[0]) * STRIDES[0] - side for side in x.shape[2:])
        if not (surely(below == 0) and surely(right == 0)):
            x = F.pad(x, (0, right, 0, below))
        return self.norm(self.proj(channels_last(x)).permute(0, 2, 3, 1).contiguous())


class LITv2(Backbone):
    """LITv2 for images of any size from 32 x 32 pixels.

    Args:
        cfg: the variant; its fields are also arguments of `timm.create_model`. `windows=(0, 0, 4, 1)` makes the
            published detectors' faster form of the same weights.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: `"avg"`, `"max"`, … or `""` for none.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0. The published runs used 0.2
            (small), 0.3 (medium), 0.5 (base).

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    layout = "NHWC"

    def __init__(
        self,
        cfg: LITv2Config,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_per_stage(len(STRIDES), dims=cfg.dims, depths=cfg.depths, windows=cfg.windows)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = cfg.dims[-1]
        self.set_feature_info(cfg.dims, STRIDES)
        rates: Iterator[Any] = iter(calculate_drop_path_rates(drop_path_rate, sum(cfg.depths)))
        self.stem = Stem(in_chans, cfg.dims[0])
        stages = []
        for i, (dim, depth, window) in enumerate(zip(cfg.dims, cfg.depths, cfg.windows, strict=True)):
            blocks = []
            for _ in range(depth):
                attn = HiLoAttention(dim, dim // HEAD_DIM, window, cfg.alpha) if window else None
                blocks.append(Block(dim, attn, next(rates)))
            stages.append(Stage(blocks, DeformableMerging(cfg.dims[i - 1], dim) if i else None))
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(self.num_features, eps=1e-5)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.apply(_init)


def _init(module: nn.Module) -> None:
    init_linear(module)
    if isinstance(module, DepthwiseMlp):
        nn.init.normal_(module.conv.weight, std=(2 / 9) ** 0.5)
        nn.init.zeros_(module.conv.bias)  # type: ignore[arg-type]  # has one


VARIANTS = {
    "litv2_small": LITv2Config((96, 192, 384, 768), (2, 2, 6, 2)),
    "litv2_medium": LITv2Config((96, 192, 384, 768), (2, 2, 18, 2)),
    "litv2_base": LITv2Config((128, 256, 512, 1024), (2, 2, 18, 2)),
}

default_cfgs = generate_default_cfgs(
    checkpoints.timm_cfgs("litv2", first_conv="stem.proj", classifier="head.fc", reduction=STRIDES[-1])
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    return build(LITv2, VARIANTS, name, pretrained, **kwargs)


@register_model
def litv2_small(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_small", pretrained, **kwargs)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_medium", pretrained, **kwargs)


@register_model
def litv2_base(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return _create("litv2_base", pretrained, **kwargs)
