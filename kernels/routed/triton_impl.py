"""Routed attention on the GPU: which kernels run, on which tiles, with which configuration.

Tensors are `(batch, height, width, heads, head_dim)`; launches are those of `triton_common`. What the two forms are,
and what they cost, is said in `triton_kernels`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.routed import triton_configs, triton_kernels
from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.kernels.triton_common import Config, Launch, launch, same_strides, sizes

SMALLEST_BLOCK = 16  # what a product on tensor cores takes
USUAL_SIDES = {1, 2, 4, 8, 16}  # of regions, in tokens
INVERSION_BLOCK = 256  # routes looked at at once
# What fits into registers: tokens, padded head_dim, bytes of a number.
SMALL_MAX_TOKENS, SMALL_MAX_WIDTH, SINGLE_MAX_TOKENS, SINGLE_MAX_WIDTH, ITEMSIZES = 256, 32, 64, 64, (2,)


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores, `(batch, height, width, heads)` in float32, for `backward`."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:4], dtype=torch.float32)
    if query.numel():
        with torch.cuda.device_of(query):
            for one in forward_launches(query, key, value, routes, fill, out, lse, grid, scale):
                one.run()
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
    """Gradients of query, key, value and fill, each in the dtype of its own; None for fill where it is not wanted."""
    dquery, dkey, dvalue = (query.new_empty(query.shape) for _ in range(3))
    if not query.numel():
        return dquery, dkey, dvalue, torch.zeros_like(fill) if fill is not None and want_fill else None
    with torch.cuda.device_of(query):
        launches, partial = backward_launches(
            grad.contiguous(), query, key, value, routes, fill, out, lse, dquery, dkey, dvalue, grid, scale
        )
        for one in launches:
            one.run()
    if fill is None or partial is None or not want_fill:  # a sum of few small parts: the kernel leaves them anyway
        return dquery, dkey, dvalue, None
    return dquery, dkey, dvalue, partial.sum(0).transpose(0, 1).to(fill.dtype).contiguous()


def forward_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: Grid,
    scale: float,
) -> list[Launch]:
    """The kernels of the forward pass in order."""
    common = _common(query, key, value, routes, fill, grid, scale) | dict(out=out, lse=lse)
    if small(query, grid, routes.shape[2]):
        return [_small("forward_small", triton_kernels.forward_small, common, query, grid)]
    return [_tiled("forward", triton_kernels.forward, common, query, grid)]


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
    """The kernels of the backward pass in order, and the parts, `(n, heads, 2, head_dim)`, of the fill's gradient."""
    common = _common(query, key, value, routes, fill, grid, scale)
    common |= dict(grad=grad, out=out, lse=lse, dquery=dquery, dkey=dkey, dvalue=dvalue, partial=lse)
    if small(query, grid, routes.shape[2]):
        first = _small("backward_small", triton_kernels.backward_small, common, query, grid)
        launches = [first]
    elif single(query, fill, grid, routes.shape[2]):
        inversion, listing, starts = inversion_launch(common["routes"])
        first = _tiled(
            "backward_single",
            triton_kernels.backward_single,
            common | dict(listing=listing, starts=starts),
            query,
            grid,
        )
        launches = [inversion, first]
    else:
        inversion, listing, starts = inversion_launch(common["routes"])
        common |= dict(delta=torch.empty_like(lse), listing=listing, starts=starts)
        first = _tiled("backward_query", triton_kernels.backward_query, common, query, grid)
        launches = [inversion, first, _tiled("backward_key", triton_kernels.backward_key, common, query, grid)]
    partial = None
    if fill is not None:
        heads, head_dim = query.shape[3:]
        partial = lse.new_empty(first.programs // heads, heads, 2, head_dim)
        first.arguments.update(partial=partial)
    return launches, partial


def inversion_launch(routes: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """What makes, for every region, a list of the regions that list it, an index in compressed rows per image.

    `listing` `(batch, regions * topk)` and `starts` `(batch, regions + 1)`, both int32: region `r` is listed by
    `listing[b, starts[b, r] : starts[b, r + 1]]`, in ascending order, once for each time.
    """
    batch, regions, topk = routes.shape
    listing = torch.empty(batch, regions * topk, dtype=torch.int32, device=routes.device)
    starts = torch.empty(batch, regions + 1, dtype=torch.int32, device=routes.device)
    arguments = dict(routes=routes, listing=listing, starts=starts, regions=regions, topk=topk)
    arguments |= dict(BLOCK=min(INVERSION_BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(regions * topk))))
    return launch(triton_kernels.invert_routes, batch * regions, arguments, Config(0, 0, 1, 1)), listing, starts


def small(query: Tensor, grid: Grid, topk: int) -> bool:
    """Whether the small form runs, which holds a bit for every region, and all queries of a head at once."""
    narrow = triton.next_power_of_2(query.shape[4]) <= SMALL_MAX_WIDTH and query.element_size() in ITEMSIZES
    fits = grid.regions <= 64 and grid.regions * grid.tokens <= SMALL_MAX_TOKENS
    return narrow and fits and grid.crowded(topk)


def single(query: Tensor, fill: Tensor | None, grid: Grid, topk: int) -> bool:
    """Whether one pass backward serves the listed form, with all keys of a region at once."""
    narrow = triton.next_power_of_2(query.shape[4]) <= SINGLE_MAX_WIDTH and query.element_size() in ITEMSIZES
    return narrow and topk == 1 and fill is None and grid.tokens <= SINGLE_MAX_TOKENS


def _common(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> dict[str, Any]:
    """Arguments of all kernels."""
    tensors = same_strides(query, key, value)
    arguments = tensors | dict(sizes(tensors["query"]), routes=routes.contiguous(), scale=scale, topk=routes.shape[2])
    return arguments | dict(fill=query if fill is None else fill.contiguous(), FILL=fill is not None)


def _tiled(kind: str, kernel: Any, arguments: dict[str, Any], query: Tensor, grid: Grid) -> Launch:
    batch, _, _, heads, _ = query.shape
    own = "queries" if kind in ("forward", "backward_query") else "keys"
    shape = f"{grid.regions} regions of {grid.tokens}, top {arguments['topk']}"
    config = triton_configs.pick(kind, arguments["BLOCK_D"], query.element_size(), shape, query.device)
    if kind == "backward_single":
        config = replace(config, keys=max(SMALLEST_BLOCK, triton.next_power_of_2(grid.tokens)))
        config = replace(config, queries=min(config.queries, config.keys))
    else:
        config = _fitted(config, grid.tokens, arguments["topk"] * grid.tokens, own)
    tiles = math.ceil(grid.tokens / getattr(config, own))
    # Where a region's sides are powers of two, as in networks at their usual sizes, they are constants of the kernel.
    usual = {grid.height, grid.width} <= USUAL_SIDES
    arguments = arguments | dict(
        regions=grid.regions, columns=grid.columns, region_h=grid.height, region_w=grid.width, tiles=tiles,
        REGION_H=grid.height if usual else 0, REGION_W=grid.width if usual else 0,
        TOPK=arguments["topk"] if usual else 0, EXACT=not any(grid.beyond(query)),
        QUERIES=config.queries, KEYS=config.keys,
    )  # fmt: skip
    return launch(kernel, heads * tiles * grid.regions * batch, arguments, config)


def _small(kind: str, kernel: Any, arguments: dict[str, Any], query: Tensor, grid: Grid) -> Launch:
    batch, _, _, heads, _ = query.shape
    shape = f"{grid.regions} regions of {grid.tokens}, top {arguments['topk']}"
    config = triton_configs.pick(kind, arguments["BLOCK_D"], query.element_size(), shape, query.device)
    tokens = grid.regions * grid.tokens
    all_tokens = max(SMALLEST_BLOCK, triton.next_power_of_2(tokens))
    queries = all_tokens if kind == "backward_small" else min(config.queries, all_tokens)
    tiles = math.ceil(tokens / queries)
    keys = min(config.keys, all_tokens)
    while keys > 32 and (grid.tokens - 1 + keys - 1) // grid.tokens > 31:  # a block may reach into 32 regions
        keys //= 2
    arguments = arguments | dict(
        REGIONS=grid.regions, COLUMNS=grid.columns, REGION_H=grid.height, REGION_W=grid.width, tiles=tiles,
        QUERIES=queries, KEYS=keys, EXACT=not any(grid.beyond(query)),
    )  # fmt: skip
    return launch(kernel, heads * tiles * batch, arguments, config)


def _fitted(config: Config, members: int, listed: int, own: str) -> Config:
    """`config` with blocks no larger than what there is to do: `members` tokens in tiles, `listed` for each of them.

    `own` is the side that is cut into tiles, `"queries"` or `"keys"`.
    """
    blocks = dict(queries=config.queries, keys=config.keys)
    other = "keys" if own == "queries" else "queries"
    # Rows computed, times a share for what every tile reads again; the larger block where equal.
    sizes = [size for size in (128, 64, 32, 16) if size <= blocks[own]]
    blocks[own] = min(sizes, key=lambda size: math.ceil(members / size) * (size + SMALLEST_BLOCK))
    # No longer than the list, and with a small tile no more than twice as long: it takes registers, and few threads.
    all_listed = max(SMALLEST_BLOCK, triton.next_power_of_2(listed))
    most = 4 if all_listed <= 4 * blocks[own] else 2  # a list in one block needs no loop
    blocks[other] = min(blocks[other], most * blocks[own], all_listed)
    share = config.queries * config.keys // (blocks["queries"] * blocks["keys"])
    return replace(config, **blocks, warps=max(2, config.warps // share))
