"""A convolution with its norm and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import Conv2dSame, create_conv2d, register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels.open_sizes import larger, parts

NormLayer = Callable[[int], nn.Module]
ActLayer = Any  # Callable[[], nn.Module]: timm's layers document a class, but accept any factory


@register_notrace_module
class SameConv2d(Conv2dSame):
    """timm's convolution that pads as TensorFlow does, with whole numbers only, so that exported files can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        around: list[int] = []
        for side, kernel, stride, step in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = larger((parts(side, stride) - 1) * stride + step * (kernel - 1) + 1 - side, 0)
            around = [total // 2, total - total // 2, *around]
        return F.conv2d(F.pad(x, around), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


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
        rest: dict[str, Any] = dict(stride=stride, groups=groups, dilation=dilation)
        rest["bias"] = norm_layer is None if bias is None else bias
        self.conv: nn.Conv2d
        if padding == "same" and stride > 1:
            self.conv = SameConv2d(in_dim, out_dim, kernel_size, **rest)
        else:
            around = dilation * (kernel_size // 2) if padding is None else padding
            self.conv = create_conv2d(in_dim, out_dim, kernel_size, padding=around, **rest)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(out_dim)
        self.act = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))
