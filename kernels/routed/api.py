"""The public operators: shapes, argument checks, choice of implementation.

Layout of every map: `(batch, height, width, heads, head_dim)`, any strides. Such tensors may be views of one packed qkv
projection; no copy is needed to call these functions.

A map is cut into `rows x columns` regions of `ceil(height / rows) x ceil(width / columns)` tokens, or of the given
`region_size`. Regions are numbered row by row. If regions extend beyond the map, the tokens there do not exist and are
ignored, or they all have the constant value `fill`.

BiFormer (Zhu et al., CVPR 2023, arXiv 2303.08810), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels import arguments
from hybridzoo.kernels.open_sizes import surely
from hybridzoo.kernels.operators_common import full_precision
from hybridzoo.kernels.routed import operators, torch_impl
from hybridzoo.kernels.routed.grid import Grid


def bi_level_route(
    query: Tensor,
    key: Tensor,
    regions: int | tuple[int, int],
    topk: int,
    *,
    region_size: int | tuple[int, int] | None = None,
    fill: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """For each region of `query`, the `topk` regions of `key` with the most similar mean (largest dot product).

    All heads share one routing. It is discrete, so no gradient flows through it. It is always computed in float32 or
    wider, because rounding would change the order of nearly equal regions.

    Args:
        query: `(batch, height, width, heads, head_dim)`.
        key: same shape as `query`.
        regions: number of regions per axis, `(rows, columns)` or one number for both.
        topk: number of regions kept for each region, `1 <= topk <= rows * columns`.
        region_size: size of a region in tokens, `(height, width)` or one number for both; default the smallest size
            with which the regions cover the map.
        fill: `(2, heads, head_dim)`, query and key of the tokens beyond the map, which are then included in the means.
            Default None: means are taken over the tokens on the map.
        scale: factor on the dot products, default `(heads * head_dim) ** -0.5`. A positive factor does not change the
            choice.

    Returns:
        `(batch, rows * columns, topk)` int64: the regions chosen for each region, in no particular order.

    Raises:
        ValueError: an argument is not valid; the message names it.
        TypeError: an argument that must be a tensor or a number is of another type.
    """
    arguments.token_map("query", query)
    arguments.alike("key", key, query)
    grid = _region_grid(query, regions, region_size, fill)
    count, slots = grid.regions, arguments.whole(topk)
    if slots is None or surely(slots > count):
        raise ValueError(f"topk must be a whole number from 1 to the number of regions, {count}; got {topk!r}")
    scale = arguments.factor("scale", scale, (query.shape[3] * query.shape[4]) ** -0.5)
    if query.is_cuda and count <= operators.ROUTE_MAX_REGIONS and arguments.implementation("auto", query) == "triton":
        with torch.no_grad():
            return operators.bi_level_route(query.detach(), key.detach(), fill, list(grid), slots, scale)
    return torch_impl.route(query, key, fill, grid, slots, scale)


def routed_attention2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    regions: int | tuple[int, int],
    *,
    region_size: int | tuple[int, int] | None = None,
    fill: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every token to all tokens of the regions that its own region is routed to.

    `out[i] = softmax_j(scale * query[i] . key[j]) value[j]`, per head, where `j` runs over the tokens of the regions
    `routes[:, region(i)]`. A region listed twice counts twice; the order of the list does not matter. Differentiable
    once, in reverse mode, with respect to `query`, `key`, `value` and `fill`. Gradients are summed in a fixed order, so
    two runs give the same bits.

    Args:
        query, key, value: `(batch, height, width, heads, head_dim)`, one dtype and device; the batch may be empty.
        routes: `(batch, rows * columns, topk)` int64 region numbers, as `bi_level_route` returns them. On a CPU,
            numbers out of range raise. On a GPU (where a check would have to wait for the device) and in an exported
            program they are not checked, and the result is undefined.
        regions: number of regions per axis, `(rows, columns)` or one number for both.
        region_size: size of a region in tokens, `(height, width)` or one number for both; default the smallest size
            with which the regions cover the map.
        fill: `(2, heads, head_dim)`, any floating dtype: key and value of the tokens beyond the map, which are then
            attended to like the others. Default None: there are no such tokens. If the regions end where the map ends,
            `fill` is not used and its gradient is `None`.
        scale: factor on the scores, default `head_dim ** -0.5`. (BiFormer's weights need `(heads * head_dim) ** -0.5`.)
        impl: `"triton"` (CUDA; on other devices only with `TRITON_INTERPRET=1`), `"torch"` (any device) or `"auto"`:
            Triton on CUDA if it supports the call and dense attention with the routes as a bias is not faster
            (`Grid.crowded`), otherwise torch. With `"triton"`, a call that Triton cannot run raises, for example in
            `torch.export`.

    Returns:
        `(batch, height, width, heads, head_dim)`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: an argument is not valid, or `impl="triton"` cannot run this call; the message names the reason.
        TypeError: an argument that must be a tensor or a number is of another type.
        NotImplementedError: a second or a forward-mode derivative is requested.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import bi_level_route, routed_attention2d
        >>> q, k, v = torch.randn(3, 2, 28, 28, 4, 32)
        >>> routes = bi_level_route(q, k, regions=7, topk=4)
        >>> routed_attention2d(q, k, v, routes, regions=7).shape
        torch.Size([2, 28, 28, 4, 32])
    """
    arguments.token_map("query", query)
    arguments.alike("key", key, query)
    arguments.alike("value", value, query)
    grid = _region_grid(query, regions, region_size, fill)
    arguments.tensor("routes", routes)
    count = grid.regions
    if routes.ndim != 3 or routes.shape[:2] != (query.shape[0], count) or routes.shape[2] < 1:
        raise ValueError(
            f"routes must have shape (batch={query.shape[0]}, regions={count}, topk >= 1); got {tuple(routes.shape)}"
        )
    if routes.dtype != torch.int64 or routes.device != query.device:
        raise ValueError(f"routes must be int64 region numbers, on {query.device}; got {routes.dtype}, {routes.device}")
    scale = arguments.factor("scale", scale, query.shape[4] ** -0.5)
    impl = _implementation(impl, query, routes, grid)
    if fill is not None and grid.ends_with(query):
        fill = None  # nothing carries it
    if arguments.exporting():
        with full_precision(query):
            return torch_impl.forward(query, key, value, routes, fill, grid, scale)
    return operators.attend(query, key, value, routes, fill, list(grid), scale, impl)[0]


def _implementation(impl: str, query: Tensor, routes: Tensor, grid: Grid) -> str:
    """`"triton"` or `"torch"`. On a crowded map, attention region by region is not faster than dense attention."""
    chosen = arguments.implementation(impl, query)
    if impl == "auto" and chosen == "triton" and torch_impl.prefers_dense(query, routes):
        from hybridzoo.kernels.routed import triton_impl  # only when used: Triton is slow to import

        topk = routes.shape[2]
        if grid.crowded(topk) and not triton_impl.small(query, grid, topk):
            return "torch"
    return chosen


def _region_grid(
    query: Tensor, regions: int | tuple[int, int], region_size: int | tuple[int, int] | None, fill: Tensor | None
) -> Grid:
    """The grid. It must cover the map; without `fill`, every region must contain at least one token of the map."""
    rows, columns = arguments.pair("regions", regions)
    grid = Grid.of(query, rows, columns)
    if region_size is not None:
        height, width = arguments.pair("region_size", region_size, "height, width")
        grid = grid._replace(height=height, width=width)
        if any(surely(beyond < 0) for beyond in grid.beyond(query)):
            raise ValueError(
                f"region_size={region_size} must be large enough for {rows} x {columns} regions to cover the map of"
                f" {query.shape[1]} x {query.shape[2]} tokens"
            )
    if fill is not None:
        arguments.table("fill", fill, query, "2, heads, head_dim", (2, *query.shape[3:]))
        return grid
    beyond = grid.beyond(query)
    for axis, out, size, length in (("height", beyond[0], grid.height, 1), ("width", beyond[1], grid.width, 2)):
        if surely(out >= size):
            raise ValueError(
                f"regions={regions} leaves a region without tokens on a map of {axis} {query.shape[length]}; use fewer"
            )
    return grid
