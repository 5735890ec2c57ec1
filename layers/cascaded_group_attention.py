"""Cascaded group attention (EfficientViT of Microsoft Research Asia, arXiv 2305.07027, section 3.2), in windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels.open_sizes import is_open, larger, smaller, surely
from hybridzoo.layers.conv_norm_act import ConvNormAct
from hybridzoo.layers.relative_position import gather_bias
from hybridzoo.layers.windows import from_windows, to_windows


class AbsoluteOffsetBias(nn.Module):
    """Position bias from a table over `(|rows apart|, |columns apart|)`.

    A state dict whose table belongs to another window is resized while it is loaded: bicubically without antialiasing,
    as the published detectors did.

    Args:
        num_heads: attention heads.
        window: side of the largest window in tokens.
    """

    def __init__(self, num_heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros(num_heads, window**2))

    def forward(self, height: int, width: int) -> Tensor:
        """Bias `(heads, tokens, tokens)` of a map not larger than the window, tokens row by row."""
        table = self.table.unflatten(1, (self.window, self.window))
        for axis in (1, 2):  # the same for offsets below zero
            table = torch.cat((table.flip(axis).narrow(axis, 0, table.shape[axis] - 1), table), axis)
        return gather_bias(table, (height, width))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        table = state_dict.get(f"{prefix}table")
        if table is not None and table.shape[-1] != self.window**2:
            state_dict[f"{prefix}table"] = resize_absolute_table(table, self.window)
        super()._load_from_state_dict(state_dict, prefix, *args)


@register_notrace_module
class CascadedGroupAttention(nn.Module):
    """Each head reads its own part of the channels, plus the output of the previous head.

    `(B, dim, H, W)` in and out, any height and width. A map that fits into one window is one window. Any other is cut
    into windows of the trained size, with zeros appended at the bottom and right; as in the published code the
    appended tokens take part in attention. Convolutions stay inside a window too.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads; a head's values have `dim // num_heads` channels.
        window: side of a window in tokens.
        kernel_sizes: of the depthwise convolution over each head's queries; entries beyond `num_heads` are unused.
        key_dim: channels of a head's queries and keys.

    Raises:
        ValueError: `dim` is no multiple of `num_heads`, too few kernel sizes, or no positive window.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import CascadedGroupAttention
        >>> CascadedGroupAttention(64, num_heads=4, window=7)(torch.randn(1, 64, 16, 9)).shape
        torch.Size([1, 64, 16, 9])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        key_dim: int = 16,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        if len(kernel_sizes) < num_heads:
            raise ValueError(
                f"kernel_sizes must have an entry for each of {num_heads} heads; got {tuple(kernel_sizes)}"
            )
        if window < 1:
            raise ValueError(f"window must be a positive number of tokens; got {window}")
        self.num_heads = num_heads
        self.window = window
        self.key_dim = key_dim
        self.value_dim = dim // num_heads
        width = 2 * key_dim + self.value_dim
        self.qkvs = nn.ModuleList(ConvNormAct(self.value_dim, width) for _ in range(num_heads))
        self.depthwise = nn.ModuleList(
            ConvNormAct(key_dim, key_dim, kernel, groups=key_dim) for kernel in kernel_sizes[:num_heads]
        )
        self.act = nn.ReLU()
        self.proj = ConvNormAct(dim, dim)
        self.bias = AbsoluteOffsetBias(num_heads, window)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if surely(height <= self.window) and surely(width <= self.window):
            return self._attend(x)
        # With channels last, a window is a strided view of the map; it is copied once on input and once on output.
        windows = to_windows(x.permute(0, 2, 3, 1), (self.window, self.window))
        grid = windows.shape[1:3]
        real = self._real(height, width, x.device) if is_open(height, width) else None
        out = self._attend(windows.flatten(0, 2).permute(0, 3, 1, 2), real).permute(0, 2, 3, 1)
        return from_windows(out.unflatten(0, (-1, *grid)), height, width).permute(0, 3, 1, 2)

    def _real(self, height: int, width: int, device: torch.device) -> Tensor:
        """Bool `(window, window)`, where the tokens of a window are: on the map if it fits, else everywhere.

        A program with open sizes pads a map that fits to a window, since it cannot decide over the way.
        """
        fits = 1 - smaller(1, (larger(height, width) - 1) // self.window)
        token = torch.arange(self.window, device=device)
        rows, columns = (token < fits * side + (1 - fits) * self.window for side in (height, width))
        return rows[:, None] & columns

    def _attend(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """One window per image: `(B, dim, h, w)` in and out; copied unless channels are last in memory.

        `real`: bool `(h, w)`, tokens that there are; others are neither attended to nor convolved.
        """
        size = x.shape[2:]
        bias = self.bias(*size).to(x.dtype)
        shares = x.chunk(self.num_heads, dim=1)
        outs: list[Tensor] = []
        for head, (to_qkv, depthwise) in enumerate(zip(self.qkvs, self.depthwise, strict=True)):
            share = shares[head] + outs[-1] if head else shares[head]
            query, key, value = to_qkv(share).split((self.key_dim, self.key_dim, self.value_dim), dim=1)
            query = query if real is None else query * real
            # (B, channels, tokens) each, so that keys are transposed already
            query, key, value = (part.flatten(2) for part in (depthwise(query), key, value))
            query, value = query.transpose(1, 2), value.transpose(1, 2)
            scores = torch.baddbmm(bias[head].expand(x.shape[0], -1, -1), query, key, alpha=self.key_dim**-0.5)
            if real is not None:
                scores = scores.masked_fill(~real.flatten(), float("-inf"))
            outs.append((scores.softmax(-1) @ value).transpose(1, 2).unflatten(2, size))
        return self.proj(self.act(torch.cat(outs, dim=1)))


def resize_absolute_table(table: Tensor, window: int) -> Tensor:
    """A table of absolute offsets `(heads, side**2)` for another window: `(heads, window**2)`."""
    side = round(table.shape[-1] ** 0.5)
    square = table.unflatten(-1, (side, side))[None]
    return F.interpolate(square, (window, window), mode="bicubic", align_corners=False)[0].flatten(1)
