"""The published segmentation models of EfficientViT (MIT): backbones of `efficientvit_mit` and their head.

Published weights: `https://huggingface.co/han-cai/efficientvit-seg/resolve/main/<name>.pt`, key `state_dict`, names as
in `SEGMENTORS`. `hybridzoo.checkpoints.convert(state_dict, SEGMENTORS[name].backbone)` makes them ours.

Published evaluation: Cityscapes at 1024 x 2048; ADE20K with the short side at 512 and the long side rounded up to a
multiple of 32 (cubic resizing). Logits are at stride 8, to be resized bicubically to the labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.backbones.efficientvit_mit import VARIANTS, EfficientViTMIT, EfficientViTMITConfig
from hybridzoo.layers import ConvNormAct, FusedMBConv, MBConv
from hybridzoo.layers.inference import Fusible

CLASSES = {"cityscapes": 19, "ade20k": 150}
LEVELS = (1, 2, 3)  # of the backbone: strides 8, 16, 32


@dataclasses.dataclass(frozen=True)
class SegmentorConfig:
    """A published model.

    Attributes:
        backbone: registered name.
        num_classes: of the data set.
        dim: width of the head.
        depth: residual bottlenecks in the head.
        expansion: of the bottlenecks.
        widening: of a 1x1 convolution before the classifier; 0 for none.
    """

    backbone: str
    num_classes: int
    dim: int
    depth: int = 3
    expansion: int = 4
    widening: int = 0


class EfficientViTSegHead(nn.Module):
    """Sums three maps at the finest one's size, mixes them in bottlenecks and classifies every pixel.

    Maps of any sizes: the published code upsamples by fixed factors and so needs images of multiples of 32 pixels.

    Args:
        in_dims: channels of the maps at strides 8, 16, 32.
        row: widths and depth.
        backbone: row of the backbone, whose norms, activations and kind of bottleneck the head shares.
    """

    def __init__(self, in_dims: Sequence[int], row: SegmentorConfig, backbone: EfficientViTMITConfig) -> None:
        super().__init__()
        norm, act, dim = backbone.norm_layer, backbone.act_layer, row.dim
        bottleneck: Any = FusedMBConv if backbone.large else MBConv
        # As published: coarsest first
        self.inputs = nn.ModuleList(ConvNormAct(width, dim, norm_layer=norm) for width in reversed(in_dims))
        self.middle = nn.Sequential(
            *(
                bottleneck(
                    dim,
                    dim,
                    hidden_dim=row.expansion * dim,
                    norm_layer=norm,
                    act_layer=act,
                    shortcut=nn.Identity(),
                )
                for _ in range(row.depth)
            )
        )
        widened = row.widening * dim or dim
        self.widen = ConvNormAct(dim, widened, norm_layer=norm, act_layer=act) if row.widening else nn.Identity()
        self.classifier = nn.Conv2d(widened, row.num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps at strides 8, 16, 32, finest first -> logits `(batch, num_classes, H/8, W/8)`."""
        size = maps[0].shape[-2:]
        coarse, middle, fine = (layer(x) for layer, x in zip(self.inputs, reversed(maps), strict=True))
        x = _upsample(coarse, size) + _upsample(middle, size) + fine
        return self.classifier(self.widen(self.middle(x)))


class EfficientViTSegmentor(Fusible):
    """Backbone and head: image `(batch, 3, H, W)` -> logits `(batch, num_classes, H/8, W/8)`, sizes rounded up.

    Args:
        name: a key of `SEGMENTORS`.
        **kwargs: of the backbone.

    Raises:
        ValueError: no published model has this name.

    Example:
        >>> import torch
        >>> from hybridzoo.backbones.efficientvit_mit_segmentation import EfficientViTSegmentor
        >>> EfficientViTSegmentor("efficientvit_seg_b0_cityscapes").eval()(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 19, 8, 12])
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        if name not in SEGMENTORS:
            raise ValueError(f"name must be one of {', '.join(SEGMENTORS)}; got {name!r}")
        row = SEGMENTORS[name]
        backbone = VARIANTS[row.backbone]
        self.backbone = EfficientViTMIT(backbone, num_classes=0, global_pool="", **kwargs)
        self.head = EfficientViTSegHead([backbone.dims[i] for i in LEVELS], row, backbone)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone.forward_intermediates(x, indices=list(LEVELS), intermediates_only=True))


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic, in float32 at least, as published."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(wide, tuple(size), mode="bicubic", align_corners=False).to(x.dtype)


def _rows() -> dict[str, SegmentorConfig]:
    rows = {"b0_cityscapes": dict(dim=32, depth=1, widening=4)}
    for name, dim in (("b1", 64), ("b2", 96), ("b3", 128)):
        rows[f"{name}_cityscapes"] = dict(dim=dim, widening=4)
        rows[f"{name}_ade20k"] = dict(dim=dim)
    for name, depth in (("l1", 3), ("l2", 5)):
        rows[f"{name}_cityscapes"] = dict(dim=256, depth=depth, expansion=1)
        rows[f"{name}_ade20k"] = dict(dim=128, widening=8)
    return {
        f"efficientvit_seg_{key}": SegmentorConfig(
            f"efficientvit_mit_{key.split('_')[0]}", CLASSES[key.split("_")[1]], **row
        )
        for key, row in rows.items()
    }


SEGMENTORS = _rows()
