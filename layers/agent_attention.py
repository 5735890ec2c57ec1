"""Agent attention ("Agent Attention", Han et al., ECCV 2024, arXiv 2312.08874, section 3), as a layer on tokens.

A few agent tokens, pooled from the queries, collect the values by softmax attention. A second softmax attention passes
them to the queries: two attentions of N x A instead of one of N x N.

There is no Triton kernel for it, because it would save little. On an H200 (bf16, 128 images of 224 px, Swin-T's first
stage) the two attentions' products take 3 us (calculated), the linear layers 30 us and every pass over the map 16 us.
Without queries and keys the layer makes about 13 such passes, and a fused kernel 5. Over all stages, this is less than
a tenth of the network's forward pass.

A forward pass runs 23 operators, and 52 with the backward pass (14 x 14 tokens, 7 x 7 agents). The transcription in
`benchmarks/plain/hosts.py` runs 29 and 68.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from hybridzoo.layers.heads import merge_heads, softmax_attention, split_heads
from hybridzoo.layers.init import trunc_normal_
from hybridzoo.layers.resize import adaptive_pool, resize_map

COARSE = 7  # side of the block biases `an_bias` and `na_bias`, for any map


@register_notrace_module
class AgentAttention(nn.Module):
    """Global attention through agent tokens, plus a depthwise 3x3 convolution of the values; cost linear in tokens.

    Works on the tokens of any map, with any grid of agents: the bias tables, trained for one map and one grid, are
    resized bilinearly (as the published detection code does), first over the map, then over the agents. A class token,
    if there is one, is token 0. It is a query and a key with its own biases, but it is neither pooled into agents nor
    convolved.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: attention heads.
        agents: grid of agent tokens that the tables are trained for, `(rows, columns)` or one number for both.
        table_size: map that the tables are trained for, `(rows, columns)` in tokens or one number for both.
        grid: grid of agent tokens to use, `agents` by default. Detection and segmentation were published with finer
            grids than classification. May be assigned later.
        class_token: whether token 0 is a class token.
        qkv_bias: whether the query, key and value projection has a bias.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from hybridzoo.layers import AgentAttention
        >>> layer = AgentAttention(64, num_heads=2, agents=3, table_size=14)
        >>> layer(torch.randn(1, 20 * 31, 64), size=(20, 31)).shape  # tokens, row by row
        torch.Size([1, 620, 64])
        >>> layer(torch.randn(1, 20, 31, 64)).shape  # the same as a channels-last map
        torch.Size([1, 20, 31, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        agents: int | tuple[int, int] = 7,
        table_size: int | tuple[int, int] = 14,
        *,
        grid: int | tuple[int, int] | None = None,
        class_token: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got dim={dim}, num_heads={num_heads}")
        self.num_heads = num_heads
        self.agents = _pair("agents", agents)
        self.grid = self.agents if grid is None else _pair("grid", grid)
        self.class_token = class_token
        rows, columns = _pair("table_size", table_size)
        count = self.agents[0] * self.agents[1]
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        # Named as published: a = agent, n = map ("neighbours"), h / w = its rows / columns, c = class token.
        self.an_bias = nn.Parameter(torch.empty(num_heads, count, COARSE, COARSE))
        self.na_bias = nn.Parameter(torch.empty(num_heads, count, COARSE, COARSE))
        self.ah_bias = nn.Parameter(torch.empty(num_heads, count, rows))
        self.aw_bias = nn.Parameter(torch.empty(num_heads, count, columns))
        self.ha_bias = nn.Parameter(torch.empty(num_heads, count, rows))
        self.wa_bias = nn.Parameter(torch.empty(num_heads, count, columns))
        if class_token:
            self.ac_bias = nn.Parameter(torch.empty(num_heads, count))
            self.ca_bias = nn.Parameter(torch.empty(num_heads, count))
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens `(batch, rows * columns, dim)`, one more with a class token; or a map
                `(batch, rows, columns, dim)`.
            size: `(rows, columns)` of the tokens' map; not needed for a map.

        Returns:
            The shape of `x`.

        Raises:
            ValueError: `size` is missing or does not match the number of tokens.
        """
        if x.ndim == 4:
            return self.forward(x.flatten(1, 2), (x.shape[1], x.shape[2])).view(x.shape)
        first = int(self.class_token)
        if size is None or x.shape[1] != first + size[0] * size[1]:
            raise ValueError(
                f"size must be the (rows, columns) of the {x.shape[1]} tokens"
                f"{' less the class token' if first else ''}; got {size}"
            )
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        agent = self.pool(query, size)
        q, a, k, v = (split_heads(t, self.num_heads) for t in (query, agent, key, value))
        out = agent_attention(q, a, k, v, *(bias.to(value.dtype) for bias in self.biases(size)))
        return self.proj(merge_heads(out) + self.local(value, size))

    def pool(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Means of the tokens in the cells of the current grid, `(batch, agents, dim)`, without the class token."""
        return adaptive_pool(x[:, int(self.class_token) :].unflatten(1, size), self.grid).flatten(1, 2)

    def local(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """The convolution of the values, `(batch, tokens, dim)`; zero for the class token."""
        first = int(self.class_token)
        maps = value[:, first:].unflatten(1, size).permute(0, 3, 1, 2)
        local = self.dwc(maps).permute(0, 2, 3, 1).flatten(1, 2)
        return F.pad(local, (0, 0, first, 0)) if first else local

    def biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`aggregation_bias` and `broadcast_bias` of `agent_attention`, for this map size and the current grid.

        `(heads, agents, tokens)` and `(heads, tokens, agents)`.
        """
        # Both directions side by side: one resize for two tables. Over the agents first (the order does not matter), so
        # that the tables stay small until they get the map's size.
        block = self._regridded(torch.stack((self.an_bias, self.na_bias)).flatten(3)).unflatten(3, (COARSE, COARSE))
        rows = self._regridded(torch.stack((self.ah_bias, self.ha_bias)))[..., None]
        columns = self._regridded(torch.stack((self.aw_bias, self.wa_bias)))[..., None, :]
        # Rows and columns resize each along their own axis: both have length 1 along the other. What is added before
        # the columns are resized, whose weights sum to one, is the same after it.
        table = resize_map(block, (size[0], COARSE))
        table = resize_map(table + resize_map(rows, (size[0], 1)), size)
        table = (table + resize_map(columns, (1, size[1]))).flatten(3)
        if self.class_token:
            own = self._regridded(torch.stack((self.ac_bias, self.ca_bias))[..., None])
            table = torch.cat([own, table], dim=3)
        aggregation, broadcast = table.unbind(0)
        return aggregation, broadcast.transpose(1, 2)

    def _regridded(self, table: Tensor) -> Tensor:
        """`(..., agents, entries)` from the trained grid of agents to the current one."""
        if self.grid == self.agents:
            return table
        agents = table.transpose(-2, -1).unflatten(-1, self.agents)
        return resize_map(agents, self.grid).flatten(-2).transpose(-2, -1)


def agent_attention(
    query: Tensor, agent: Tensor, key: Tensor, value: Tensor, aggregation_bias: Tensor, broadcast_bias: Tensor
) -> Tensor:
    """The two softmax attentions alone; scores are scaled by `head_dim ** -0.5` before the biases are added.

    Aggregation: agents are the queries and collect the values. Broadcast: agents are the keys, and queries read from
    them.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        agent: `(batch, heads, agents, head_dim)`.
        key, value: `(batch, heads, keys, head_dim)`.
        aggregation_bias: `(heads, agents, keys)`.
        broadcast_bias: `(heads, queries, agents)`.

    Returns:
        `(batch, heads, queries, head_dim)`.
    """
    agent_value = softmax_attention(agent, key, value, aggregation_bias[None])
    return softmax_attention(query, agent, agent_value, broadcast_bias[None])


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    if min(rows, columns) < 1:
        raise ValueError(f"{name} must be positive; got {value}")
    return rows, columns
