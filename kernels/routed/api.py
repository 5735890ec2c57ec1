"""The public operators: shapes, argument checks, choice of implementation.

Layout of every map: `(batch, height, width, heads, head_dim)`, heads first among the channels, any strides. Such
tensors may be views into one packed qkv projection; no copy is needed to call these functions.

A map is cut into `regions_h x regions_w` regions of `ceil(height / regions_h) x ceil(width / regions_w)` tokens, or of
the given `region_size`, numbered row by row. Where they reach beyond the map, the tokens there do not exist and take
part in nothing, or they all are alike: the constant `fill`.

BiFormer (Zhu et al., CVPR 2023, arXiv 2303.08810), section 3.2.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from hybridzoo.kernels.routed import operators, torch_impl
from hybridzoo.kernels.routed.grid import Grid

IMPLEMENTATIONS = ("auto", "triton", "torch")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # does not import it: that would be slow


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
    """For every region of `query`, the `topk` regions of `key` whose mean is most alike (its largest dot product).

    One routing serves all heads. It is discrete, so no gradient flows through it, and it is computed in float32 or
    wider whatever the inputs' precision: rounding flips near-ties.

    Args:
        query: `(batch, height, width, heads, head_dim)`.
        key: same shape as `query`.
        regions: regions per axis, `(rows, columns)` or one number for both.
        topk: regions kept for each region, `1 <= topk <= rows * columns`.
        region_size: tokens of a region, `(height, width)` or one number for both; default the smallest with which the
            regions cover the map.
        fill: `(2, heads, head_dim)`, query and key of the tokens beyond the map, which then count in the means. Default
            none: means are taken over the tokens on the map.
        scale: factor on the dot products, default `(heads * head_dim) ** -0.5`. A positive one changes no choice.

    Returns:
        `(batch, rows * columns, topk)` int64, the chosen regions of each region, in no particular order.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check_map("query", query)
    grid = _region_grid(query, regions, region_size, fill)
    _check_same_shape("key", key, query)
    count = grid.regions
    if not 1 <= topk <= count:
        raise ValueError(f"topk must lie between 1 and the number of regions, {count}; got {topk}")
    if scale is None:
        scale = (query.shape[3] * query.shape[4]) ** -0.5
    return torch_impl.route(query, key, fill, grid, topk, scale)


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

    `out[i] = softmax_j(scale * query[i] . key[j]) value[j]`, per head, with `j` running over the tokens of the regions
    `routes[:, region(i)]`. A region listed twice counts twice; the order of the list does not matter. Differentiable in
    `query`, `key`, `value` and `fill`; gradients are summed in a fixed order, so two runs give the same bits.

    Args:
        query, key, value: `(batch, height, width, heads, head_dim)`, one dtype and device.
        routes: `(batch, rows * columns, topk)` int64 region numbers, as `bi_level_route` returns them. Nobody
            looks for numbers out of range (on a GPU that would mean waiting): with them the result is undefined.
        regions: regions per axis, `(rows, columns)` or one number for both.
        region_size: tokens of a region, `(height, width)` or one number for both; default the smallest with which the
            regions cover the map.
        fill: `(2, heads, head_dim)`, any floating dtype: key and value of the tokens beyond the map, which are then
            attended to like others. Default none: there are no such tokens. Unused, its gradient `None`, where regions
            end with the map.
        scale: factor on the scores, default `head_dim ** -0.5`. (BiFormer's weights want `(heads * head_dim) ** -0.5`.)
        impl: `"triton"` (CUDA; elsewhere only under `TRITON_INTERPRET=1`), `"torch"` (any device) or `"auto"`, which
            takes Triton on CUDA where it supports the call, else torch. An explicit choice never falls back.

    Returns:
        `(batch, height, width, heads, head_dim)`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: an argument does not fit, or `impl="triton"` cannot run this call; the message names the reason.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import bi_level_route, routed_attention2d
        >>> q, k, v = torch.randn(3, 2, 28, 28, 4, 32)
        >>> routes = bi_level_route(q, k, regions=7, topk=4)
        >>> routed_attention2d(q, k, v, routes, regions=7).shape
        torch.Size([2, 28, 28, 4, 32])
    """
    _check_map("query", query)
    grid = _region_grid(query, regions, region_size, fill)
    _check_same_shape("key", key, query)
    _check_same_shape("value", value, query)
    count = grid.regions
    if routes.ndim != 3 or routes.shape[:2] != (query.shape[0], count) or routes.shape[2] < 1:
        raise ValueError(
            f"routes must have shape (batch={query.shape[0]}, regions={count}, topk >= 1); got {tuple(routes.shape)}"
        )
    if routes.dtype != torch.int64:
        raise ValueError(f"routes must be int64 region numbers; got {routes.dtype}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if scale is None:
        scale = query.shape[4] ** -0.5
    if impl == "triton" and (reason := _triton_cannot(query)):
        raise ValueError(f"impl='triton' cannot run this call: {reason}; use impl='torch' or 'auto'")
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    if impl == "auto":
        impl = "triton" if query.is_cuda and not exporting and _triton_cannot(query) is None else "torch"
    if fill is not None and not any(grid.beyond(query)):
        fill = None  # nothing carries it
    if impl == "torch" and torch_impl.prefers_dense(query, routes):
        return torch_impl.dense_forward(query, key, value, routes, fill, grid, scale)
    if exporting:
        # An exported program must run where hybridzoo is not installed: plain PyTorch operators, no node of ours.
        return torch_impl.region_forward(query, key, value, routes, fill, grid, scale)
    return operators.routed_attention2d(query, key, value, routes, fill, list(grid), scale, impl)[0]


def _triton_cannot(query: Tensor) -> str | None:
    """Why Triton cannot run this call; None if it can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"query is on {query.device.type}, not on CUDA, and TRITON_INTERPRET=1 is not set"
    from hybridzoo.kernels.routed import triton_impl  # only when used: Triton is slow to import

    return triton_impl.unsupported(query)


def _region_grid(
    query: Tensor, regions: int | tuple[int, int], region_size: int | tuple[int, int] | None, fill: Tensor | None
) -> Grid:
    """The grid, checked to cover the map and, where nothing fills it, to leave no region without tokens."""
    rows, columns = (regions, regions) if isinstance(regions, int) else regions
    if min(rows, columns) < 1:
        raise ValueError(f"regions must be positive; got {regions}")
    grid = Grid.of(query, rows, columns)
    if region_size is not None:
        height, width = (region_size, region_size) if isinstance(region_size, int) else region_size
        grid = grid._replace(height=height, width=width)
        if min(grid.beyond(query)) < 0:
            raise ValueError(
                f"region_size={region_size} must be large enough for {rows} x {columns} regions to cover the map of"
                f" {query.shape[1]} x {query.shape[2]} tokens"
            )
    if fill is not None:
        _check_fill(fill, query)
        return grid
    beyond = grid.beyond(query)
    for axis, out, size, length in (("height", beyond[0], grid.height, 1), ("width", beyond[1], grid.width, 2)):
        if out >= size:
            raise ValueError(
                f"regions={regions} leaves a region without tokens on a map of {axis} {query.shape[length]}; use fewer"
            )
    return grid


def _check_fill(fill: Tensor, query: Tensor) -> None:
    shape = (2, *query.shape[3:])
    if fill.shape != shape:
        raise ValueError(f"fill must have shape (2, heads, head_dim) = {tuple(shape)}; got {tuple(fill.shape)}")
    if not fill.is_floating_point() or fill.device != query.device:
        raise ValueError(f"fill must be floating-point, on {query.device}; got {fill.dtype}, {fill.device}")


def _check_map(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 5:
        raise ValueError(f"{name} must have shape (batch, height, width, heads, head_dim); got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor; got {tensor.dtype}")


def _check_same_shape(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.shape != query.shape:
        raise ValueError(f"{name} must have the shape of query, {tuple(query.shape)}; got {tuple(tensor.shape)}")
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(
            f"{name} must share dtype and device with query ({query.dtype}, {query.device});"
            f" got {tensor.dtype}, {tensor.device}"
        )
