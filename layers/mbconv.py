"""Inverted bottlenecks: MBConv (MobileNetV2, arXiv 1801.04381) and fused MBConv (EfficientNetV2, arXiv 2104.00298).

timm has both (`InvertedResidual`, `EdgeResidual`), but always with a norm after each convolution, a width derived from
the input's, and an identity shortcut; the published weights of EfficientViT and MaxViT need other choices.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from hybridzoo.layers.conv_norm_act import ActLayer, ConvNormAct, NormLayer

Padding = Literal["symmetric", "same"]


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection; plus the shortcut.

    `(B, in_dim, H, W)` -> `(B, out_dim, ceil(H / stride), ceil(W / stride))`. No activation follows the projection or
    the sum.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output.
        stride: of the depthwise convolution.
        hidden_dim: channels between expansion and projection. Families derive it from `in_dim` or from `out_dim`.
        kernel_size: of the depthwise convolution.
        without_norm: names of the convolutions that have a bias and no norm after them.
        pre_norm: normalise the block's input too (not the shortcut's).
        se_dim: hidden channels of squeeze-and-excitation; 0 for none.
        act_layer: after the first two convolutions.
        se_act_layer: inside squeeze-and-excitation.
        norm_layer: makes a norm from its number of channels.
        padding: `"same"` pads strided convolutions as TensorFlow does.
        shortcut: what is added to the branch: a module (`nn.Identity()`, `PoolShortcut(...)`) or `None` for nothing.
        drop_path: rate of stochastic depth of the branch.

    Raises:
        ValueError: an identity shortcut where the shape changes, or drop path without a shortcut.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        *,
        hidden_dim: int,
        kernel_size: int = 3,
        without_norm: Container[Literal["expand", "depthwise", "project"]] = (),
        pre_norm: bool = False,
        se_dim: int = 0,
        act_layer: ActLayer = nn.GELU,
        se_act_layer: ActLayer = nn.SiLU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        padding: Padding = "symmetric",
        shortcut: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check(in_dim, out_dim, stride, shortcut, drop_path)
        norm = {name: None if name in without_norm else norm_layer for name in ("expand", "depthwise", "project")}
        self.pre_norm = norm_layer(in_dim) if pre_norm else nn.Identity()
        self.expand = ConvNormAct(in_dim, hidden_dim, norm_layer=norm["expand"], act_layer=act_layer)
        self.depthwise = ConvNormAct(
            hidden_dim,
            hidden_dim,
            kernel_size,
            stride,
            groups=hidden_dim,
            padding="same" if padding == "same" else None,
            norm_layer=norm["depthwise"],
            act_layer=act_layer,
        )
        self.se = _squeeze_excite(hidden_dim, se_dim, se_act_layer)
        self.project = ConvNormAct(hidden_dim, out_dim, norm_layer=norm["project"])
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(self.se(self.depthwise(self.expand(self.pre_norm(x)))))
        return branch if self.shortcut is None else self.shortcut(x) + self.drop_path(branch)


class FusedMBConv(nn.Module):
    """Full convolution to the hidden width, squeeze-and-excitation, 1x1 projection; plus the shortcut.

    As `MBConv`, with expansion and depthwise convolution in one.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        *,
        hidden_dim: int,
        kernel_size: int = 3,
        se_dim: int = 0,
        act_layer: ActLayer = nn.GELU,
        se_act_layer: ActLayer = nn.SiLU,
        norm_layer: NormLayer = nn.BatchNorm2d,
        padding: Padding = "symmetric",
        shortcut: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check(in_dim, out_dim, stride, shortcut, drop_path)
        self.expand = ConvNormAct(
            in_dim,
            hidden_dim,
            kernel_size,
            stride,
            padding="same" if padding == "same" else None,
            norm_layer=norm_layer,
            act_layer=act_layer,
        )
        self.se = _squeeze_excite(hidden_dim, se_dim, se_act_layer)
        self.project = ConvNormAct(hidden_dim, out_dim, norm_layer=norm_layer)
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(self.se(self.expand(x)))
        return branch if self.shortcut is None else self.shortcut(x) + self.drop_path(branch)


class PoolShortcut(nn.Module):
    """Shortcut of a strided or widening block: 2x2 average at stride 2, 1x1 convolution where the width changes.

    `(B, in_dim, H, W)` -> `(B, out_dim, ceil(H / stride), ceil(W / stride))`; at an odd edge the mean of what is there.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output.
        stride: 1 or 2.
        norm_layer: after the convolution, which then has no bias; `None` for a convolution with bias and no norm.
        project: have the 1x1 convolution even where the width stays.

    Raises:
        ValueError: another stride.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        *,
        norm_layer: NormLayer | None = None,
        project: bool = False,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2; got {stride}")
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        widen = project or in_dim != out_dim
        self.project = ConvNormAct(in_dim, out_dim, norm_layer=norm_layer) if widen else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.pool(x))


def _squeeze_excite(dim: int, se_dim: int, act_layer: Any) -> nn.Module:  # timm asks for a class, takes any factory
    if not se_dim:
        return nn.Identity()
    squeeze_excite = SqueezeExcite(dim, rd_channels=se_dim, act_layer=act_layer)
    squeeze_excite.act.inplace = False  # timm's default, which neither hooks nor their gradients allow
    return squeeze_excite


def _check(in_dim: int, out_dim: int, stride: int, shortcut: nn.Module | None, drop_path: float) -> None:
    if isinstance(shortcut, nn.Identity) and (stride != 1 or in_dim != out_dim):
        raise ValueError(
            f"shortcut: the identity needs stride 1 and equal widths; got stride {stride}, {in_dim} -> {out_dim} "
            "channels (use PoolShortcut or None)"
        )
    if shortcut is None and drop_path:
        raise ValueError(f"drop_path must be 0 in a block without a shortcut; got {drop_path}")
