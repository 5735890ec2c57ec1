"""Dynamic depthwise convolution in plain PyTorch, in the form that is fastest on the device.

PyTorch convolves all images with the same kernels. So here every channel of every image becomes a group of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE_BY_SIDE_BELOW = 2**17  # elements of an image's map; measured with `hybridzoo bench ops depthwise`


def forward(x: Tensor, kernels: Tensor, bias: Tensor | None, by_compiler: bool) -> Tensor:
    """See `api`; all tensors of one dtype. `by_compiler`: use operators that compilers fuse and exporters support."""
    if by_compiler or not len(x):
        return by_taps(x, kernels, bias)
    if x.device.type != "cpu":
        return by_groups(x, kernels, bias)
    return (side_by_side if x[0].numel() < SIDE_BY_SIDE_BELOW else by_images)(x, kernels, bias)


def by_taps(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """Nine shifted products, which a compiler fuses into one pass. No number of groups depends on the batch."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(x) if bias is None else bias[:, None, None].expand_as(x)
    for tap in range(9):
        row, column = divmod(tap, 3)
        out = out + padded[:, row : row + height, column : column + width] * kernels[:, None, None, :, tap]
    return out


def by_images(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """One image at a time, channels-last as in memory: nothing is copied on a CPU."""
    weights = kernels.unflatten(-1, (3, 3))[:, :, None]
    maps = x.permute(0, 3, 1, 2).split(1)
    biases = [None] * len(x) if bias is None else bias
    images = [F.conv2d(m, w, b, padding=1, groups=x.shape[3]) for m, w, b in zip(maps, weights, biases, strict=True)]
    return torch.cat(images).permute(0, 2, 3, 1)


def side_by_side(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """All channels of all images as one channels-last image. This needs two copies, which are cheap for small maps."""
    batch, height, width, channels = x.shape
    maps = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)
    out = _grouped(maps, kernels, bias)
    return out.permute(0, 2, 3, 1).reshape(height, width, batch, channels).permute(2, 0, 1, 3)


def by_groups(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """One convolution of all channels of all images: the fewest launches on a GPU, at the cost of two copies."""
    batch, height, width, channels = x.shape
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * channels, height, width)
    return _grouped(maps, kernels, bias).view(batch, channels, height, width).permute(0, 2, 3, 1)


def _grouped(maps: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """`(1, batch * channels, height, width)`; every channel is a group."""
    weights, biases = kernels.reshape(-1, 1, 3, 3), None if bias is None else bias.flatten()
    return F.conv2d(maps, weights, biases, padding=1, groups=maps.shape[1])
