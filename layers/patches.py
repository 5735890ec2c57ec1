"""Patch embedding and downsampling: convolutions between NHWC maps, followed by a norm."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels.open_sizes import parts, surely
from hybridzoo.layers.memory import channels_last


@register_notrace_module
class PatchStem(nn.Module):
    """Image (B, in_chans, H, W) -> (B, H/patch, W/patch, dim), rounded up: a convolution of its own stride, norm."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.conv1 = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = (parts(side, self.patch) * self.patch - side for side in x.shape[2:])
        if not (surely(below == 0) and surely(right == 0)):
            x = F.pad(x, (0, right, 0, below))
        x = self.conv1(channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1))


@register_notrace_module
class ConvDownsample(nn.Module):
    """(B, H, W, dim) -> (B, H/2, W/2, out_dim), rounded up: a convolution of stride 2 without bias, then norm.

    `kernel_size` is 3, around every second token, or 2: patches, zeros completing those at the bottom and right.
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.patches = kernel_size == 2
        padding = 0 if self.patches else kernel_size // 2
        self.reduction = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=padding, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = (parts(side, 2) * 2 - side for side in x.shape[1:3])
        if self.patches and not (surely(below == 0) and surely(right == 0)):
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
