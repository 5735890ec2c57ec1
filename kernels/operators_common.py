"""Shared by all operators: registration, first derivatives for autograd and `torch.func`, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("hybridzoo", "FRAGMENT")


def operator(body: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register the `torch.library` operator `hybridzoo::<name of body>`, which runs `body`.

    `body` must not change its arguments. Compilers, exporters and FLOP counters see one node.
    `torch.library.custom_op` does the same, but also checks in every call that no result is a view of an argument. This
    takes about 40 microseconds on a CPU, as long as a small kernel. Our tests call `torch.library.opcheck` instead.
    """
    name = body.__name__
    _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    return getattr(torch.ops.hybridzoo, name).default


def differentiable(
    op: torch._ops.OpOverload, name: str, save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """`op` with a gradient: `save(ctx, inputs, output)`, `differentiate(ctx, *grads)`, as in `register_autograd`.

    A gradient that is registered with PyTorch compiles to one node per direction. But `torch.func.grad` fails on it,
    and forward mode silently returns tangents of zero. So outside of compilers, an autograd function wraps the operator
    and avoids both problems. (Compilers do not accept such a function if query and key are the same tensor, and
    `torch.jit.trace` cannot save it.) For `torch.func`, `differentiate` must use differentiable operators.

    There are two autograd functions. Only `Transformed` works with `torch.func`, but PyTorch binds its arguments by
    name in every call, which doubles the time of a call. So it is used only under `torch.func`.
    """
    torch.library.register_autograd(op, differentiate, setup_context=save, lib=_LIBRARY)

    class Function(torch.autograd.Function):
        backward = staticmethod(differentiate)

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = op(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian); use torch.func.vjp or jacrev"
            )

    class Transformed(Function):
        generate_vmap_rule = True
        setup_context = staticmethod(save)

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return op(*inputs)
        if torch._C._are_functorch_transforms_active():  # autograd functions call it too; no public function tells it
            return Transformed.apply(*inputs)
        return Function.apply(*inputs) if _has_gradient(inputs) else op(*inputs)

    return call


def _has_gradient(inputs: tuple[Any, ...]) -> bool:
    """Whether the call needs a derivative, in reverse mode or in forward mode."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def differentiable_once(op: torch._ops.OpOverload, name: str) -> Callable[..., Any]:
    """The backward operator `op` for `differentiate`. Its own gradient (a second derivative) raises an error."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def differentiate(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{name} has no second derivative: its gradient cannot be differentiated")

    return differentiable(op, name, save, differentiate)


def full_precision(query: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off inside an operator, where it would change the precision of products and of the output.

    Does nothing if autocast is not on, because an exported program would contain the switch.
    """
    device = query.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
