"""InLine attention ("Bridging the Divide", Han et al., NeurIPS 2024, arXiv 2412.06590), as a layer on tokens.

Linear attention whose weights sum to one by subtraction, not division, plus a depthwise 3x3 convolution of the values
with kernels that every image makes for itself. The weights of query i over N keys,

    w_ij = (s/N) q_i.k_j - mean_j((s/N) q_i.k_j) + 1/N,

make the output `mean(v) + s * q_i @ Cov(k, v)`: the whole attention is one `head_dim x head_dim` matrix a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers.heads import add_product, merge_heads, split_heads
from hybridzoo.layers.linear import Linear, is_plain, linear_rows
from hybridzoo.layers.slicing import lean

# Measured on a CPU, see benchmarks/linear_attention_families.py:
UNPROJECTED_ABOVE = 1.0  # tokens a channel
SIDE_BY_SIDE_BELOW = 2**17  # elements of an image's map


class InLineAttention(nn.Module):
    """Global linear attention with an input-generated local residual; nothing in it depends on the map's size.

    A class token, if there is one, is token 0: it takes part in every mean and covariance, but is not convolved.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads; the kernel generator is grouped by head too.
        class_token: whether token 0 is a class token.
        static_kernel: add a learned 3x3 kernel and a bias to the generated kernels (CSwin's positional encoding).
        qkv_bias: whether the query, key and value projection has a bias.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import InLineAttention
        >>> layer = InLineAttention(64, num_heads=2)
        >>> layer(torch.randn(1, 20 * 31, 64), size=(20, 31)).shape  # tokens, row by row
        torch.Size([1, 620, 64])
        >>> layer(torch.randn(1, 20, 31, 64)).shape  # the same as a channels-last map
        torch.Size([1, 20, 31, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        class_token: bool = False,
        static_kernel: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.class_token = class_token
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.residual = nn.Sequential(  # token mean -> nine numbers a channel; a head sees its own channels only
            nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        )
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if static_kernel else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, *, summary: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens `(batch, rows * columns, dim)`, one more with a class token; or a map
                `(batch, rows, columns, dim)`.
            size: `(rows, columns)` of the tokens' map; not needed for a map.
            summary: `(batch, dim)`, what the local kernels are generated from; the mean of all tokens by default.

        Returns:
            The shape of `x`.

        Raises:
            ValueError: `size` is missing or does not match the number of tokens.
        """
        if x.ndim == 4:
            return self.forward(x.flatten(1, 2), (x.shape[1], x.shape[2]), summary=summary).view(x.shape)
        first = int(self.class_token)
        if size is None or x.shape[1] != first + size[0] * size[1]:
            raise ValueError(
                f"size must be the (rows, columns) of the {x.shape[1]} tokens"
                f"{' less the class token' if first else ''}; got {size}"
            )
        mean = x.mean(1)
        kernels = self.kernels(mean if summary is None else summary)
        if is_plain(self.qkv) and x.shape[1] > UNPROJECTED_ABOVE * x.shape[2]:
            return self.proj(self._unprojected(x, mean, size, kernels))
        return self.proj(self._projected(x, size, kernels))

    def kernels(self, summary: Tensor) -> Tensor:
        """3x3 kernels of every image's every channel, `(batch, dim, 9)` row by row, from a summary `(batch, dim)`."""
        hidden = self._grouped(self.residual[0], summary.unflatten(1, (self.num_heads, -1)).transpose(0, 1))
        kernels = self._grouped(self.residual[2], self.residual[1](hidden)).transpose(0, 1).reshape(*summary.shape, 9)
        # The same padding and the same values: both kernels are one.
        return kernels if self.dwc is None else kernels + self.dwc.weight.flatten(1)

    def _grouped(self, conv: Any, x: Tensor) -> Tensor:
        """A grouped convolution of single pixels as one product: `(heads, batch, in)` -> `(heads, batch, out)`."""
        weight = conv.weight.view(self.num_heads, -1, x.shape[2])
        return torch.baddbmm(conv.bias.view(self.num_heads, 1, -1), x, weight.mT)

    def _projected(self, x: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
        """`mean(v) + s * q @ Cov(k, v)` plus the local residual, `(batch, tokens, dim)`."""
        dim = x.shape[-1]
        if lean(x):  # values for themselves, which the convolution wants dense
            query, key = linear_rows(self.qkv, x, 0, 2 * dim).chunk(2, dim=-1)
            value = linear_rows(self.qkv, x, 2 * dim, 3 * dim)
        else:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
        base = self._local(value, size, kernels, value.mean(1))
        out = merge_heads(deviation(*(split_heads(t, self.num_heads) for t in (query, key, value))))
        return base.add_(out) if lean(x) and base.dtype == out.dtype else base + out

    def _unprojected(self, x: Tensor, mean: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
        """The same numbers without queries and keys, the cheaper way where tokens are many.

        With q = x Wq + b and k = x Wk, `q @ Cov(k, v) = (x Wq + b) Wk^T Cov(x, v)`: two products with the tokens, as
        for q and k themselves, but none of `tokens x head_dim x head_dim`. (A bias of k has no covariance.)
        """
        batch, tokens, dim = x.shape
        heads, head_dim = self.num_heads, dim // self.num_heads
        value, mean_value = (linear_rows(self.qkv, t, 2 * dim, 3 * dim) for t in (x, mean))
        query_weight, key_weight, _ = self.qkv.weight.unflatten(0, (3, heads, head_dim)).unbind(0)
        covariance = scaled_covariance(x, value, head_dim**-0.5 / tokens)  # of all inputs and values
        # By head, the images side by side: a head's weights are the same for all of them.
        covariance = covariance.unflatten(2, (heads, head_dim)).permute(2, 1, 0, 3).flatten(2)
        covariance = key_weight @ covariance  # (heads, head_dim, batch * head_dim), of keys and values
        if self.qkv.bias is not None:
            shift = self.qkv.bias[:dim].view(heads, 1, head_dim) @ covariance
            mean_value = mean_value + shift.view(heads, batch, head_dim).transpose(0, 1).flatten(1)
        mixing = (query_weight.mT @ covariance).unflatten(2, (batch, head_dim))
        mixing = mixing.permute(2, 1, 0, 3).flatten(2)  # (batch, dim, dim), of values from tokens
        return add_product(self._local(value, size, kernels, mean_value), x, mixing)

    def _local(self, value: Tensor, size: tuple[int, int], kernels: Tensor, shift: Tensor) -> Tensor:
        """The convolved values plus the `(batch, dim)` numbers `shift`, which is all that a class token gets."""
        first = int(self.class_token)
        static = None if self.dwc is None else self.dwc.bias
        maps = value[:, first:].unflatten(1, size)
        local = dynamic_depthwise(maps, kernels, shift if static is None else shift + static).flatten(1, 2)
        return torch.cat([shift[:, None].to(local.dtype), local], dim=1) if first else local


def deviation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What the attention makes of each query beside the values' mean: `s * q @ Cov(k, v)` with `s = head_dim ** -0.5`.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key, value: `(batch, heads, keys, head_dim)`.

    Returns:
        `(batch, heads, queries, head_dim)`.
    """
    return query @ scaled_covariance(key, value, key.shape[3] ** -0.5 / key.shape[2])


def scaled_covariance(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale * (left - mean(left))^T (right - mean(right))`, means over tokens: `(..., tokens, n)`, `(..., tokens, m)`.

    To centre one side is enough, unless numbers are coarse: in bfloat16 the mean of one side times the rounding error
    of the other's is as large as the covariance. Neither does a sum over many tokens fit into float16, nor what one
    side would be if it took all of the scale, so that each takes half.
    """
    left = left - left.mean(-2, keepdim=True)
    if right.element_size() < 4:  # under autocast too, which has made it
        right = right - right.mean(-2, keepdim=True)
        return (left * scale**0.5).mT @ (right * scale**0.5)
    return left.mT @ right * scale


def dynamic_depthwise(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """3x3 cross-correlation with zero padding of every image's every channel with a kernel and a bias of its own.

    Args:
        x: channels-last maps `(batch, height, width, dim)`.
        kernels: `(batch, dim, 9)`, row by row.
        bias: `(batch, dim)`.

    Returns:
        `(batch, height, width, dim)`.
    """
    kernels, bias = kernels.to(x.dtype), bias.to(x.dtype)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not len(x):
        return _by_taps(x, kernels, bias)
    if x.device.type != "cpu":
        return _by_groups(x, kernels, bias)
    return (_side_by_side if x[0].numel() < SIDE_BY_SIDE_BELOW else _by_images)(x, kernels, bias)


def _by_taps(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Nine shifted products, which a compiler fuses into one pass; no group count that depends on the batch."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    out = bias[:, None, None].expand_as(x)
    for tap in range(9):
        row, column = divmod(tap, 3)
        out = out + padded[:, row : row + height, column : column + width] * kernels[:, None, None, :, tap]
    return out


def _by_images(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """Image by image, each channels-last as it lies: a CPU copies nothing."""
    weights = kernels.unflatten(-1, (3, 3))[:, :, None]
    maps = x.permute(0, 3, 1, 2).split(1)
    images = [F.conv2d(m, w, b, padding=1, groups=x.shape[3]) for m, w, b in zip(maps, weights, bias, strict=True)]
    return torch.cat(images).permute(0, 2, 3, 1)


def _side_by_side(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """All images' channels as those of one image, channels-last: two copies, which are cheap while maps are small."""
    batch, height, width, dim = x.shape
    maps = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * dim).permute(0, 3, 1, 2)
    out = F.conv2d(maps, kernels.reshape(-1, 1, 3, 3), bias.flatten(), padding=1, groups=batch * dim)
    return out.permute(0, 2, 3, 1).reshape(height, width, batch, dim).permute(2, 0, 1, 3)


def _by_groups(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """One convolution of all images' channels: the fewest launches on a GPU, for two copies."""
    batch, height, width, dim = x.shape
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
    weights = kernels.reshape(batch * dim, 1, 3, 3)
    out = F.conv2d(maps, weights, bias.flatten(), padding=1, groups=batch * dim)
    return out.view(batch, dim, height, width).permute(0, 2, 3, 1)
