"""Neighborhood attention as two `torch.library` operators: one node per direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridzoo.kernels.neighborhood import torch_impl
from hybridzoo.kernels.neighborhood.given import Maps, Window
from hybridzoo.kernels.operators_common import differentiable, differentiable_once, full_precision, operator


@operator
def na2d(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rpb: Tensor | None,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    impl: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores, (B, H, W, heads).

    If key and value are None, `query` is all three, packed: (B, H, W, 3, heads, head_dim). `with_lse`: the log-sum-exp
    is differentiable. Without it, only Triton returns the log-sum-exp, for its backward pass; otherwise it is empty.
    """
    maps, window = Maps.of(query, key, value), Window.of(kernel, dilation, scale)
    if impl == "triton":
        from hybridzoo.kernels.neighborhood import triton_impl  # slow to import, so only if used

        return triton_impl.forward(maps, rpb, window)
    with full_precision(query):
        out, lse = torch_impl.forward(maps, rpb, window, with_lse)
        return out, _log_sum_exp(out, impl, with_lse) if lse is None else lse


@operator
def na2d_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    impl: str,
    want_rpb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and rpb, each like its input. Empty for inputs not given, or if not `want_rpb`."""
    maps, window = Maps.of(query, key, value), Window.of(kernel, dilation, scale)
    dq, dk, dv = (query.new_empty(0 if t is None else t.shape) for t in (query, key, value))
    into = Maps.of(dq, None if key is None else dk, None if value is None else dv)
    if impl == "triton":
        from hybridzoo.kernels.neighborhood import triton_impl

        drpb = triton_impl.backward(grad, maps, rpb, out, lse, grad_lse, window, into, want_rpb)
    else:
        with full_precision(query):
            drpb = torch_impl.backward(grad, maps, rpb, out, grad_lse, window, into, want_rpb)
    return dq, dk, dv, query.new_empty(0) if drpb is None else drpb


@torch.library.register_fake("hybridzoo::na2d")
def _(query, key, value, rpb, kernel, dilation, scale, impl, with_lse):
    shape = query.shape if key is not None else (*query.shape[:3], *query.shape[4:])
    out = query.new_empty(shape)
    return out, _log_sum_exp(out, impl, with_lse)


@torch.library.register_fake("hybridzoo::na2d_backward")
def _(grad, query, key, value, rpb, out, lse, grad_lse, kernel, dilation, scale, impl, want_rpb):
    dq, dk, dv = (query.new_empty(0 if t is None else t.shape) for t in (query, key, value))
    return dq, dk, dv, rpb.new_empty(rpb.shape) if want_rpb else query.new_empty(0)


def _log_sum_exp(out: Tensor, impl: str, with_lse: bool) -> Tensor:
    """A new tensor like the log-sum-exp that `impl` returns."""
    shape = out.shape[:4] if impl == "triton" or with_lse else (0,)
    return out.new_empty(shape, dtype=torch.promote_types(out.dtype, torch.float32))


def _save(ctx, inputs, output):
    query, key, value, rpb, *ctx.where, ctx.with_lse = inputs
    ctx.save_for_backward(query, key, value, rpb, *output)
    if not ctx.with_lse:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, grad_lse):
    query, key, value, rpb, *results = ctx.saved_tensors
    want_rpb = ctx.needs_input_grad[3]  # no kernel runs for a frozen table
    grad_lse = grad_lse if ctx.with_lse else None
    grads = _backward(grad, query, key, value, rpb, *results, grad_lse, *ctx.where, want_rpb)
    given = query, key, value, rpb if want_rpb else None
    found = [None if t is None else g for t, g in zip(given, grads, strict=True)]
    return *found, None, None, None, None, None


_backward = differentiable_once(na2d_backward, "na2d")
attend = differentiable(na2d, "na2d", _save, _differentiate)


def pairs(query, kernel, dilation) -> int:
    """The number of pairs of a query and a key that it sees: kernel x kernel per query, or the whole dilation group."""
    batch, height, width = query[:3]
    count = 1
    for length, k, d in zip((height, width), kernel, dilation, strict=True):
        groups = [math.ceil((length - residue) / d) for residue in range(min(d, length))]
        count *= sum(members * min(members, k) for members in groups)
    return batch * query[-2] * count


def _multiplications(query, kernel, dilation) -> int:
    """The number of multiplications in q k^T."""
    return pairs(query, kernel, dilation) * query[-1]


@register_flop_formula(torch.ops.hybridzoo.na2d)
def _flops(query, key, value, rpb, kernel, dilation, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * _multiplications(query, kernel, dilation)  # two products, q k^T and weights v; multiply and add


@register_flop_formula(torch.ops.hybridzoo.na2d_backward)
def _backward_flops(
    grad, query, key, value, rpb, out, lse, grad_lse, kernel, dilation, *args, out_shape=None, **kwargs
) -> int:
    return 2 * 5 * _multiplications(query, kernel, dilation)  # five products: scores, d(weights), dq, dk, dv
