"""Routed attention, grouped by region, as two `torch.library` operators: compilers see one node per direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridzoo.kernels.routed import torch_impl


@torch.library.custom_op("hybridzoo::routed_attention2d", mutates_args=())
def routed_attention2d(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: list[int], scale: float
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):  # it would change the output's dtype
        return torch_impl.region_forward(query, key, value, routes, (regions[0], regions[1]), scale)


@torch.library.custom_op("hybridzoo::routed_attention2d_backward", mutates_args=())
def routed_attention2d_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return torch_impl.region_backward(grad, query, key, value, routes, (regions[0], regions[1]), scale)


@routed_attention2d.register_fake
def _(query, key, value, routes, regions, scale):
    return query.new_empty(query.shape)


@routed_attention2d_backward.register_fake
def _(grad, query, key, value, routes, regions, scale):
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    query, key, value, routes, ctx.regions, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, routes)


def _differentiate(ctx, grad):
    grads = routed_attention2d_backward(grad, *ctx.saved_tensors, ctx.regions, ctx.scale)
    return *grads, None, None, None


routed_attention2d.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.hybridzoo.routed_attention2d)
def _flops(query, key, value, routes, regions, scale, *args, out_shape=None, **kwargs) -> int:
    batch, height, width, heads, head_dim = query
    keys = routes[2] * math.ceil(height / regions[0]) * math.ceil(width / regions[1])
    return 2 * 2 * batch * height * width * heads * keys * head_dim  # q k^T and weights v, a multiply and an add each
