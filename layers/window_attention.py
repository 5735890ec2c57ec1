"""Multi-head attention inside windows with a relative position bias, the layer of Swin and MaxViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.relative_position import RelativePositionBias, Resize
from hybridzoo.layers.windows import attend, fit_window, from_windows, to_windows


class WindowAttention(nn.Module):
    """Every token attends to the tokens of its window. `(batch, rows, columns, *window, dim)` in and out.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads.
        window: the largest window, `(rows, columns)` in tokens; the bias table has its size.
        table_resize: how a loaded table of another size is resized, see `RelativePositionBias`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], table_resize: Resize = "bilinear") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = RelativePositionBias(num_heads, window, table_resize)
        self.proj = nn.Linear(dim, dim)

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool `(windows, tokens)` or `(windows, tokens, tokens)`, which keys may be seen; `None` for all."""
        query, key, value = self.qkv(windows).flatten(3, 4).flatten(0, 2).chunk(3, dim=-1)
        out = attend(query, key, value, self.num_heads, self.bias(windows.shape[3:5]), mask)
        return self.proj(out).view(windows.shape)


@register_notrace_module
class ShiftedWindowAttention(WindowAttention):
    """Softmax attention in windows of a `(B, H, W, dim)` map, which is first rolled by `shift` tokens up and left.

    In windows with two edges of the map, each part attends to itself only. If windows do not divide the map, it is
    padded with zeros at the bottom and right; these are projected and attended to (Swin's published rule). A window is
    never larger than the map, and is not shifted along an axis that it covers.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads.
        window: side of the windows in tokens.
        shift: less than `window`; 0 for no shift.
    """

    def __init__(self, dim: int, num_heads: int, window: int, shift: int = 0) -> None:
        super().__init__(dim, num_heads, (window, window), table_resize="bicubic")  # as published for 384 px
        self.window = window
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # a map, not windows
        _, height, width, _ = x.shape
        window = fit_window(height, width, (self.window, self.window))
        shift = [self.shift if n > self.window else 0 for n in (height, width)]
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        padded = (x.shape[1], x.shape[2])
        if not any(shift):
            return from_windows(super().forward(to_windows(x, window)), height, width)
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        mask = _seam_mask(padded, window, shift, x.device)
        x = from_windows(super().forward(to_windows(x, window), mask), *padded)
        return torch.roll(x, (shift[0], shift[1]), (1, 2))[:, :height, :width]


def _seam_mask(size: tuple[int, int], window: tuple[int, int], shift: list[int], device: torch.device) -> Tensor:
    """Which tokens of a window were neighbours before the roll: bool `(windows, tokens, tokens)`."""
    # True for tokens from the other edge; only the last windows have both.
    wrapped = [torch.arange(n, device=device) >= n - s for n, s in zip(size, shift, strict=True)]
    region = (2 * wrapped[0][:, None] + 1 * wrapped[1])[None, :, :, None]
    label = to_windows(region, window).flatten(1, 2).flatten(2)[0]
    return label[:, :, None] == label[:, None]
