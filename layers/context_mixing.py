"""Context-mixing dynamic convolution (OverLoCK, arXiv 2502.20087, section 3.3) as a layer on NCHW maps."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels import arguments, neighborhood_mix2d
from hybridzoo.kernels.open_sizes import is_open, larger, smaller, surely
from hybridzoo.layers.conv_norm_act import ConvNormAct
from hybridzoo.layers.resize import adaptive_pool, resize_map


@register_notrace_module
class ContextMixing(nn.Module):
    """Every token mixes the values around it with two kernels, computed from its similarity to regions of the context.

    The context is averaged in `regions * regions` cells. A token's similarities to all cells, multiplied by a matrix
    that all heads share, are the scores of a small and a large window. After a position bias and a softmax, the small
    window mixes the first half of the value's channels, and the large one the second half. The matrix is applied to the
    cells instead of the similarities. This gives a small matrix of taps for each image and head, and no tensor has the
    size of all windows.

    Maps with a side below `kernel_size` are enlarged for it and averaged back, as published.

    Args:
        dim: channels of the queries' map and of the values, a multiple of `2 * num_heads`.
        context_dim: channels of the context's map.
        num_heads: groups of channels, each with its own kernels.
        kernel_size: side of the large window, odd.
        small_kernel: side of the small window, odd, not above `kernel_size`.
        regions: cells along a side of the context.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import ContextMixing
        >>> layer = ContextMixing(64, 32, num_heads=2, kernel_size=7)
        >>> x, context, value = torch.randn(1, 64, 9, 12), torch.randn(1, 32, 9, 12), torch.randn(1, 64, 9, 12)
        >>> layer(x, context, value).shape
        torch.Size([1, 64, 9, 12])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        kernel_size: int,
        small_kernel: int = 5,
        regions: int = 7,
    ) -> None:
        super().__init__()
        if arguments.whole(num_heads) is None or arguments.whole(dim) is None or dim % (2 * num_heads):
            raise ValueError(f"dim must be a multiple of 2 * num_heads; got dim={dim!r}, num_heads={num_heads!r}")
        self.kernels = arguments.odd("small_kernel", small_kernel), arguments.odd("kernel_size", kernel_size)
        if small_kernel > kernel_size:
            raise ValueError(f"small_kernel must not exceed kernel_size; got {small_kernel}, {kernel_size}")
        self.num_heads = num_heads
        self.regions = arguments.positive("regions", regions)
        self.scale = (dim // num_heads) ** -0.5  # as published, although a head's queries are half as wide
        places = [kernel * kernel for kernel in self.kernels]
        self.query = ConvNormAct(dim, dim // 2)
        self.key = ConvNormAct(context_dim, dim // 2)
        self.taps = nn.Linear(regions * regions, sum(places), bias=False)
        self.tap_bias = nn.Parameter(torch.zeros(sum(places)))
        self.small_rpb, self.large_rpb = (
            nn.Parameter(torch.zeros(num_heads, 2 * kernel - 1, 2 * kernel - 1)) for kernel in self.kernels
        )
        self.proj = ConvNormAct(dim, dim)

    def forward(self, x: Tensor, context: Tensor, value: Tensor) -> Tensor:
        """`(B, dim, H, W)`, `(B, context_dim, H, W)` and `(B, dim, H, W)` -> `(B, dim, H, W)`."""
        size = (x.shape[2], x.shape[3])
        enlarged = at_least(size, self.kernels[1])
        same = all(surely(new == old) for new, old in zip(enlarged, size, strict=True))
        if not same:
            x, context, value = (resize_map(t, enlarged) for t in (x, context, value))
        query = self.query(x).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, -1))
        cells = adaptive_pool(context.permute(0, 2, 3, 1), (self.regions, self.regions)).permute(0, 3, 1, 2)
        taps = self.taps(self.key(cells).flatten(2)).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        values = value.permute(0, 2, 3, 1).unflatten(3, (2, self.num_heads, -1)).to(query.dtype).unbind(3)
        places = [kernel * kernel for kernel in self.kernels]
        mixed = [
            neighborhood_mix2d(
                query, taps, half, kernel, tap_bias=bias.expand(self.num_heads, -1), rpb=rpb, scale=self.scale
            )
            for kernel, taps, bias, half, rpb in zip(
                self.kernels,
                taps.to(query.dtype).split(places, 2),
                self.tap_bias.split(places),
                values,
                (self.small_rpb, self.large_rpb),
                strict=True,
            )
        ]
        out = torch.stack(mixed, 3).flatten(3)
        if not same:
            out = adaptive_pool(out, size)
        return self.proj(out.permute(0, 3, 1, 2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernels={self.kernels}, regions={self.regions}"


def at_least(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size` enlarged, about in proportion, until no side is below `side`; rounded as published, in floating point."""
    height, width = size
    if is_open(*size):
        least = smaller(height, width)
        enough = smaller(1, least // side)
        rows, columns = (enough * n + (1 - enough) * larger(side, torch.sym_int(side / least * n)) for n in size)
        return rows, columns
    if min(size) >= side:
        return size
    return (side, int(side / height * width)) if height < width else (int(side / width * height), side)
