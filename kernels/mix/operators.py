"""The dynamic convolution of neighborhoods as two `torch.library` operators: one node per direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridzoo.kernels.mix import torch_impl
from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood.given import Window
from hybridzoo.kernels.neighborhood.operators import pairs
from hybridzoo.kernels.operators_common import differentiable, differentiable_once, full_precision, operator


@operator
def neighborhood_mix2d(
    query: Tensor,
    taps: Tensor,
    value: Tensor,
    tap_bias: Tensor | None,
    rpb: Tensor | None,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of the scores `(B, H, W, heads)`, which is empty if `impl` is not `"triton"`."""
    given, window = Mix(query, taps, value, tap_bias, rpb), Window.of(kernel, dilation, scale)
    if impl == "triton":
        from hybridzoo.kernels.mix import triton_impl  # slow to import, so only if used

        return triton_impl.forward(given, window)
    with full_precision(query):
        return torch_impl.forward(given, window), _log_sum_exp(query, impl)


@operator
def neighborhood_mix2d_backward(
    grad: Tensor,
    query: Tensor,
    taps: Tensor,
    value: Tensor,
    tap_bias: Tensor | None,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, taps, value, tap_bias and rpb; an empty tensor for a table that was not given."""
    given, window = Mix(query, taps, value, tap_bias, rpb), Window.of(kernel, dilation, scale)
    if impl == "triton":
        from hybridzoo.kernels.mix import triton_impl

        grads = triton_impl.backward(grad, given, out, lse, window)
    else:
        with full_precision(query):
            grads = torch_impl.backward(grad, given, out, window)
    tables = [query.new_empty(0) if t is None else t for t in grads[3:]]
    return *grads[:3], tables[0], tables[1]


@torch.library.register_fake("hybridzoo::neighborhood_mix2d")
def _(query, taps, value, tap_bias, rpb, kernel, dilation, scale, impl):
    return value.new_empty(value.shape), _log_sum_exp(query, impl)


@torch.library.register_fake("hybridzoo::neighborhood_mix2d_backward")
def _(grad, query, taps, value, tap_bias, rpb, out, lse, kernel, dilation, scale, impl):
    made = [t.new_empty(t.shape) for t in (query, taps, value)]
    return *made, *(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in (tap_bias, rpb))


def _log_sum_exp(query: Tensor, impl: str) -> Tensor:
    shape = query.shape[:4] if impl == "triton" else (0,)
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _save(ctx, inputs, output):
    *tensors, kernel, dilation, scale, impl = inputs
    ctx.where = kernel, dilation, scale, impl
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, grad_lse):
    saved = ctx.saved_tensors
    *grads, dbias, drpb = _backward(grad, *saved, *ctx.where)
    return *grads, None if saved[3] is None else dbias, None if saved[4] is None else drpb, None, None, None, None


_backward = differentiable_once(neighborhood_mix2d_backward, "neighborhood_mix2d")
mix = differentiable(neighborhood_mix2d, "neighborhood_mix2d", _save, _differentiate)


@register_flop_formula(torch.ops.hybridzoo.neighborhood_mix2d)
def _flops(query, taps, value, tap_bias, rpb, kernel, dilation, *args, out_shape=None, **kwargs) -> int:
    return 2 * pairs(query, kernel, dilation) * (query[4] + value[4])  # two products: the scores, and the sum of values


@register_flop_formula(torch.ops.hybridzoo.neighborhood_mix2d_backward)
def _backward_flops(grad, query, taps, value, tap_bias, rpb, out, lse, kernel, dilation, *args, **kwargs) -> int:
    # Five products: the scores, the products of their gradient with queries and with taps, d(weights), d(values).
    return 2 * pairs(query, kernel, dilation) * (3 * query[4] + 2 * value[4])
