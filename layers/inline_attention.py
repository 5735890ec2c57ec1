"""InLine attention ("Bridging the Divide", Han et al., NeurIPS 2024, arXiv 2412.06590), as a layer on tokens.

Linear attention whose weights sum to one by subtraction, not division, plus a depthwise 3x3 convolution of the values
with kernels that every image makes for itself. The weights of query i over N keys,

    w_ij = (s/N) q_i.k_j - mean_j((s/N) q_i.k_j) + 1/N,

make the output `mean(v) + s * q_i @ Cov(k, v)`: the whole attention is one `head_dim x head_dim` matrix a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hybridzoo.kernels import dynamic_depthwise_conv2d
from hybridzoo.layers.heads import add_product, merge_heads, split_heads
from hybridzoo.layers.linear import Linear, is_plain, linear_rows
from hybridzoo.layers.slicing import lean

UNPROJECTED_ABOVE = 1.0  # tokens a channel; measured on a CPU, see benchmarks/linear_attention_families.py


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
        local = dynamic_depthwise_conv2d(maps, kernels, shift if static is None else shift + static).flatten(1, 2)
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
    of the other's is as large as the covariance. Into float16 neither does a sum over many tokens fit, nor what one
    side would be if it took all of the scale, so that each takes half.
    """
    left = left - left.mean(-2, keepdim=True)
    if right.element_size() < 4:  # under autocast too, which has made it
        right = right - right.mean(-2, keepdim=True)
    if right.dtype == torch.float16:
        return (left * scale**0.5).mT @ (right * scale**0.5)
    return left.mT @ right * scale
