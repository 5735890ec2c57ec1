"""RAVLT's attentions: rank-augmented linear attention, and softmax attention with the same convolution and gate.

"Breaking the Low-Rank Dilemma of Linear Attention", CVPR 2025, arXiv 2411.07635, sections 3.2 and 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.heads import merge_heads, softmax_attention, split_heads
from hybridzoo.layers.precision import without_autocast
from hybridzoo.layers.rotary import Rotary2d, rotate

EPS = 1e-6  # of the published weights


@register_notrace_module
class GatedAttention(nn.Module):
    """Softmax attention with rotary positions; a 5x5 convolution of the values is added, then a gate multiplies.

    `(batch, height, width, dim)` in and out, any height and width.

    Args:
        dim: channels, a multiple of `num_heads`; a head has a multiple of 4.
        num_heads: attention heads.

    Raises:
        ValueError: `dim` or the head's channels are not such multiples.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import RankAugmentedAttention
        >>> RankAugmentedAttention(64, num_heads=2)(torch.randn(1, 9, 14, 64)).shape
        torch.Size([1, 9, 14, 64])
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkvg = nn.Linear(dim, 4 * dim)  # queries, keys, values, gate
        self.rotary = Rotary2d(dim // num_heads)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        query, key, value, gate = self.qkvg(x).chunk(4, dim=-1)
        local = self.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        query, key, value = (split_heads(t.flatten(1, 2), self.num_heads) for t in (query, key, value))
        out = self.attend(query, key, value, self.rotary(height, width, value.dtype, value.device))
        return self.proj((merge_heads(out).unflatten(1, (height, width)) + local) * gate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
        """All `(batch, heads, tokens, head_dim)`."""
        return softmax_attention(rotate(query, rotation), rotate(key, rotation), value)


@register_notrace_module
class RankAugmentedAttention(GatedAttention):
    """`GatedAttention` with rank-augmented linear attention for softmax: cost linear in the map's area."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
        return rank_augmented_attention(query, key, value, rotation)


def rank_augmented_attention(query: Tensor, key: Tensor, value: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Linear attention whose keys are weighted by their product with the mean query.

    With `f(x) = elu(x) + 1`, `q_i = f(query_i)`, `k_j = f(key_j)` and the weights
    `p = softmax over j of (mean_i q_i . k_j) / sqrt(head_dim)`:

        out_i = rotate(q_i) (sum_j p_j rotate(k_j) value_j^T) / (q_i . sum_j p_j k_j + 1e-6)

    The paper's factors of the number of tokens, on the keys and under the sums, cancel. Sums are in float32 or wider.

    Args:
        query, key, value: `(batch, heads, tokens, head_dim)`.
        rotation: of the numerator, see `rotary`; `None` for none.

    Returns:
        `(batch, heads, tokens, head_dim)`.
    """
    dtype = value.dtype
    exact = torch.promote_types(dtype, torch.float32)
    with without_autocast(value):
        query, key = (F.elu(t.to(exact)) + 1 for t in (query, key))
        wanted = query.mean(2, keepdim=True) * query.shape[-1] ** -0.5
        weight = (key @ wanted.transpose(2, 3)).softmax(2)
        weighted_sum = (weight * key).sum(2, keepdim=True)
        normaliser = query @ weighted_sum.transpose(2, 3) + EPS
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        state = (weight * key).transpose(2, 3) @ value.to(exact)
        return (query @ state / normaliser).to(dtype)
