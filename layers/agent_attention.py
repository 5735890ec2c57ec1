"""Agent attention ("Agent Attention", Han et al., ECCV 2024, arXiv 2312.08874, section 3), as a layer on tokens.

A few agent tokens, pooled from the queries, gather the values by softmax attention and hand them to the queries by a
second one: two attentions of N x A instead of one of N x N.

No kernel of its own: on an H200 (bf16, 128 images of 224 px, Swin-T's first stage) the two attentions' products take,
by arithmetic, 3 us, the linear layers around them 30 us and every pass over the map 16 us. Without queries and keys the
layer makes about 13 such passes, a fused one 5: in all stages together less than a tenth of the network's forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from hybridzoo.layers.eval_cache import EvalCache
from hybridzoo.layers.heads import add_product, merge_heads, softmax_attention, split_heads
from hybridzoo.layers.linear import Linear, is_plain, linear_rows
from hybridzoo.layers.resize import adaptive_pool, resize_map
from hybridzoo.layers.slicing import lean, watched

COARSE = 7  # side of the block biases `an_bias` and `na_bias`, whatever the map
UNPROJECTED_BELOW = 1.0  # of the work it replaces; measured on a CPU, see benchmarks/linear_attention_families.py


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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = Linear(dim, dim)
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
        unprojected = is_plain(self.qkv) and self.skips_projection(size)
        return self.proj(self._unprojected(x, size) if unprojected else self._projected(x, size))

    def biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Tables for a map of this size and the current grid, each `(heads, agents, tokens)`.

        The first is added to the scores of agents (as queries) and tokens (as keys), the second to those of tokens (as
        queries) and agents (as keys). In evaluation they are kept, see `EvalCache`.
        """
        spread, gather = self._tables(size)
        return gather, spread

    def skips_projection(self, size: tuple[int, int]) -> bool:
        """Whether few enough agents look at a map of this size that queries and keys need not be formed.

        Agents times queries is agents times query weights times tokens: with fewer agents than channels, the first
        product is the small one. Compares the multiplications that differ, an image.
        """
        dim, tokens, agents = self.proj.in_features, size[0] * size[1], self.grid[0] * self.grid[1]
        unprojected = self.num_heads * agents * (4 * tokens + 2 * dim // self.num_heads)
        return unprojected < UNPROJECTED_BELOW * tokens * (2 * dim + 4 * agents)

    def _projected(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attention as the paper writes it, and the convolution: `(batch, tokens, dim)`."""
        if lean(x):  # values for themselves, which the convolution wants dense
            query, key = self._project(x, 0, 2).chunk(2, dim=-1)
            value = self._project(x, 2, 3)
        else:
            query, key, value = self.qkv(x).chunk(3, dim=-1)
        agent = self._pool(query, size)
        q, a, k, v = (split_heads(t, self.num_heads) for t in (query, agent, key, value))
        form = ("attention", tuple(size), self.grid)
        gather_bias, spread_bias = self.cached(form, lambda: self._attention_biases(size))
        out = agent_attention(q, a, k, v, gather_bias.to(value.dtype), spread_bias.to(value.dtype))
        if not lean(x):
            return merge_heads(out) + self._local(value, size)
        out = merge_heads(out)
        out[:, int(self.class_token) :] += self._convolved(value, size)
        return out

    def _unprojected(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The same numbers without queries and keys; scores are agent-major, so that both softmaxes run over rows."""
        dim, heads = x.shape[-1], self.num_heads
        value = self._project(x, 2, 3)
        # Pooling commutes with the projection.
        agent = split_heads(self._project(self._pool(x, size), 0, 1), heads)[:, None] * (dim // heads) ** -0.5
        # What the agents of all heads look for in the tokens themselves, as keys of queries and as queries of keys.
        probe = agent @ self.qkv.weight[: 2 * dim].unflatten(0, (2, heads, -1))  # (batch, 2, heads, agents, dim)
        bias = self.qkv.weight.new_zeros(2 * dim) if self.qkv.bias is None else self.qkv.bias[: 2 * dim]
        tables = self._tables(size) + agent @ bias.view(2, heads, -1, 1)
        scores = add_product(tables.flatten(1, 3), probe.flatten(1, 3), x.mT)
        spread, gather = scores.unflatten(1, probe.shape[1:4]).unbind(1)
        spread, gather = spread.softmax(2).to(value.dtype), gather.softmax(-1).to(value.dtype)
        # All heads in one product, of which the blocks on the diagonal count: cheaper than to set the heads apart.
        agent_value = (gather.flatten(1, 2) @ value).view(x.shape[0], heads, agent.shape[3], heads, dim // heads)
        blocks = agent_value * torch.eye(heads, dtype=value.dtype, device=x.device)[:, None, :, None]
        mixing, keep = blocks.flatten(3).flatten(1, 2), watched(self.dwc)
        return add_product(self._local(value, size), spread.flatten(1, 2).mT, mixing, keep=keep)

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Of queries (0), keys (1) and values (2), those from `start` to before `stop`."""
        return linear_rows(self.qkv, x, start * x.shape[-1], stop * x.shape[-1])

    def _local(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        """The convolution of the values, `(batch, tokens, dim)`; zero for the class token."""
        local = self._convolved(value, size)
        return F.pad(local, (0, 0, 1, 0)) if self.class_token else local

    def _convolved(self, value: Tensor, size: tuple[int, int]) -> Tensor:
        maps = value[:, int(self.class_token) :].unflatten(1, size)
        return self.dwc(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)

    def _pool(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return adaptive_pool(x[:, int(self.class_token) :].unflatten(1, size), self.grid).flatten(1, 2)

    def _tables(self, size: tuple[int, int]) -> Tensor:
        """`(2, heads, agents, tokens)`: for the queries, for the keys."""
        return self.cached(("tables", tuple(size), self.grid), lambda: torch.stack(self._resized(size)))

    def _attention_biases(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """For `agent_attention`, as it reads them."""
        spread, gather = self._resized(size)
        return gather[None], spread.mT.contiguous()[None]

    def _resized(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """For the queries and for the keys, each `(heads, agents, tokens)`."""
        tables = []
        for block, rows, columns, of_class in (
            (self.na_bias, self.ha_bias, self.wa_bias, "ca_bias"),
            (self.an_bias, self.ah_bias, self.aw_bias, "ac_bias"),
        ):
            # First the agents, which commutes: the tables are small until they get the map's size.
            coarse, along_rows, along_columns = (self._regridded(t.flatten(2)) for t in (block, rows, columns))
            # Rows and columns resize each along their own axis: both have length 1 along the other. What is added
            # before the columns are resized, whose weights sum to one, is the same after it.
            table = resize_map(coarse.unflatten(2, (COARSE, COARSE)), (size[0], COARSE))
            table = resize_map(table + resize_map(along_rows[..., None], (size[0], 1)), size)
            table = (table + resize_map(along_columns[:, :, None], (1, size[1]))).flatten(2)
            if self.class_token:
                table = torch.cat([self._regridded(getattr(self, of_class)[..., None]), table], dim=2)
            tables.append(table)
        return tables[0], tables[1]

    def _regridded(self, table: Tensor) -> Tensor:
        """`(heads, agents, entries)` from the trained grid of agents to the current one."""
        if self.grid == self.agents:
            return table
        return resize_map(table.mT.unflatten(2, self.agents), self.grid).flatten(2).mT


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
    return softmax_attention(query, agent, softmax_attention(agent, key, value, gather_bias), spread_bias)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    if min(rows, columns) < 1:
        raise ValueError(f"{name} must be positive; got {value}")
    return rows, columns
