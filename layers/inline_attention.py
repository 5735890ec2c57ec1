"""InLine attention ("Bridging the Divide", Han et al., NeurIPS 2024, arXiv 2412.06590), as a layer on tokens.

Linear attention whose weights sum to one by subtraction, not division, plus a depthwise 3x3 convolution of the values
with kernels that every image makes for itself. The weights of query i over N keys,

    w_ij = (s/N) q_i.k_j - mean_j((s/N) q_i.k_j) + 1/N,

make the output `mean(v) + s * q_i @ Cov(k, v)`: the whole attention is one `head_dim x head_dim` matrix a head.
"""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.kernels import dynamic_depthwise_conv2d
from hybridzoo.layers.heads import merge_heads, split_heads


@register_notrace_module
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
        self.residual = nn.Sequential(  # token mean -> nine numbers per channel; a head reads its own channels only
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
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        attended = deviation(*(split_heads(t, self.num_heads) for t in (query, key, value)))
        kernels = self.kernels(x.mean(1) if summary is None else summary)
        return self.proj(merge_heads(attended) + self.local(value, size, kernels, value.mean(1)))

    def kernels(self, summary: Tensor) -> Tensor:
        """3x3 kernels of every image's every channel, `(batch, dim, 9)` row by row, from a summary `(batch, dim)`."""
        return self.residual(summary[..., None]).view(*summary.shape, 9)

    def local(self, value: Tensor, size: tuple[int, int], kernels: Tensor, shift: Tensor) -> Tensor:
        """The convolved values plus the `(batch, dim)` numbers `shift`, which is all that a class token gets."""
        first = int(self.class_token)
        maps = value[:, first:].unflatten(1, size)
        local = dynamic_depthwise_conv2d(maps, kernels, shift)
        if self.dwc is not None:
            local = local + self.dwc(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        local = local.flatten(1, 2)
        return torch.cat([shift[:, None].to(local.dtype), local], dim=1) if first else local


def deviation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention's result for each query, without the values' mean: `s * q @ Cov(k, v)` with `s = head_dim ** -0.5`.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        key, value: `(batch, heads, keys, head_dim)`.

    Returns:
        `(batch, heads, queries, head_dim)`.
    """
    return query @ scaled_covariance(key, value, key.shape[3] ** -0.5 / key.shape[2])


def scaled_covariance(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`scale * (left - mean(left))^T (right - mean(right))`, means over tokens: `(..., tokens, n)`, `(..., tokens, m)`.

    Centring one side is enough in exact arithmetic. In bfloat16, the mean of one side times the rounding error of the
    other is as large as the covariance, so both are centred. In float16, a sum over many tokens overflows, and so would
    one side with the whole scale, so that each side gets half of it.
    """
    left = left - left.mean(-2, keepdim=True)
    if right.element_size() < 4:  # also under autocast, which produced it
        right = right - right.mean(-2, keepdim=True)
    if right.dtype == torch.float16:
        return (left * scale**0.5).transpose(-2, -1) @ (right * scale**0.5)
    return left.transpose(-2, -1) @ right * scale
