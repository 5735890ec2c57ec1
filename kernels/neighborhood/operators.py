"""Neighborhood attention as two `torch.library` operators: compilers see one node per direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridzoo.kernels.neighborhood import torch_impl


@torch.library.custom_op("hybridzoo::na2d", mutates_args=())
def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The result and, from Triton, the log-sum-exp of the scores that its backward pass wants, (B, H, W, heads)."""
    args = (query, key, value, rpb, (kernel[0], kernel[1]), (dilation[0], dilation[1]), scale)
    if impl == "triton":
        from hybridzoo.kernels.neighborhood import triton_impl  # only when used: Triton is slow to import

        return triton_impl.forward(*args)
    with _full_precision(query):
        return torch_impl.forward(*args), _log_sum_exp(query, impl)


@torch.library.custom_op("hybridzoo::na2d_backward", mutates_args=())
def na2d_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and rpb; the last one is empty without rpb."""
    where = ((kernel[0], kernel[1]), (dilation[0], dilation[1]), scale)
    if impl == "triton":
        from hybridzoo.kernels.neighborhood import triton_impl

        dq, dk, dv, drpb = triton_impl.backward(grad, query, key, value, rpb, out, lse, *where)
    else:
        with _full_precision(query):
            dq, dk, dv, drpb = torch_impl.backward(grad, query, key, value, rpb, out, *where)
    return dq, dk, dv, query.new_empty(0) if drpb is None else drpb


@na2d.register_fake
def _(query, key, value, rpb, kernel, dilation, scale, impl):
    return query.new_empty(query.shape), _log_sum_exp(query, impl)


@na2d_backward.register_fake
def _(grad, query, key, value, rpb, out, lse, kernel, dilation, scale, impl):
    dq, dk, dv = (query.new_empty(query.shape) for _ in range(3))
    return dq, dk, dv, query.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)


def _full_precision(query: Tensor) -> torch.autocast:
    """Inside the operator autocast would still turn its float32 products into half ones."""
    return torch.autocast(query.device.type, enabled=False)


def _log_sum_exp(query: Tensor, impl: str) -> Tensor:
    """An empty float32 tensor of the shape that `impl` returns."""
    return query.new_empty(query.shape[:4] if impl == "triton" else (0,), dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    query, key, value, rpb, *ctx.where = inputs
    ctx.save_for_backward(query, key, value, rpb, *output)


def _differentiate(ctx, grad, _):
    saved = ctx.saved_tensors  # read once: checkpointing recomputes on every access
    *grads, drpb = na2d_backward(grad, *saved, *ctx.where)
    return *grads, None if saved[3] is None else drpb, None, None, None, None


na2d.register_autograd(_differentiate, setup_context=_save)


def _multiplications(query, kernel, dilation) -> int:
    """Of q k^T alone: a query has kernel x kernel keys, fewer where its dilation group is smaller."""
    batch, height, width, heads, head_dim = query
    pairs = 1
    for length, k, d in zip((height, width), kernel, dilation, strict=True):
        groups = [math.ceil((length - residue) / d) for residue in range(min(d, length))]
        pairs *= sum(members * min(members, k) for members in groups)
    return batch * heads * pairs * head_dim


@register_flop_formula(torch.ops.hybridzoo.na2d)
def _flops(query, key, value, rpb, kernel, dilation, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * _multiplications(query, kernel, dilation)  # q k^T and weights v, a multiply and an add each


@register_flop_formula(torch.ops.hybridzoo.na2d_backward)
def _backward_flops(grad, query, key, value, rpb, out, lse, kernel, dilation, *args, out_shape=None, **kwargs) -> int:
    return 2 * 5 * _multiplications(query, kernel, dilation)  # the scores again, dweights, and one for each of q, k, v
