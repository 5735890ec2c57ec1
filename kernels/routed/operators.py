"""Routed attention as two `torch.library` operators, so that compilers see one node per direction."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridzoo.kernels.routed import torch_impl


@torch.library.custom_op("hybridzoo::routed_attention2d", mutates_args=())
def routed_attention2d(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: list[int], scale: float
) -> Tensor:
    return torch_impl.forward(query, key, value, routes, (regions[0], regions[1]), scale)


@torch.library.custom_op("hybridzoo::routed_attention2d_backward", mutates_args=())
def routed_attention2d_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, routes: Tensor, regions: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch_impl.backward(grad, query, key, value, routes, (regions[0], regions[1]), scale)


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
