"""Routed attention as `torch.library` operators: one node per direction, and one for Triton's choice of regions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridzoo.kernels.operators_common import differentiable, differentiable_once, full_precision, operator
from hybridzoo.kernels.routed import torch_impl
from hybridzoo.kernels.routed.grid import Grid


@operator
def routed_attention2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    grid: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores `(B, H, W, heads)`, which Triton's backward pass needs.

    The log-sum-exp is empty if `impl` is not `"triton"`.
    """
    args = (query, key, value, routes, fill, Grid(*grid), scale)
    if routes.device.type == "cpu":  # on a GPU, a check would have to wait for the device
        torch_impl.check_routes(routes, Grid(*grid))
    if impl == "triton":
        from hybridzoo.kernels.routed import triton_impl  # imported only when used, because Triton is slow to import

        return triton_impl.forward(*args)
    with full_precision(query):
        return torch_impl.forward(*args), query.new_empty(0, dtype=torch.float32)


@operator
def routed_attention2d_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    fill: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    grid: list[int],
    scale: float,
    impl: str,
    want_fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and fill; the last is empty if not needed. Only Triton reads `out` and `lse`."""
    if impl == "triton":
        from hybridzoo.kernels.routed import triton_impl

        assert out is not None
        assert lse is not None
        args = (grad, query, key, value, routes, fill, out, lse, Grid(*grid), scale)
        dq, dk, dv, dfill = triton_impl.backward(*args, want_fill)
    else:
        with full_precision(query):
            where = (Grid(*grid), scale, want_fill)
            dq, dk, dv, dfill = torch_impl.backward(grad, query, key, value, routes, fill, *where)
    return dq, dk, dv, query.new_empty(0) if dfill is None else dfill


ROUTE_MAX_REGIONS = 256  # limit of the Triton kernel that chooses regions


@operator
def bi_level_route(query: Tensor, key: Tensor, fill: Tensor | None, grid: list[int], topk: int, scale: float) -> Tensor:
    """The choice of regions by Triton. Otherwise `torch_impl.route` is called directly."""
    from hybridzoo.kernels.routed import triton_impl

    return triton_impl.route(query, key, fill, Grid(*grid), topk, scale)


@torch.library.register_fake("hybridzoo::bi_level_route")
def _(query, key, fill, grid, topk, scale):
    return query.new_empty((query.shape[0], Grid(*grid).regions, topk), dtype=torch.int64)


@torch.library.register_fake("hybridzoo::routed_attention2d")
def _(query, key, value, routes, fill, grid, scale, impl):
    lse = query.new_empty(query.shape[:4] if impl == "triton" else (0,), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@torch.library.register_fake("hybridzoo::routed_attention2d_backward")
def _(grad, query, key, value, routes, fill, out, lse, grid, scale, impl, want_fill):
    dq, dk, dv = (query.new_empty(query.shape) for _ in range(3))
    return dq, dk, dv, fill.new_empty(fill.shape) if want_fill else query.new_empty(0)


def _save(ctx, inputs, output):
    *tensors, ctx.grid, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *(output if ctx.impl == "triton" else (None, None)))
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    want_fill = ctx.needs_input_grad[4]
    *grads, dfill = _backward(grad, *ctx.saved_tensors, ctx.grid, ctx.scale, ctx.impl, want_fill)
    return *grads, None, dfill if want_fill else None, None, None, None


_backward = differentiable_once(routed_attention2d_backward, "routed_attention2d")
attend = differentiable(routed_attention2d, "routed_attention2d", _save, _differentiate)


def _multiplications(query, routes, grid) -> int:
    """The number of multiplications in q k^T."""
    batch, height, width, heads, head_dim = query
    return batch * height * width * heads * routes[2] * Grid(*grid).tokens * head_dim


@register_flop_formula(torch.ops.hybridzoo.routed_attention2d)
def _flops(query, key, value, routes, fill, grid, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * _multiplications(query, routes, grid)  # two products, q k^T and weights v; multiply and add


@register_flop_formula(torch.ops.hybridzoo.routed_attention2d_backward)
def _backward_flops(grad, query, key, value, routes, fill, out, lse, grid, *args, out_shape=None, **kwargs) -> int:
    return 2 * 5 * _multiplications(query, routes, grid)  # five products: scores, d(weights), dq, dk, dv
