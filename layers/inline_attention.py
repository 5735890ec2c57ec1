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

UNPROJECTED_ABOVE = 1.0  # tokens a channel; measured on a CPU


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
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.residual = nn.Sequential(  # token mean -> nine numbers a channel; a head sees its own channels only
            nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
        )
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if static_kernel else None
        self.proj = nn.Linear(dim, dim)

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
        if x.shape[1] > UNPROJECTED_ABOVE * x.shape[2]:
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
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        out = inline_attention(*(split_heads(t, self.num_heads) for t in (query, key, value)))
        return merge_heads(out) + self._local(value, size, kernels, torch.zeros_like(kernels[..., 0]))

    def _unprojected(self, x: Tensor, mean: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
        """The same numbers without queries and keys, the cheaper way where tokens are many.

        With q = x Wq + b and k = x Wk, `q @ Cov(k, v) = (x Wq + b) Wk^T Cov(x, v)`: two products with the tokens, as
        for q and k themselves, but none of `tokens x head_dim x head_dim`. (A bias of k has no covariance.) What is the
        same for all tokens goes along as the convolution's bias, and the product is added to its result.
        """
        dim, heads = x.shape[-1], self.num_heads
        weight, bias = self.qkv.weight, self.qkv.bias
        of_value = (weight[2 * dim :], None if bias is None else bias[2 * dim :])
        value, mean_value = F.linear(x, *of_value), F.linear(mean, *of_value)
        share = _share(dim // heads, x.shape[1])
        # Of all inputs and all values.
        covariance = ((x - mean[:, None]) * share).mT @ (_centred(value, mean_value) * share)
        query_weight, key_weight = weight[: 2 * dim].unflatten(0, (2, heads, -1)).unbind(0)  # (heads, head_dim, dim)
        covariance = key_weight @ split_heads(covariance, heads)  # (batch, heads, head_dim, head_dim)
        if bias is not None:
            mean_value = mean_value + (bias[:dim].view(heads, 1, -1) @ covariance).flatten(1)
        mixing = (query_weight.mT @ covariance).transpose(1, 2).flatten(2)  # (batch, dim, dim), of values from tokens
        return add_product(self._local(value, size, kernels, mean_value), x, mixing)

    def _local(self, value: Tensor, size: tuple[int, int], kernels: Tensor, shift: Tensor) -> Tensor:
        """The convolved values plus the `(batch, dim)` numbers `shift`, which is all that a class token gets."""
        first = int(self.class_token)
        static = None if self.dwc is None else self.dwc.bias
        maps = value[:, first:].unflatten(1, size)
        local = dynamic_depthwise(maps, kernels, shift if static is None else shift + static).flatten(1, 2)
        return torch.cat([shift[:, None].to(local.dtype), local], dim=1) if first else local


def _centred(value: Tensor, mean: Tensor) -> Tensor:
    """Values for a covariance with something centred already, which is enough unless numbers are coarse.

    In bfloat16 the mean of one side times the rounding error of the other's is as large as the covariance.
    """
    return value - mean[:, None] if value.element_size() < 4 else value


def _share(head_dim: int, keys: int) -> float:
    """What each factor of a covariance gets of the scale `head_dim ** -0.5 / keys`, before they are multiplied.

    The sum over all keys does not fit into float16 unscaled, and keys alone that are scaled by all of it vanish there.
    """
    return (head_dim**-0.5 / keys) ** 0.5


def inline_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The linear attention alone: `mean(v) + s * q @ Cov(k, v)` with `s = head_dim ** -0.5`.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key, value: `(batch, heads, keys, head_dim)`.

    Returns:
        `(batch, heads, queries, head_dim)`.
    """
    mean = value.mean(2, keepdim=True)
    # To centre one side would do, but in bfloat16 the other's mean times its rounding error is as large as the result.
    share = _share(key.shape[3], key.shape[2])
    key = (key - key.mean(2, keepdim=True)) * share
    covariance = key.mT @ ((value - mean) * share)
    return query @ covariance + mean


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
    return _by_images(x, kernels, bias) if x.device.type == "cpu" else _by_groups(x, kernels, bias)


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


def _by_groups(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """One convolution of all images' channels: the fewest launches on a GPU, for two copies."""
    batch, height, width, dim = x.shape
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
    weights = kernels.reshape(batch * dim, 1, 3, 3)
    out = F.conv2d(maps, weights, bias.flatten(), padding=1, groups=batch * dim)
    return out.view(batch, dim, height, width).permute(0, 2, 3, 1)
