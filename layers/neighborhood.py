"""Neighborhood attention (NAT, arXiv 2204.07143; dilated: DiNAT, arXiv 2209.15001) as a layer on channels-last maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels import arguments, na2d_packed
from hybridzoo.kernels.open_sizes import larger, smaller, surely
from hybridzoo.layers.init import trunc_normal_
from hybridzoo.layers.relative_position import resize_table

Padding = Literal["bias", "mask"]
PADDINGS = ("bias", "mask")
Dilation = int | tuple[int, int] | Literal["auto"]


@register_notrace_module
class NeighborhoodAttention2d(nn.Module):
    """Every token attends to a window of `kernel_size` tokens around it, `dilation` tokens apart.

    `(batch, height, width, dim)` in and out, any height and width. `hybridzoo.kernels.na2d` documents which keys a
    query sees, also at borders.

    A map with fewer than `kernel_size * dilation` tokens along an axis is too small for a whole window. Along that axis
    it is padded to that length, at the bottom or right, with tokens that are

    * `"bias"`: images of a zero input, so that q, k and v equal the projection's bias. They are attended to. All
      published NAT and DiNAT weights were trained with this rule.
    * `"mask"`: absent. The window is as large as the map allows; the natural choice when training from scratch.

    A state dict whose bias table belongs to another kernel is resized while it is loaded, see `resize_rpb`.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads; the published models use `dim // 32`.
        kernel_size: window in tokens, `(rows, columns)` or one number for both; odd.
        dilation: step between the window's tokens, `(rows, columns)` or one number for both; 1 is none. `"auto"`: the
            largest one, equal on both axes, whose window fits into the map, see `fitting_dilation`.
        rel_pos_bias: learn a bias for every head and offset, the parameter `rpb`.
        padding: the padding of small maps, see above.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import NeighborhoodAttention2d
        >>> layer = NeighborhoodAttention2d(64, num_heads=2, kernel_size=7, dilation=2)
        >>> layer(torch.randn(1, 30, 41, 64)).shape
        torch.Size([1, 30, 41, 64])
        >>> layer.rpb.shape
        torch.Size([2, 13, 13])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: Dilation = 1,
        *,
        rel_pos_bias: bool = True,
        padding: Padding = "bias",
    ) -> None:
        super().__init__()
        arguments.channels(dim, num_heads)
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}")
        self.num_heads = num_heads
        self.kernel_size = arguments.window("kernel_size", kernel_size)
        self.dilation = (
            None if dilation == "auto" else arguments.pair("dilation", dilation)
        )  # None: chosen by the map's size
        self.padding = padding
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb: nn.Parameter | None = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        dilation = self.dilation or (fitting_dilation(height, width, self.kernel_size),) * 2
        heads = (3, self.num_heads, dim // self.num_heads)
        pad_token = None
        whole = [surely(n >= k * d) for n, k, d in zip((height, width), self.kernel_size, dilation, strict=True)]
        if not all(whole) and self.padding == "bias":  # the paper's: zeros before the projection
            pad_token = self.qkv(x.new_zeros(1, dim)).view(heads)[1:]
        qkv = self.qkv(x).unflatten(-1, heads)
        return self.proj(na2d_packed(qkv, self.kernel_size, dilation, rpb=self.rpb, fill=pad_token).flatten(3))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation or 'auto'},"
            f" padding={self.padding!r}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rpb = state_dict.get(f"{prefix}rpb")
        if rpb is not None and self.rpb is not None and rpb.ndim == 3 and rpb.shape[1:] != self.rpb.shape[1:]:
            state_dict[f"{prefix}rpb"] = resize_rpb(rpb, self.kernel_size)
        super()._load_from_state_dict(state_dict, prefix, *args)


def resize_rpb(rpb: Tensor, kernel_size: int | tuple[int, int]) -> Tensor:
    """The bias table of one kernel for another, by bicubic interpolation, as the authors went from 7 to 11 (13 to 21).

    Args:
        rpb: `(heads, 2 * rows - 1, 2 * columns - 1)`.
        kernel_size: the new window, `(rows, columns)` or one number for both.

    Raises:
        ValueError: a kernel that is not a positive integer.
    """
    return resize_table(rpb, arguments.pair("kernel_size", kernel_size), "bicubic")


def fitting_dilation(height: int, width: int, kernel_size: int | tuple[int, int]) -> int:
    """The largest dilation whose window fits into a map of `height` x `width` tokens, at least 1.

    With a 7 x 7 kernel: 8 on the 56 x 56 map of a 224-pixel image at stride 4, and 28 at 800 pixels, which are the
    published models' largest ones.
    """
    rows, columns = arguments.pair("kernel_size", kernel_size)
    return larger(1, smaller(height // rows, width // columns))
