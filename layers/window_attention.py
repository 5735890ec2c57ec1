"""Multi-head attention inside windows with a relative position bias, the layer of Swin and MaxViT."""

from __future__ import annotations

from torch import Tensor, nn

from hybridzoo.layers.relative_position import RelativePositionBias, Resize
from hybridzoo.layers.windows import attend


class WindowAttention(nn.Module):
    """Every token attends to the tokens of its window. `(batch, rows, columns, *window, dim)` in and out.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads.
        window: the largest window that will come, `(rows, columns)` in tokens; it sizes the bias table.
        table_resize: how a loaded table of another size is brought to this one, see `RelativePositionBias`.

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
