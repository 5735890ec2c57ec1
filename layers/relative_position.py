"""Relative position bias: for each head, a learned number for every offset between two tokens of a window."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from hybridzoo.kernels.open_sizes import is_open, surely
from hybridzoo.layers.init import trunc_normal_

Resize = Literal["bilinear", "bicubic", "geometric"]
RESIZES = ("bilinear", "bicubic", "geometric")


class RelativePositionBias(nn.Module):
    """Bias of window attention from a table over offsets.

    The entry for a query at `(i, j)` and a key at `(x, y)` is `table[head, x - i + rows - 1, y - j + columns - 1]`:
    key minus query, heads first, as TensorFlow's MaxViT publishes it. (Swin publishes query minus key, heads last,
    offsets flattened: `convert_swin_table`.)

    A state dict whose table belongs to another window is resized while it is loaded.

    Args:
        num_heads: attention heads.
        window: largest window, `(rows, columns)` in tokens.
        resize: how tables of another size are resized, see `resize_table`.

    Raises:
        ValueError: unknown `resize`.

    Example:
        >>> from hybridzoo.layers import RelativePositionBias
        >>> RelativePositionBias(2, (7, 7))((5, 7)).shape
        torch.Size([2, 35, 35])
    """

    def __init__(self, num_heads: int, window: tuple[int, int], resize: Resize = "bilinear") -> None:
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}; got {resize!r}")
        self.window = window
        self.resize: Resize = resize
        self.table = nn.Parameter(torch.empty(num_heads, 2 * window[0] - 1, 2 * window[1] - 1))
        trunc_normal_(self.table, std=0.02)

    def forward(self, window: tuple[int, int] | None = None) -> Tensor:
        """Bias `(heads, tokens, tokens)`, query by key, of a window not larger than the table's (the default)."""
        return gather_bias(self.table, window or self.window)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}table")
        if loaded is not None and loaded.ndim == 3 and loaded.shape[1:] != self.table.shape[1:]:
            state_dict[f"{prefix}table"] = resize_table(loaded, self.window, self.resize)
        super()._load_from_state_dict(state_dict, prefix, *args)


def gather_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Table `(heads, 2 * rows - 1, 2 * columns - 1)` -> bias `(heads, tokens, tokens)`, query by key.

    A smaller window uses the middle of the table, because offsets mean the same in all windows.

    Raises:
        ValueError: `window` is larger than the table's.
    """
    for axis, side in zip((1, 2), window, strict=True):
        spare = table.shape[axis] - (2 * side - 1)
        if surely(spare < 0):
            raise ValueError(
                f"window {window} is larger than the table's, {tuple((s + 1) // 2 for s in table.shape[1:])}"
            )
        if is_open(side):  # for a program with open sizes: `unfold` would fix this size
            offset = torch.arange(side, device=table.device)
            key_minus_query = offset - offset[:, None] + (side - 1 + spare // 2)
            table = table.index_select(axis, key_minus_query.flatten()).unflatten(axis, (side, side))
            table = table.movedim(axis + 1, -1)
            continue
        table = table.narrow(axis, spare // 2, 2 * side - 1)
        # Sliding a window of `side` offsets over the table: the first position belongs to the last query.
        table = table.unfold(axis, side, 1).flip(axis)
    return table.flatten(3, 4).flatten(1, 2)


def resize_table(table: Tensor, window: tuple[int, int], mode: Resize = "bilinear") -> Tensor:
    """A table `(heads, 2 * rows - 1, 2 * columns - 1)` for another window; itself if it is for that one already.

    * `"bilinear"`, `"bicubic"`: with pixel centres, for each head; bilinear is MaxViT's official rule.
    * `"geometric"`: timm's, which keeps short offsets finely resolved; in float32.
    """
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    if all(surely(old == new) for old, new in zip(table.shape[1:], size, strict=True)):
        return table
    if mode == "geometric":
        return resize_rel_pos_bias_table(table, window, (table.shape[0], *size)).to(table.dtype)
    return F.interpolate(table[None], size, mode=mode, align_corners=False)[0]


def convert_swin_table(table: Tensor, window: tuple[int, int]) -> Tensor:
    """Swin's published table `((2 * rows - 1) * (2 * columns - 1), heads)`, query minus key, in our layout."""
    return table.t().unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1)).flip(1, 2).contiguous()
