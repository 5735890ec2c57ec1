"""The public operators: shapes, argument checks, choice of implementation.

Layout of every map: `(batch, height, width, heads, head_dim)`, heads first among the channels, any strides. Such
tensors may be views into one packed qkv projection; no copy is needed to call these functions.

A map is cut into `regions_h x regions_w` regions of `ceil(height / regions_h) x ceil(width / regions_w)` tokens,
numbered row by row. Where a region count does not divide the side, the last row or column of regions is smaller;
tokens that do not exist take part in nothing.

BiFormer (Zhu et al., CVPR 2023, arXiv 2303.08810), section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridzoo.kernels.routed import operators, torch_impl

IMPLEMENTATIONS = ("auto", "torch")


def bi_level_route(
    query: Tensor, key: Tensor, regions: int | tuple[int, int], topk: int, *, scale: float | None = None
) -> Tensor:
    """For every region of `query`, the `topk` regions of `key` whose mean is most alike (its largest dot product).

    One routing serves all heads. It is discrete, so no gradient flows through it, and it is computed in float32 or
    wider whatever the inputs' precision: rounding flips near-ties.

    Args:
        query: `(batch, height, width, heads, head_dim)`.
        key: same shape as `query`.
        regions: regions per axis, `(rows, columns)` or one number for both.
        topk: regions kept for each region, `1 <= topk <= rows * columns`.
        scale: factor on the dot products, default `(heads * head_dim) ** -0.5`. A positive one changes no choice.

    Returns:
        `(batch, rows * columns, topk)` int64, the chosen regions of each region, in no particular order.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check_map("query", query)
    grid = _region_grid(query, regions)
    _check_same_shape("key", key, query)
    count = grid[0] * grid[1]
    if not 1 <= topk <= count:
        raise ValueError(f"topk must lie between 1 and the number of regions, {count}; got {topk}")
    if scale is None:
        scale = (query.shape[3] * query.shape[4]) ** -0.5
    return torch_impl.route(query, key, grid, topk, scale)


def routed_attention2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    regions: int | tuple[int, int],
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every token to all tokens of the regions that its own region is routed to.

    `out[i] = softmax_j(scale * query[i] . key[j]) value[j]`, per head, with `j` running over the tokens of the regions
    `routes[:, region(i)]`. A region listed twice counts twice; the order of the list does not matter. Differentiable
    in `query`, `key` and `value`; gradients are summed in a fixed order, so two runs give the same bits.

    Args:
        query, key, value: `(batch, height, width, heads, head_dim)`, one dtype and device.
        routes: `(batch, rows * columns, topk)` int64 region numbers, as `bi_level_route` returns them.
        regions: regions per axis, `(rows, columns)` or one number for both.
        scale: factor on the scores, default `head_dim ** -0.5`. (BiFormer's weights want `(heads * head_dim) ** -0.5`.)
        impl: `"torch"` (any device) or `"auto"`, which picks the fastest one that runs here.

    Returns:
        `(batch, height, width, heads, head_dim)`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from hybridzoo.kernels import bi_level_route, routed_attention2d
        >>> q, k, v = torch.randn(3, 2, 28, 28, 4, 32)
        >>> routes = bi_level_route(q, k, regions=7, topk=4)
        >>> routed_attention2d(q, k, v, routes, regions=7).shape
        torch.Size([2, 28, 28, 4, 32])
    """
    _check_map("query", query)
    grid = _region_grid(query, regions)
    _check_same_shape("key", key, query)
    _check_same_shape("value", value, query)
    count = grid[0] * grid[1]
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
    if torch_impl.prefers_dense(query, routes):
        return torch_impl.dense_forward(query, key, value, routes, grid, scale)
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        # An exported program must run where hybridzoo is not installed: plain PyTorch operators, no node of ours.
        return torch_impl.region_forward(query, key, value, routes, grid, scale)
    return operators.routed_attention2d(query, key, value, routes, grid, scale)


def _region_grid(query: Tensor, regions: int | tuple[int, int]) -> tuple[int, int]:
    """`regions` as (rows, columns), checked to leave no region of the map empty."""
    rows, columns = (regions, regions) if isinstance(regions, int) else regions
    for axis, count, size in (("height", rows, query.shape[1]), ("width", columns, query.shape[2])):
        if count < 1:
            raise ValueError(f"regions must be positive; got {regions}")
        # The last region starts at (count - 1) * ceil(size / count).
        if (count - 1) * math.ceil(size / count) >= size:
            raise ValueError(f"regions={regions} leaves a region without tokens on a map of {axis} {size}; use fewer")
    return rows, columns


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
