"""Windows of a channels-last map: neighbouring tokens (Swin's windows) or tokens spread over it (MaxViT's grid).

Both are one view of the map. Along an axis of `n * w` tokens, `n` windows of `w` tokens each are

    neighbouring:  (n, w), windows outer, tokens inner
    dilated:       (w, n), tokens outer, windows inner: a window's tokens stand `n` apart

so that partition and merging permute dimensions without a copy. If a window does not divide the map, zeros are appended
at the bottom and right; `padding_mask` marks them, and merging crops them. Sizes of windows and maps are `(rows,
columns)`, in tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridzoo.kernels.open_sizes import in_order, is_open, parts, surely
from hybridzoo.layers.heads import merge_heads, softmax_attention, split_heads


def fit_window(height: int, width: int, window: tuple[int, int], dilated: bool = False) -> tuple[int, int]:
    """The smallest window that gives the same attention as `window` with masked padding.

    A window is never larger than the map. Dilated windows keep their number (hence their dilation) and lose tokens that
    would be padding in all of them: 15 tokens in windows of at most 7 give three windows of 5. In a program that leaves
    sizes open, the window is `window` for every map.
    """
    if is_open(height, width):
        return window
    return _fit(height, window[0], dilated), _fit(width, window[1], dilated)


def to_windows(x: Tensor, window: tuple[int, int], dilated: bool = False) -> Tensor:
    """Map `(batch, height, width, dim)` -> windows `(batch, rows, columns, *window, dim)`; a view unless it must pad.

    Windows are ordered row by row, and so are the tokens of a window.
    """
    _, height, width, _ = x.shape
    rows, columns = parts(height, window[0]), parts(width, window[1])
    below, right = rows * window[0] - height, columns * window[1] - width
    if not (surely(below == 0) and surely(right == 0)):
        x = F.pad(x, (0, 0, 0, right, 0, below))
    if dilated:
        return in_order(x.unflatten(2, (window[1], columns)).unflatten(1, (window[0], rows)).permute(0, 2, 4, 1, 3, 5))
    return in_order(x.unflatten(2, (columns, window[1])).unflatten(1, (rows, window[0])).permute(0, 1, 3, 2, 4, 5))


def from_windows(windows: Tensor, height: int, width: int, dilated: bool = False) -> Tensor:
    """Inverse of `to_windows`: `(batch, rows, columns, *window, dim)` -> `(batch, height, width, dim)`, cropped.

    Copies only if the windows do not have the map's memory order.
    """
    x = windows.permute(0, 3, 1, 4, 2, 5) if dilated else windows.permute(0, 1, 3, 2, 4, 5)
    x = in_order(x).flatten(3, 4).flatten(1, 2)
    if is_open(height, width):
        torch._check(height <= x.shape[1])
        torch._check(width <= x.shape[2])
    return in_order(x[:, :height, :width])


def padding_mask(
    height: int, width: int, window: tuple[int, int], dilated: bool = False, device: torch.device | None = None
) -> Tensor | None:
    """Which tokens of which window are real: bool `(windows, tokens)`, or `None` if all are."""
    if surely(height % window[0] == 0) and surely(width % window[1] == 0):
        return None
    rows, columns = (
        line_windows(torch.arange(parts(n, w) * w, device=device) < n, w, dilated)
        for n, w in zip((height, width), window, strict=True)
    )
    return (rows[:, None, :, None] & columns[:, None]).flatten(2).flatten(0, 1)


def line_windows(line: Tensor, window: int, dilated: bool = False) -> Tensor:
    """What is known of the tokens along an axis, a multiple of the window's side -> `(windows, side of the window)`."""
    count = line.shape[0] // window
    return line.unflatten(0, (window, count)).t() if dilated else line.unflatten(0, (count, window))


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention inside every window, scaled by the head's width to the power of -1/2.

    Args:
        query, key, value: `(batch * windows, tokens, dim)`, windows inner.
        num_heads: attention heads.
        bias: added to the scaled scores, `(heads, tokens, tokens)`, query by key.
        mask: which keys may be seen, bool: `(windows, tokens)` as `padding_mask` makes it, or
            `(windows, tokens, tokens)`, query by key. Every query needs a key.

    Returns:
        `(batch * windows, tokens, dim)`.
    """
    scores = None if bias is None else bias.to(query.dtype)[None]
    if mask is not None:
        allowed = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        fill = torch.zeros((), dtype=query.dtype, device=query.device) if scores is None else scores
        masked = torch.where(allowed, fill, float("-inf"))
        tokens = query.shape[1]
        masked = masked.expand(-1, -1, tokens, tokens)
        scores = masked.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    query, key, value = (split_heads(t, num_heads) for t in (query, key, value))
    return merge_heads(softmax_attention(query, key, value, scores))


def _fit(side: int, window: int, dilated: bool) -> int:
    return parts(side, parts(side, window)) if dilated else min(side, window)
