"""Routed attention on the GPU: which kernels run, on which tiles, with which configuration.

Tensors are `(batch, height, width, heads, head_dim)`; launches are those of `triton_common`. Tiny regions leave most
rows of the smallest block of queries empty. Where the routes then make as many products as attending to the whole map
would, that is what the kernels do (the dense form, see `triton_regions`): every key is read once instead of many times.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from hybridzoo.kernels.routed import triton_backward, triton_configs, triton_forward, triton_regions
from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.kernels.triton_common import Config, Launch, launch, same_strides, sizes

SMALLEST_BLOCK = 16  # what a product on tensor cores takes
DENSE_MAX_TOKENS = 1024


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
    launches, common = _common(query, key, value, routes, fill, grid, scale)
    common |= dict(out=out, lse=lse)
    return [*launches, _tiled("forward", triton_forward.forward, common, query, grid)]


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
    launches, common = _common(query, key, value, routes, fill, grid, scale)
    common |= dict(grad=grad, out=out, lse=lse, delta=torch.empty_like(lse), dquery=dquery, dkey=dkey, dvalue=dvalue)
    by_query = _tiled("backward_query", triton_backward.backward_query, common | dict(partial=lse), query, grid)
    partial = None
    if fill is not None:
        heads, head_dim = query.shape[3:]
        partial = lse.new_empty(by_query.programs // heads, heads, 2, head_dim)
        by_query.arguments.update(partial=partial)
    listing, starts = (routes, routes) if common["DENSE"] else invert(routes)
    common |= dict(listing=listing, starts=starts)
    return [*launches, by_query, _tiled("backward_key", triton_backward.backward_key, common, query, grid)], partial


def invert(routes: Tensor) -> tuple[Tensor, Tensor]:
    """For every region, the regions that list it, once for each time, as an index in compressed rows, per image.

    `listing` `(batch, regions * topk)` and `starts` `(batch, regions + 1)`, both int32: region `r` is listed by
    `listing[b, starts[b, r] : starts[b, r + 1]]`, in ascending order. Nothing waits for the GPU.
    """
    batch, regions, topk = routes.shape
    listed, order = torch.sort(routes.reshape(batch, -1), stable=True)
    numbers = torch.arange(regions + 1, device=routes.device).expand(batch, -1).contiguous()
    return (order // topk).int(), torch.searchsorted(listed, numbers, out_int32=True)


def _common(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, fill: Tensor | None, grid: Grid, scale: float
) -> tuple[list[Launch], dict[str, Any]]:
    """Arguments of all kernels, and the launch that must come before any of them, where there is one."""
    routes = routes.contiguous()
    tensors = same_strides(query, key, value)
    topk, dense = routes.shape[2], _dense(grid, routes.shape[2])
    counts = beyond = query  # pointers that nobody reads
    launches = []
    if dense:
        counts = torch.empty(query.shape[0], grid.regions, grid.regions, dtype=torch.float32, device=query.device)
        arguments = dict(routes=routes, counts=counts, regions=grid.regions, topk=topk)
        arguments |= dict(BLOCK=triton.next_power_of_2(grid.regions))
        kernel, config = triton_regions.count_routes, Config(0, 0, 1, 1)
        launches.append(launch(kernel, query.shape[0] * grid.regions, arguments, config))
    if fill is not None:
        beyond = (grid.tokens - grid.tokens_on(query)).float()[routes].sum(2)
    arguments = tensors | dict(sizes(tensors["query"]), routes=routes, counts=counts, scale=scale, topk=topk)
    arguments |= dict(fill=query if fill is None else fill.contiguous(), beyond=beyond, FILL=fill is not None)
    arguments |= dict(
        regions=grid.regions, columns=grid.columns, region_h=grid.height, region_w=grid.width, DENSE=dense
    )
    return launches, arguments


def _dense(grid: Grid, topk: int) -> bool:
    """Whether the routes, with the rows that their blocks leave empty, cost as many products as the whole map."""
    rows = math.ceil(grid.tokens / SMALLEST_BLOCK) * SMALLEST_BLOCK
    tokens = grid.regions * grid.tokens
    return tokens <= DENSE_MAX_TOKENS and topk * rows > tokens


def _tiled(kind: str, kernel: Any, arguments: dict[str, Any], query: Tensor, grid: Grid) -> Launch:
    batch, _, _, heads, _ = query.shape
    own = "keys" if kind == "backward_key" else "queries"
    table_kind = f"{kind}_dense" if arguments["DENSE"] else kind
    shape = f"{grid.regions} regions of {grid.tokens}, top {arguments['topk']}"
    config = triton_configs.pick(table_kind, arguments["BLOCK_D"], query.element_size(), shape, query.device)
    groups, members = (1, grid.regions * grid.tokens) if arguments["DENSE"] else (grid.regions, grid.tokens)
    listed = members if arguments["DENSE"] else arguments["topk"] * members
    config = _fitted(config, members, listed, own)
    tiles = math.ceil(members / getattr(config, own))
    arguments = arguments | dict(groups=groups, tiles=tiles, QUERIES=config.queries, KEYS=config.keys)
    return launch(kernel, heads * tiles * groups * batch, arguments, config)


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
    blocks[other] = min(blocks[other], 2 * blocks[own], max(SMALLEST_BLOCK, triton.next_power_of_2(listed)))
    share = config.queries * config.keys // (blocks["queries"] * blocks["keys"])
    return replace(config, **blocks, warps=max(2, config.warps // share))
