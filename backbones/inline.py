"""InLine attention on four hosts: DeiT, PVT, Swin and CSwin.

Paper: "Bridging the Divide: Reconsidering Softmax and Linear Attention", Han et al., NeurIPS 2024, arXiv 2412.06590.
Published code and weights: LeapLabTHU/InLine, which states no licence. Written from the paper and from measurements of
that code. The hosts are in `hosts/`, the attention is `hybridzoo.layers.InLineAttention`.

Stochastic depth of the published runs: DeiT 0.1; PVT 0.1, 0.1, 0.3, 0.3; Swin 0.2, 0.3, 0.5; CSwin 0.2, 0.4, 0.5 (0.7
at 384), from the smallest to the largest.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from hybridzoo.backbones import hosts
from hybridzoo.backbones.base import build
from hybridzoo.backbones.hosts import ALL, CSwinConfig, DeiTConfig, PVTConfig, SwinConfig
from hybridzoo.layers import InLineAttention, TransformerBlock


class InLineDeiT(hosts.DeiT):
    """InLine-DeiT; arguments: see `hosts.DeiT`."""

    def __init__(self, cfg: DeiTConfig, **kwargs: Any) -> None:
        super().__init__(cfg, lambda stage, dim, heads, side: InLineAttention(dim, heads, class_token=True), **kwargs)


class InLinePVT(hosts.PVT):
    """InLine-PVT; arguments: see `hosts.PVT`."""

    def __init__(self, cfg: PVTConfig, **kwargs: Any) -> None:
        super().__init__(cfg, lambda stage, dim, heads, side: InLineAttention(dim, heads), **kwargs)


class InLineSwin(hosts.Swin):
    """InLine-Swin; arguments: see `hosts.Swin`."""

    def __init__(self, cfg: SwinConfig, **kwargs: Any) -> None:
        super().__init__(cfg, lambda stage, dim, heads, side: InLineAttention(dim, heads), **kwargs)


class RawSummaryBlock(TransformerBlock):
    """InLine-CSwin's block: local kernels are generated from the map before the norm, unlike on the other hosts."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # nothing else for the attention
        return super().forward(x, summary=x.mean((1, 2)))


class InLineCSwin(hosts.CSwin):
    """InLine-CSwin; arguments: see `hosts.CSwin`."""

    linear_block = RawSummaryBlock

    def __init__(self, cfg: CSwinConfig, **kwargs: Any) -> None:
        def attention(stage: int, dim: int, num_heads: int, side: int) -> nn.Module:
            return InLineAttention(dim, num_heads, static_kernel=True)

        super().__init__(cfg, attention, **kwargs)


VARIANTS = {
    "inline_deit_tiny": DeiTConfig(192, 6),
    "inline_deit_small": DeiTConfig(320, 10, img_size=288),
    "inline_deit_base": DeiTConfig(384, 12, img_size=448),
    "inline_pvt_tiny": PVTConfig((2, 2, 2, 2), (2, 4, 10, 16)),
    "inline_pvt_small": PVTConfig((3, 4, 6, 3), (2, 4, 10, 16)),
    "inline_pvt_medium": PVTConfig((3, 4, 18, 3), (2, 4, 10, 16)),
    "inline_pvt_large": PVTConfig((3, 8, 27, 3), (2, 4, 10, 16)),
    "inline_swin_tiny": SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "inline_swin_small": SwinConfig(96, (2, 2, 18, 2), (3, 6, 12, 24), linear=(ALL, ALL, 0, 0)),
    "inline_swin_base": SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), linear=(ALL, ALL, 2, 0)),
    "inline_cswin_tiny": CSwinConfig(64, (2, 4, 18, 1), (2, 4, 8, 16)),
    "inline_cswin_small": CSwinConfig(64, (3, 6, 29, 2), (2, 4, 8, 16)),
    "inline_cswin_base": CSwinConfig(96, (3, 6, 29, 2), (4, 8, 16, 32)),
}

default_cfgs = hosts.default_cfgs("inline")


@register_model
def inline_deit_tiny(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    return build(InLineDeiT, VARIANTS, "inline_deit_tiny", pretrained, **kwargs)


@register_model
def inline_deit_small(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """320 wide and made for 288 px: not the size of DeiT-S."""
    return build(InLineDeiT, VARIANTS, "inline_deit_small", pretrained, **kwargs)


@register_model
def inline_deit_base(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    """384 wide and made for 448 px: not the size of DeiT-B."""
    return build(InLineDeiT, VARIANTS, "inline_deit_base", pretrained, **kwargs)


@register_model
def inline_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return build(InLinePVT, VARIANTS, "inline_pvt_tiny", pretrained, **kwargs)


@register_model
def inline_pvt_small(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return build(InLinePVT, VARIANTS, "inline_pvt_small", pretrained, **kwargs)


@register_model
def inline_pvt_medium(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return build(InLinePVT, VARIANTS, "inline_pvt_medium", pretrained, **kwargs)


@register_model
def inline_pvt_large(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    """Published as "inline_pvt_b"."""
    return build(InLinePVT, VARIANTS, "inline_pvt_large", pretrained, **kwargs)


@register_model
def inline_swin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return build(InLineSwin, VARIANTS, "inline_swin_tiny", pretrained, **kwargs)


@register_model
def inline_swin_small(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return build(InLineSwin, VARIANTS, "inline_swin_small", pretrained, **kwargs)


@register_model
def inline_swin_base(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return build(InLineSwin, VARIANTS, "inline_swin_base", pretrained, **kwargs)


@register_model
def inline_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return build(InLineCSwin, VARIANTS, "inline_cswin_tiny", pretrained, **kwargs)


@register_model
def inline_cswin_small(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return build(InLineCSwin, VARIANTS, "inline_cswin_small", pretrained, **kwargs)


@register_model
def inline_cswin_base(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return build(InLineCSwin, VARIANTS, "inline_cswin_base", pretrained, **kwargs)
