"""Agent, InLine and multi-scale linear attention in the forms that are fastest without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridzoo.kernels import dynamic_depthwise_conv2d
from hybridzoo.layers.agent_attention import AgentAttention, agent_attention
from hybridzoo.layers.heads import merge_heads, split_heads
from hybridzoo.layers.inference.fusing import Fixed, swaps
from hybridzoo.layers.inline_attention import InLineAttention, deviation, scaled_covariance
from hybridzoo.layers.linear_attention import MultiScaleLinearAttention, relu_linear_attention

# When to compute attention without queries and keys; measured on a CPU with benchmarks/compare.py.
AGENT_UNPROJECTED_BELOW = 1.0  # ratio of multiplications, without and with queries and keys
INLINE_UNPROJECTED_ABOVE = 1.0  # tokens per channel


def part(layer: nn.Linear, start: int, stop: int) -> nn.Linear:
    """The linear layer that computes the outputs `start` to `stop` of `layer`."""
    out = nn.Linear(layer.in_features, stop - start, bias=layer.bias is not None, device="meta")
    out.weight = nn.Parameter(layer.weight.detach()[start:stop].clone())
    if layer.bias is not None:
        out.bias = nn.Parameter(layer.bias.detach()[start:stop].clone())
    return out


class AgentTables(nn.Module):
    """The biases of agent broadcast and agent aggregation for a map of `size`: `(2, heads, agents, tokens)`."""

    def __init__(self, layer: AgentAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, size: tuple[int, int]) -> Tensor:
        aggregation, broadcast = self.layer.biases(size)
        return torch.stack((broadcast.transpose(1, 2), aggregation))


class FusedAgentAttention(nn.Module):
    """`AgentAttention`, computed without queries and keys if there are few agents and many tokens."""

    def __init__(self, layer: AgentAttention) -> None:
        super().__init__()
        dim = layer.proj.in_features
        self.num_heads, self.grid = layer.num_heads, layer.grid
        self.query_key, self.value = part(layer.qkv, 0, 2 * dim), part(layer.qkv, 2 * dim, 3 * dim)
        self.proj = layer.proj
        layer.qkv = layer.proj = nn.Identity()  # type: ignore[assignment]
        self.layer = layer  # its pooling and its local convolution are still used
        self.tables = Fixed(AgentTables(layer))

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if x.ndim == 4:
            return self.forward(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)
        assert size is not None
        size = (size[0], size[1])
        return self.proj(self._unprojected(x, size) if self._skips_projection(x, size) else self._projected(x, size))

    def _skips_projection(self, x: Tensor, size: tuple[int, int]) -> bool:
        """Whether computing without queries and keys needs fewer multiplications per image.

        `agents @ (tokens @ weights)` equals `(agents @ weights) @ tokens`. With fewer agents than channels, the
        product in brackets is smaller in the second form.
        """
        dim, tokens, agents = x.shape[-1], size[0] * size[1], self.grid[0] * self.grid[1]
        unprojected = self.num_heads * agents * (4 * tokens + 2 * dim // self.num_heads)
        return unprojected < AGENT_UNPROJECTED_BELOW * tokens * (2 * dim + 4 * agents)

    def _projected(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        query, key = self.query_key(x).chunk(2, dim=-1)
        value = self.value(x)  # a separate product, because the convolution needs a contiguous tensor
        q, a, k, v = (split_heads(t, self.num_heads) for t in (query, self.layer.pool(query, size), key, value))
        broadcast, aggregation = self.tables(size).to(value.dtype).unbind(0)
        out = merge_heads(agent_attention(q, a, k, v, aggregation, broadcast.transpose(1, 2)))
        return out + self.layer.local(value, size)

    def _unprojected(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The same result without queries and keys. Scores are `(agents, tokens)`, so that softmax reads rows."""
        batch, _, dim = x.shape
        heads = self.num_heads
        weight, bias = self.query_key.weight, self.query_key.bias
        value = self.value(x)
        # Pooling before the projection gives the same result as after it.
        agent = F.linear(self.layer.pool(x, size), weight[:dim], None if bias is None else bias[:dim])
        agent = split_heads(agent, heads)[:, None] * (dim // heads) ** -0.5
        # The agents of all heads, multiplied by the weights of queries and of keys: their scores with tokens directly.
        probe = agent @ weight.unflatten(0, (2, heads, -1))  # (batch, 2, heads, agents, dim)
        tables = self.tables(size)
        if bias is not None:
            tables = tables + agent @ bias.view(2, heads, -1, 1)
        tables = tables.to(value.dtype).expand(batch, -1, -1, -1, -1)
        scores = torch.baddbmm(tables.flatten(1, 3), probe.flatten(1, 3), x.transpose(1, 2))
        broadcast, aggregation = scores.unflatten(1, probe.shape[1:4]).unbind(1)
        broadcast, aggregation = broadcast.softmax(2).to(value.dtype), aggregation.softmax(-1).to(value.dtype)
        # One product for all heads, of which only the diagonal blocks are used: faster than separate products.
        agent_value = (aggregation.flatten(1, 2) @ value).view(batch, heads, agent.shape[3], heads, dim // heads)
        blocks = agent_value * torch.eye(heads, dtype=value.dtype, device=x.device)[:, None, :, None]
        mixing = blocks.flatten(3).flatten(1, 2)
        return torch.baddbmm(self.layer.local(value, size), broadcast.flatten(1, 2).transpose(1, 2), mixing)


class FusedInLineAttention(nn.Module):
    """`InLineAttention` with one convolution instead of two, and without queries and keys if tokens > channels."""

    def __init__(self, layer: InLineAttention) -> None:
        super().__init__()
        dim = layer.proj.in_features
        self.num_heads, self.class_token = layer.num_heads, layer.class_token
        self.query_key, self.value = part(layer.qkv, 0, 2 * dim), part(layer.qkv, 2 * dim, 3 * dim)
        self.residual: Any = layer.residual
        self.dwc: Any = layer.dwc
        self.proj = layer.proj

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, *, summary: Tensor | None = None) -> Tensor:
        if x.ndim == 4:
            return self.forward(x.flatten(1, 2), (x.shape[1], x.shape[2]), summary=summary).view(x.shape)
        assert size is not None
        mean = x.mean(1)
        kernels = self._kernels(mean if summary is None else summary)
        if x.shape[1] > INLINE_UNPROJECTED_ABOVE * x.shape[2]:
            return self.proj(self._unprojected(x, mean, size, kernels))
        query, key = self.query_key(x).chunk(2, dim=-1)
        value = self.value(x)  # a separate product, because the convolution needs a contiguous tensor
        out = merge_heads(deviation(*(split_heads(t, self.num_heads) for t in (query, key, value))))
        return self.proj(out + self._local(value, size, kernels, value.mean(1)))

    def _kernels(self, summary: Tensor) -> Tensor:
        hidden = self._grouped(self.residual[0], summary.unflatten(1, (self.num_heads, -1)).transpose(0, 1))
        kernels = self._grouped(self.residual[2], self.residual[1](hidden)).transpose(0, 1).reshape(*summary.shape, 9)
        # Both convolutions have the same input and padding, so their kernels can be added.
        return kernels if self.dwc is None else kernels + self.dwc.weight.flatten(1)

    def _grouped(self, conv: Any, x: Tensor) -> Tensor:
        """A grouped convolution of single pixels as a product: `(heads, batch, in)` -> `(heads, batch, out)`."""
        weight = conv.weight.view(self.num_heads, -1, x.shape[2])
        return torch.baddbmm(conv.bias.view(self.num_heads, 1, -1), x, weight.transpose(1, 2))

    def _unprojected(self, x: Tensor, mean: Tensor, size: tuple[int, int], kernels: Tensor) -> Tensor:
        """The same result without queries and keys.

        With q = x Wq + b and k = x Wk, `q @ Cov(k, v) = (x Wq + b) Wk^T Cov(x, v)`. This needs two products with the
        tokens, like q and k themselves, but no product of `tokens x head_dim x head_dim`. (The bias of k has no
        influence on the covariance.)
        """
        batch, tokens, dim = x.shape
        heads, head_dim = self.num_heads, dim // self.num_heads
        value, mean_value = self.value(x), self.value(mean)
        query_weight, key_weight = self.query_key.weight.unflatten(0, (2, heads, head_dim)).unbind(0)
        covariance = scaled_covariance(x, value, head_dim**-0.5 / tokens)  # of all inputs with all values
        # For each head, the images side by side, because all images share the weights of a head.
        covariance = covariance.unflatten(2, (heads, head_dim)).permute(2, 1, 0, 3).flatten(2)
        covariance = key_weight @ covariance  # (heads, head_dim, batch * head_dim): keys with values
        if self.query_key.bias is not None:
            shift = self.query_key.bias[:dim].view(heads, 1, head_dim) @ covariance
            mean_value = mean_value + shift.view(heads, batch, head_dim).transpose(0, 1).flatten(1)
        mixing = (query_weight.transpose(1, 2) @ covariance).unflatten(2, (batch, head_dim))
        mixing = mixing.permute(2, 1, 0, 3).flatten(2)  # (batch, dim, dim): from tokens to values
        return torch.baddbmm(self._local(value, size, kernels, mean_value), x, mixing)

    def _local(self, value: Tensor, size: Sequence[int], kernels: Tensor, shift: Tensor) -> Tensor:
        """The convolved values plus `shift`, `(batch, dim)`; a class token gets only `shift`."""
        first = int(self.class_token)
        bias = shift if self.dwc is None else shift + self.dwc.bias
        local = dynamic_depthwise_conv2d(value[:, first:].unflatten(1, size), kernels, bias).flatten(1, 2)
        return torch.cat([shift[:, None].to(local.dtype), local], dim=1) if first else local


class FusedMultiScaleLinearAttention(nn.Module):
    """`MultiScaleLinearAttention` with its grouped 1x1 convolutions as batched products, one for each head."""

    def __init__(self, layer: MultiScaleLinearAttention) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.qkv, self.aggregate, self.proj = layer.qkv, layer.aggregate, layer.proj

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        images = (batch, height * width)
        qkv = self.qkv(x)
        # Query, key and value are (heads, batch, tokens, head_dim).
        outs = [self._attend(*self._rows(qkv).permute(2, 1, 0, 3).contiguous().unflatten(2, images))]
        scale: Any  # a pair of convolutions
        for scale in self.aggregate:
            depthwise, mix = scale
            rows, weight = self._rows(depthwise(qkv)), mix.weight.view(-1, 3, self.head_dim, self.head_dim)
            parts = (torch.bmm(rows[:, :, i].transpose(0, 1), weight[:, i].transpose(1, 2)) for i in range(3))
            outs.append(self._attend(*(part.unflatten(1, images) for part in parts)))
        tokens = torch.cat([out.permute(1, 2, 0, 3) for out in outs], dim=2).flatten(2)
        return self.proj(tokens.transpose(1, 2).unflatten(2, (height, width)))  # a channels-last map

    def _rows(self, qkv: Tensor) -> Tensor:
        """`(B, heads * 3 * head_dim, H, W)` -> `(B * tokens, heads, 3, head_dim)`; a view if `qkv` is channels-last."""
        return qkv.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (-1, 3, self.head_dim))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return relu_linear_attention(F.relu(query), F.relu(key), value)


swaps(AgentAttention)(FusedAgentAttention)
swaps(InLineAttention)(FusedInLineAttention)
swaps(MultiScaleLinearAttention)(FusedMultiScaleLinearAttention)
