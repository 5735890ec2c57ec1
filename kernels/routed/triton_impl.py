"""Routed attention on the GPU: which kernels run, on which tiles, with which configuration.

Tensors are `(batch, height, width, heads, head_dim)`; launches are those of `triton_common`. `triton_kernels`
describes the two forms and their cost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hybridzoo.kernels import tuning
from hybridzoo.kernels.routed import triton_configs, triton_kernels
from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.kernels.triton_common import Launch, Recipe, precision, same_strides
from hybridzoo.kernels.tuning import Config

SMALLEST_BLOCK = 16  # rows of a product on tensor cores
USUAL_SIDES = {1, 2, 4, 8, 16}  # sides of regions, in tokens
APART_COSTS = 1.2  # times as many blocks at most, for blocks of one region each
INVERSION_BLOCK = 256  # routes read at a time
# Limits of the registers: tokens, padded head_dim, bytes of a number.
SMALL_MAX_TOKENS, SMALL_MAX_WIDTH, SINGLE_MAX_TOKENS, SINGLE_MAX_WIDTH, ITEMSIZES = 256, 32, 64, 64, (2,)


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores, `(batch, height, width, heads)` in float32, for `backward`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    if query.numel():
        with torch.cuda.device_of(query):
            forward_launch(query, key, value, routes, fill, out, lse, grid, scale).run()
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: Grid,
    scale: float,
    want_fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and fill, each in the dtype of its input; None for fill if it is not needed."""
    dquery, dkey, dvalue = (query.new_empty(query.shape) for _ in range(3))
    if not query.numel():
        return dquery, dkey, dvalue, torch.zeros_like(fill) if fill is not None and want_fill else None
    with torch.cuda.device_of(query):
        launches, partial = backward_launches(
            grad.contiguous(), query, key, value, routes, fill, out, lse, dquery, dkey, dvalue, grid, scale
        )
        for one in launches:
            one.run()
    if fill is None or partial is None or not want_fill:  # the kernel writes the small parts in any case
        return dquery, dkey, dvalue, None
    return dquery, dkey, dvalue, partial.sum(0).transpose(0, 1).to(fill.dtype).contiguous()


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: Grid,
    scale: float,
) -> Launch:
    tensors = _tensors(query, key, value, routes, fill) | dict(out=out, lse=lse)
    return _forward_recipe(_call(tensors["query"], fill, grid, routes.shape[2], scale)).launch(tensors)


def backward_launches(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    grid: Grid,
    scale: float,
) -> tuple[list[Launch], Tensor | None]:
    """The kernels of the backward pass in order, and the parts `(n, heads, 2, head_dim)` of the gradient of fill."""
    tensors = _tensors(query, key, value, routes, fill) | dict(
        grad=grad, out=out, lse=lse, dquery=dquery, dkey=dkey, dvalue=dvalue, partial=lse
    )
    recipes, parts = _backward_recipes(_call(tensors["query"], fill, grid, routes.shape[2], scale))
    if parts:
        tensors["partial"] = lse.new_empty(parts, query.shape[3], 2, query.shape[4])
    if len(recipes) > 1:
        batch, regions, topk = routes.shape
        tensors["listing"] = torch.empty(batch, regions * topk, dtype=torch.int32, device=query.device)
        tensors["starts"] = torch.empty(batch, regions + 1, dtype=torch.int32, device=query.device)
        tensors["delta"] = torch.empty_like(lse)
    return [recipe.launch(tensors) for recipe in recipes], tensors["partial"] if parts else None


def route(query: Tensor, key: Tensor, fill: Tensor | None, grid: Grid, topk: int, scale: float) -> Tensor:
    """See `api.bi_level_route`. Among equal regions, those with the smaller numbers are chosen."""
    routes = torch.empty(query.shape[0], grid.regions, topk, dtype=torch.int64, device=query.device)
    if routes.numel():
        with torch.cuda.device_of(query):
            for one in route_launches(query, key, fill, routes, grid, scale):
                one.run()
    return routes


def route_launches(
    query: Tensor, key: Tensor, fill: Tensor | None, routes: Tensor, grid: Grid, scale: float
) -> list[Launch]:
    """Two kernels: the means of all regions, and the choice of regions."""
    batch, _, _, heads, head_dim = query.shape
    means = torch.empty(batch, 2, grid.regions, heads * head_dim, dtype=torch.float32, device=query.device)
    tensors = _tensors(query, key, key, routes, fill) | dict(means=means)
    recipes = _route_recipes(_call(tensors["query"], fill, grid, routes.shape[2], scale))
    return [recipe.launch(tensors) for recipe in recipes]


def small(query: Tensor, grid: Grid, topk: int) -> bool:
    """Whether the small form is used for such a map."""
    return _call(query, None, grid, topk, 1.0).small


def _tensors(query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None) -> dict[str, Tensor]:
    """The tensors that all kernels read. Without fill, `query` is passed as a placeholder that is not read."""
    others = dict(routes=routes.contiguous(), fill=query if fill is None else fill.contiguous())
    return same_strides(query, key, value) | others


class _Call(NamedTuple):
    """Everything that the launches of a call depend on."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    device: torch.device
    grid: Grid
    topk: int
    scale: float
    fill: bool
    precision: str

    @property
    def block_d(self) -> int:
        return triton.next_power_of_2(self.shape[4])

    @property
    def exact(self) -> bool:
        """Whether the regions end exactly where the map ends."""
        return self.shape[1:3] == (self.grid.rows * self.grid.height, self.grid.columns * self.grid.width)

    @property
    def small(self) -> bool:
        """Whether to use the small form, which holds a bit for each region and all queries of a head at once."""
        narrow = self.block_d <= SMALL_MAX_WIDTH and self.itemsize in ITEMSIZES
        fits = self.grid.regions <= 64 and self.grid.regions * self.grid.tokens <= SMALL_MAX_TOKENS
        return narrow and fits and self.grid.crowded(self.topk)

    @property
    def single(self) -> bool:
        """Whether one backward pass is enough for the listed form, with all keys of a region at once."""
        narrow = self.block_d <= SINGLE_MAX_WIDTH and self.itemsize in ITEMSIZES
        return narrow and self.topk == 1 and not self.fill and self.grid.tokens <= SINGLE_MAX_TOKENS


def _call(query: Tensor, fill: Tensor | None, grid: Grid, topk: int, scale: float) -> _Call:
    shape, strides = tuple(query.shape), query.stride()
    where = query.element_size(), query.device, grid, topk, scale, fill is not None
    return _Call(shape, strides, *where, precision(query))


@tuning.plan
def _forward_recipe(call: _Call) -> Recipe:
    return _small("forward_small", call) if call.small else _tiled("forward", call)


@tuning.plan
def _backward_recipes(call: _Call) -> tuple[list[Recipe], int]:
    """The kernels in order, and the number of parts of the gradient of fill for each head."""
    if call.small:
        recipes = [_small("backward_small", call)]
    elif call.single:
        recipes = [_inversion(call), _tiled("backward_single", call)]
    else:
        recipes = [_tiled("backward_query", call), _inversion(call), _tiled("backward_key", call)]
    return recipes, recipes[0].programs // call.shape[3] if call.fill else 0


@tuning.plan
def _route_recipes(call: _Call) -> list[Recipe]:
    batch, _, _, heads, head_dim = call.shape
    regions, keys = call.grid.regions, max(SMALLEST_BLOCK, triton.next_power_of_2(call.grid.regions))
    many = keys > 64
    tiles = math.ceil(regions / SMALLEST_BLOCK)
    arguments = _sizes(call) | dict(
        channels=heads * head_dim, tiles=tiles, QUERIES=SMALLEST_BLOCK, KEYS=keys, CHANNELS=32 if many else 64,
        TOKENS=min(64, triton.next_power_of_2(call.grid.tokens)),
    )  # fmt: skip
    programs = batch * regions * 2 * heads
    warps = 2 if arguments["TOKENS"] > 16 else 1
    means = Recipe.of(triton_kernels.region_means, programs, arguments, Config(0, 0, warps, 1))
    config = Config(0, 0, 8 if many else 4, 1)
    choice = Recipe.of(triton_kernels.choose_regions, batch * tiles, arguments, config)
    return [means, choice]


def _inversion(call: _Call) -> Recipe:
    regions, topk = call.grid.regions, call.topk
    block = min(INVERSION_BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(regions * topk)))
    arguments = dict(regions=regions, topk=topk, BLOCK=block)
    return Recipe.of(triton_kernels.invert_routes, call.shape[0] * regions, arguments, Config(0, 0, 1, 1))


def _sizes(call: _Call) -> dict[str, Any]:
    """The arguments that all kernels take."""
    _, height, width, heads, head_dim = call.shape
    grid = call.grid
    return dict(zip(("stride_b", "stride_h", "stride_w", "stride_n"), call.strides, strict=False)) | dict(
        scale=call.scale, NEGATIVE=call.scale < 0, heads=heads, height=height, width=width, topk=call.topk,
        regions=grid.regions, columns=grid.columns, region_h=grid.height, region_w=grid.width,
        HEAD_DIM=head_dim, BLOCK_D=call.block_d, EXACT=call.exact, FILL=call.fill, PRECISION=call.precision,
    )  # fmt: skip


def _pick(kind: str, call: _Call) -> Config:
    shape = f"{call.grid.regions} regions of {call.grid.tokens}, top {call.topk}"
    return triton_configs.pick(kind, call.block_d, call.itemsize, shape, call.device)


def _tiled(kind: str, call: _Call) -> Recipe:
    grid, config = call.grid, _pick(kind, call)
    own = "queries" if kind in ("forward", "backward_query") else "keys"
    if kind == "backward_single":
        keys = max(SMALLEST_BLOCK, triton.next_power_of_2(grid.tokens))
        config = replace(config, keys=keys, queries=min(config.queries, keys))
    else:
        least = 1 if call.block_d <= 32 and call.itemsize == 2 else 2  # warps that a small tile needs
        config = _fitted(config, grid.tokens, call.topk * grid.tokens, own, least)
    tiles = math.ceil(grid.tokens / getattr(config, own))
    # If a region's sides are powers of two (networks at their usual sizes), they become constants of the kernel.
    usual = {grid.height, grid.width} <= USUAL_SIDES
    # A region is listed by any number of others.
    listed, block = (grid.regions, config.queries) if own == "keys" else (call.topk, config.keys)
    arguments = _sizes(call) | dict(
        tiles=tiles, QUERIES=config.queries, KEYS=config.keys, TOPK=call.topk if usual else 0,
        REGION_H=grid.height if usual else 0, REGION_W=grid.width if usual else 0,
        APART=_apart(grid.tokens, listed, block),
    )  # fmt: skip
    programs = call.shape[3] * tiles * grid.regions * call.shape[0]
    return Recipe.of(getattr(triton_kernels, kind), programs, arguments, config)


def _small(kind: str, call: _Call) -> Recipe:
    grid, config = call.grid, _pick(kind, call)
    tokens = grid.regions * grid.tokens
    all_tokens = max(SMALLEST_BLOCK, triton.next_power_of_2(tokens))
    queries = all_tokens if kind == "backward_small" else min(config.queries, all_tokens)
    tiles = math.ceil(tokens / queries)
    filled = kind == "backward_small" and call.fill  # the gradient of the fill takes registers too
    keys = min(SMALLEST_BLOCK if filled else config.keys, all_tokens)
    while keys > 32 and (grid.tokens - 1 + keys - 1) // grid.tokens > 31:  # a block may overlap 32 regions at most
        keys //= 2
    # A smaller block for the remaining keys, if it saves at least half a block.
    last = max(SMALLEST_BLOCK, triton.next_power_of_2(tokens % keys))
    last = last if tokens % keys and last <= keys // 2 else 0
    arguments = _sizes(call) | dict(
        tiles=tiles, QUERIES=queries, KEYS=keys, LAST=last, SLOTS=triton.next_power_of_2(call.topk),
        REGIONS=grid.regions, COLUMNS=grid.columns, REGION_H=grid.height, REGION_W=grid.width,
    )  # fmt: skip
    return Recipe.of(getattr(triton_kernels, kind), call.shape[3] * tiles * call.shape[0], arguments, config)


def _apart(tokens: int, listed: int, block: int) -> bool:
    """Whether blocks of one region each are few more than blocks of all listed tokens in a row: positions in them take
    half the arithmetic."""
    return listed * math.ceil(tokens / block) <= APART_COSTS * math.ceil(listed * tokens / block)


def _fitted(config: Config, members: int, listed: int, own: str, least: int) -> Config:
    """`config` with blocks no larger than needed for `members` tokens in tiles and `listed` tokens for each tile.

    `own` is the side that is cut into tiles, `"queries"` or `"keys"`. Smaller blocks get fewer warps, but at least
    `least`.
    """
    blocks = dict(queries=config.queries, keys=config.keys)
    other = "keys" if own == "queries" else "queries"
    # Minimize the computed rows, plus a share for what every tile reads again; if equal, take the larger block.
    sizes = [size for size in (128, 64, 32, 16) if size <= blocks[own]]
    blocks[own] = min(sizes, key=lambda size: math.ceil(members / size) * (size + SMALLEST_BLOCK))
    # Not longer than the list. With a small tile, at most twice as long: few threads have few registers.
    all_listed = max(SMALLEST_BLOCK, triton.next_power_of_2(listed))
    most = 4 if all_listed <= 4 * blocks[own] else 2  # a list that fits into one block needs no loop
    blocks[other] = min(blocks[other], most * blocks[own], all_listed)
    share = config.queries * config.keys // (blocks["queries"] * blocks["keys"])
    return replace(config, **blocks, warps=max(least, config.warps // share))
