"""InLine attention ("Bridging the Divide", Han et al., NeurIPS 2024, arXiv 2412.06590), as a layer on tokens.

Linear attention whose weights sum to one by subtraction, not division, plus a depthwise 3x3 convolution of the values
with kernels that every image makes for itself. The weights of query i over N keys,

    w_ij = (s/N) q_i.k_j - mean_j((s/N) q_i.k_j) + 1/N,

make the output `mean(v) + s * q_i @ Cov(k, v)`: the whole attention is one `head_dim x head_dim` matrix a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.layers.heads import merge_heads, split_heads


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
        kernels = self.residual((x.mean(1) if summary is None else summary)[..., None]).unflatten(1, (-1, 9))[..., 0]
        if self.dwc is not None:  # the same padding and the same values: both kernels are one
            kernels = kernels + self.dwc.weight.flatten(1)
        out, value = self._folded(x) if x.shape[1] > x.shape[2] else self._projected(x)
        local = dynamic_depthwise(value[:, first:].unflatten(1, size), kernels).flatten(1, 2)
        if self.dwc is not None and self.dwc.bias is not None:
            local = local + self.dwc.bias
        return self.proj(out + (F.pad(local, (0, 0, first, 0)) if first else local))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mean(v) + s * q @ Cov(k, v)` and the values, each `(batch, tokens, dim)`."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        out = inline_attention(*(split_heads(t, self.num_heads) for t in (query, key, value)))
        return merge_heads(out), value

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same numbers without queries and keys, the cheaper way where tokens outnumber channels.

        With q = x Wq + b and k = x Wk, `q @ Cov(k, v) = (x Wq + b) Wk^T Cov(x, v)`: two products with the tokens, as
        for q and k themselves, but none of `tokens x head_dim x head_dim`. (A bias of k has no covariance.)
        """
        dim, heads = x.shape[-1], self.num_heads
        weight, bias = self.qkv.weight, self.qkv.bias
        value = F.linear(x, weight[2 * dim :], None if bias is None else bias[2 * dim :])
        mean = value.mean(1, keepdim=True)
        scale = (dim // heads) ** -0.5 / x.shape[1]
        covariance = (x - x.mean(1, keepdim=True)).transpose(1, 2) @ (value - mean) * scale  # all inputs, all values
        query_weight, key_weight = weight[: 2 * dim].unflatten(0, (2, heads, -1)).unbind(0)  # (heads, head_dim, dim)
        covariance = key_weight @ split_heads(covariance, self.num_heads)  # (batch, heads, head_dim, head_dim)
        out = x @ (query_weight.transpose(1, 2) @ covariance).transpose(1, 2).flatten(2)
        if bias is not None:
            mean = mean + (bias[:dim].view(heads, 1, -1) @ covariance).transpose(1, 2).flatten(2)
        return out + mean, value


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
    key = key - key.mean(2, keepdim=True)
    covariance = key.transpose(2, 3) @ (value - mean) * (key.shape[3] ** -0.5 / key.shape[2])
    return query @ covariance + mean


def dynamic_depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """3x3 cross-correlation with zero padding of every image's every channel with a kernel of its own.

    Args:
        x: channels-last maps `(batch, height, width, dim)`.
        kernels: `(batch, dim, 9)`, row by row.

    Returns:
        `(batch, height, width, dim)`.
    """
    kernels = kernels.to(x.dtype)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _by_taps(x, kernels)
    return _by_images(x, kernels) if x.device.type == "cpu" else _by_groups(x, kernels)


def _by_taps(x: Tensor, kernels: Tensor) -> Tensor:
    """Nine shifted products, which a compiler fuses into one pass; no group count that depends on the batch."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    out = torch.zeros_like(x)
    for tap in range(9):
        row, column = divmod(tap, 3)
        out = out + padded[:, row : row + height, column : column + width] * kernels[:, None, None, :, tap]
    return out


def _by_images(x: Tensor, kernels: Tensor) -> Tensor:
    """Image by image, each channels-last as it lies: a CPU copies nothing."""
    weights = kernels.unflatten(-1, (3, 3))[:, :, None]
    maps = x.permute(0, 3, 1, 2).split(1)
    images = [F.conv2d(m, w, padding=1, groups=x.shape[3]) for m, w in zip(maps, weights, strict=True)]
    return torch.cat(images).permute(0, 2, 3, 1)


def _by_groups(x: Tensor, kernels: Tensor) -> Tensor:
    """One convolution of all images' channels: the fewest launches on a GPU, for two copies."""
    batch, height, width, dim = x.shape
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
    out = F.conv2d(maps, kernels.reshape(batch * dim, 1, 3, 3), padding=1, groups=batch * dim)
    return out.view(batch, dim, height, width).permute(0, 2, 3, 1)
