"""HiLo attention (LITv2, arXiv 2205.13213, section 3.2): high frequencies in windows, low ones from their means."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.heads import merge_heads, softmax_attention, split_heads
from hybridzoo.layers.windows import attend, from_windows, to_windows


@register_notrace_module
class HiLoAttention(nn.Module):
    """Some heads attend inside windows (Hi-Fi), the others to the means of windows (Lo-Fi).

    `(batch, height, width, dim)` in and out, any height and width: if windows do not divide the map, it is padded with
    zeros at the bottom and right, before all projections. The padding is attended to and included in the means, as in
    the published detectors and segmentors; the published classifiers never have such maps.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads, Hi-Fi and Lo-Fi together.
        window: side of a window, in tokens. With windows of one token, all heads are Lo-Fi, which is then ordinary
            attention.
        alpha: fraction of the Lo-Fi heads, rounded down.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`, `window` is not positive, or `alpha` is not in 0..1.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import HiLoAttention
        >>> HiLoAttention(96, num_heads=3)(torch.randn(1, 9, 14, 96)).shape
        torch.Size([1, 9, 14, 96])
    """

    def __init__(self, dim: int, num_heads: int, window: int = 2, alpha: float = 0.9) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        if window < 1:
            raise ValueError(f"window must be positive; got {window}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in 0..1; got {alpha}")
        self.window = (window, window)
        self.low_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = (heads * (dim // num_heads) for heads in (self.low_heads, self.high_heads))
        if high:
            self.high_qkv = nn.Linear(dim, 3 * high)
            self.high_proj = nn.Linear(high, high)
        if low:
            self.low_q = nn.Linear(dim, low)
            self.low_kv = nn.Linear(dim, 2 * low)
            self.low_proj = nn.Linear(low, low)

    def forward(self, x: Tensor) -> Tensor:
        windows = to_windows(x, self.window)
        if not self.low_heads:
            return self.high_frequencies(windows, x)
        low = self.low_frequencies(windows, x)
        return torch.cat([self.high_frequencies(windows, x), low], dim=-1) if self.high_heads else low

    def high_frequencies(self, windows: Tensor, x: Tensor) -> Tensor:
        """Hi-Fi: attention inside every window, `(batch, height, width, its channels)`."""
        query, key, value = self.high_qkv(windows).flatten(3, 4).flatten(0, 2).chunk(3, dim=-1)
        out = attend(query, key, value, self.high_heads)
        return self.high_proj(from_windows(out.view(*windows.shape[:-1], out.shape[-1]), x.shape[1], x.shape[2]))

    def low_frequencies(self, windows: Tensor, x: Tensor) -> Tensor:
        """Lo-Fi: every token attends to the means of all windows, `(batch, height, width, its channels)`."""
        query = self.low_q(x).flatten(1, 2)
        key, value = self.low_kv(windows.mean((3, 4))).flatten(1, 2).chunk(2, dim=-1)
        query, key, value = (split_heads(t, self.low_heads) for t in (query, key, value))
        out = merge_heads(softmax_attention(query, key, value))
        return self.low_proj(out).unflatten(1, x.shape[1:3])
