"""A convolution with its norm and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from timm.layers import create_conv2d
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]
ActLayer = Any  # Callable[[], nn.Module]: timm's layers document a class, but accept any factory


class ConvNormAct(nn.Module):
    """`conv`, then `norm`, then `act`; a map `(B, in_dim, H, W)` becomes `(B, out_dim, ceil(H / stride), …)`.

    timm's layer of the same name keeps the activation inside the norm, so it cannot have one without the other, which
    EfficientViT's and PATNet's published weights need.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output.
        kernel_size: side of the convolution's window.
        stride: step of the convolution.
        groups: channel groups; `in_dim` for a depthwise convolution.
        dilation: step between the window's pixels.
        padding: zeros on every side, `dilation * (kernel_size // 2)` by default; or `"same"`: as TensorFlow pads, the
            odd zero on the bottom and right.
        norm_layer: makes the norm from its number of channels; `None` for no norm.
        act_layer: makes the activation; `None` for none.
        bias: of the convolution; by default only without a norm.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        dilation: int = 1,
        padding: int | Literal["same"] | None = None,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        act_layer: ActLayer | None = None,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d = create_conv2d(
            in_dim,
            out_dim,
            kernel_size,
            stride=stride,
            groups=groups,
            dilation=dilation,
            padding=dilation * (kernel_size // 2) if padding is None else padding,
            bias=norm_layer is None if bias is None else bias,
        )
        self.norm = nn.Identity() if norm_layer is None else norm_layer(out_dim)
        self.act = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))
