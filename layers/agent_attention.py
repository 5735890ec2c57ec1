"""Agent attention ("Agent Attention", Han et al., ECCV 2024, arXiv 2312.08874, section 3), as a layer on tokens.

A few agent tokens, pooled from the queries, gather the values by softmax attention and hand them to the queries by a
second one: two attentions of N x A instead of one of N x N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from hybridzoo.layers.eval_cache import EvalCache
from hybridzoo.layers.heads import merge_heads, split_heads
from hybridzoo.layers.resize import adaptive_pool, resize_map

COARSE = 7  # side of the block biases `an_bias` and `na_bias`, whatever the map
FOLD_BELOW = 0.6  # of the projections' work; measured on a CPU, see benchmarks/linear_attention_families.py


class AgentAttention(EvalCache):
    """Global attention through agent tokens, plus a depthwise 3x3 convolution of the values; cost linear in tokens.

    Works on the tokens of any map, with any grid of agents: the bias tables, trained for one map and one grid, are
    resized bilinearly (as the published detection code does), first over the map, then over the agents. A class token,
    if there is one, is token 0: a query and a key with biases of its own, but neither pooled into agents nor convolved.

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
        out, value = self._folded(x, size) if self.folds(size) else self._projected(x, size)
        local = self.dwc(value[:, first:].unflatten(1, size).permute(0, 3, 1, 2))
        local = local.permute(0, 2, 3, 1).flatten(1, 2)
        return self.proj(out + (F.pad(local, (0, 0, first, 0)) if first else local))

    def biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tables for a map of this size and the current grid, each `(heads, agents, tokens)`.

        The first is added to the scores of agents (as queries) and tokens (as keys), the second to those of tokens (as
        queries) and agents (as keys). In evaluation they are computed once a size.
        """
        return self.cached((tuple(size), self.grid), lambda: self._resized(size))

    def folds(self, size: tuple[int, int]) -> bool:
        """Whether few enough agents look at a map of this size that queries and keys need not be formed.

        Agents times queries is agents times query weights times tokens: with fewer agents than channels, the first
        product is the small one. Compares multiplications an image, one projection against its replacement.
        """
        dim, tokens, agents = self.proj.in_features, size[0] * size[1], self.grid[0] * self.grid[1]
        return self.num_heads * agents * (tokens + dim // self.num_heads) < FOLD_BELOW * tokens * dim

    def _projected(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Attention as the paper writes it: `(out, value)`, each `(batch, tokens, dim)`."""
        qkv = self.qkv(x)
        query, key, value = (split_heads(t, self.num_heads) for t in qkv.chunk(3, dim=-1))
        pooled = self._pool(qkv[..., : x.shape[-1]], size)
        agent = split_heads(pooled, self.num_heads)
        gather_bias, spread_bias = (b.to(qkv.dtype)[None] for b in self.biases(size))
        out = agent_attention(query, agent, key, value, gather_bias, spread_bias.transpose(2, 3).contiguous())
        return merge_heads(out), qkv[..., 2 * x.shape[-1] :]

    def _folded(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The same numbers without queries and keys; scores are agent-major, so that both softmaxes run over rows."""
        dim, heads = x.shape[-1], self.num_heads
        weight, bias = self.qkv.weight, self.qkv.bias
        value = F.linear(x, weight[2 * dim :], None if bias is None else bias[2 * dim :])
        # Pooling commutes with the projection.
        agent = F.linear(self._pool(x, size), weight[:dim], None if bias is None else bias[:dim])
        agent = (
            split_heads(agent, self.num_heads)[:, None] * (dim // heads) ** -0.5
        )  # (batch, 1, heads, agents, head_dim)
        probe = agent @ weight[: 2 * dim].unflatten(0, (2, heads, -1))  # (batch, 2: of queries and of keys, …, dim)
        of_queries, of_keys = (probe.flatten(1, 3) @ x.transpose(1, 2)).unflatten(1, probe.shape[1:4]).unbind(1)
        gather_bias, spread_bias = self.biases(size)
        if bias is not None:  # of the queries; that of the keys is the same for all keys: the softmax does not see it
            of_queries = of_queries + agent[:, 0] @ bias[:dim].unflatten(0, (heads, -1, 1))
        gather = (of_keys + gather_bias).softmax(-1).to(value.dtype)
        spread = (of_queries + spread_bias).softmax(2).to(value.dtype)
        agent_value = gather @ split_heads(value, self.num_heads)
        # All heads in one product, with their values as the blocks of a diagonal: no transposed copy of the result.
        blocks = torch.eye(heads, dtype=value.dtype, device=x.device)[:, None, :, None] * agent_value[:, :, :, None]
        return spread.flatten(1, 2).transpose(1, 2) @ blocks.flatten(3).flatten(1, 2), value

    def _pool(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return adaptive_pool(x[:, int(self.class_token) :].unflatten(1, size), self.grid).flatten(1, 2)

    def _resized(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        tables = []
        for block, rows, columns, of_class in (
            (self.an_bias, self.ah_bias, self.aw_bias, "ac_bias"),
            (self.na_bias, self.ha_bias, self.wa_bias, "ca_bias"),
        ):
            # Rows and columns resize each along their own axis: both have length 1 along the other.
            axes = resize_map(rows[..., None], (size[0], 1)) + resize_map(columns[:, :, None], (1, size[1]))
            table = (resize_map(block, size) + axes).flatten(2)
            if self.class_token:
                table = torch.cat([getattr(self, of_class)[..., None], table], dim=2)
            tables.append(self._regridded(table))
        return tables[0], tables[1]

    def _regridded(self, table: Tensor) -> Tensor:
        """`(heads, agents, tokens)` from the trained grid of agents to the current one."""
        if self.grid == self.agents:
            return table
        return resize_map(table.transpose(1, 2).unflatten(2, self.agents), self.grid).flatten(2).transpose(1, 2)


def agent_attention(
    query: Tensor, agent: Tensor, key: Tensor, value: Tensor, gather_bias: Tensor, spread_bias: Tensor
) -> Tensor:
    """The two softmax attentions alone; scores are scaled by `head_dim ** -0.5` before the biases are added.

    Args:
        query: `(batch, heads, queries, head_dim)`.
        agent: `(batch, heads, agents, head_dim)`.
        key, value: `(batch, heads, keys, head_dim)`.
        gather_bias: `(1 or batch, heads, agents, keys)`.
        spread_bias: `(1 or batch, heads, queries, agents)`.

    Returns:
        `(batch, heads, queries, head_dim)`.
    """
    agent_value = F.scaled_dot_product_attention(agent, key, value, gather_bias)
    return F.scaled_dot_product_attention(query, agent, agent_value, spread_bias)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    if min(rows, columns) < 1:
        raise ValueError(f"{name} must be positive; got {value}")
    return rows, columns
