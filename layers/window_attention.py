"""Multi-head attention inside windows with a relative position bias, the layer of Swin and MaxViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels.open_sizes import is_open, parts, smaller, surely
from hybridzoo.layers.relative_position import RelativePositionBias, Resize
from hybridzoo.layers.windows import attend, fit_window, from_windows, line_windows, to_windows


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
        padded = [parts(n, w) * w for n, w in zip((height, width), window, strict=True)]
        # In sizes alone, without `if`: the shift, where there are several windows; and how far tokens are attended to,
        # the map where it is smaller than the window.
        shift = [self.shift * smaller(1, (n - 1) // self.window) for n in (height, width)]
        seen = [n + (p - n) * smaller(1, n // self.window) for n, p in zip((height, width), padded, strict=True)]
        x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        seams = [end - s for end, s in zip(seen, shift, strict=True)]
        if all(surely(seam == p) for seam, p in zip(seams, padded, strict=True)):
            return from_windows(super().forward(to_windows(x, window)), height, width)
        x = _roll(x, -shift[0], -shift[1])
        mask = _seam_mask(padded, window, seams, x.device)
        x = from_windows(super().forward(to_windows(x, window), mask), *padded)
        return _roll(x, shift[0], shift[1])[:, :height, :width]


def _roll(x: Tensor, down: int, right: int) -> Tensor:
    """A map `(batch, height, width, dim)`, moved; what leaves it at one edge enters at the other."""
    if not is_open(down, right):
        return torch.roll(x, (down, right), (1, 2))
    for axis, shift in ((1, down), (2, right)):  # ONNX rolls by constants only
        token = torch.arange(x.shape[axis], device=x.device) - shift
        token = torch.where(token < 0, token + x.shape[axis], token)
        x = x.index_select(axis, torch.where(token < x.shape[axis], token, token - x.shape[axis]))
    return x


def _seam_mask(size: list[int], window: tuple[int, int], seams: list[int], device: torch.device) -> Tensor:
    """Which tokens of a window lie on the same side of both seams: bool `(windows, tokens, tokens)`."""
    # True for tokens from the other edge; only the last windows have both.
    rows, columns = (
        line_windows(torch.arange(n, device=device) >= seam, w) for n, seam, w in zip(size, seams, window, strict=True)
    )
    label = (2 * rows[:, None, :, None] + 1 * columns[:, None]).flatten(2).flatten(0, 1)
    return label[:, :, None] == label[:, None]
