"""What the operators share: their registration, first derivatives for autograd and `torch.func`, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("hybridzoo", "FRAGMENT")


def operator(body: Callable[..., Any]) -> torch._ops.OpOverload:
    """The `torch.library` operator `hybridzoo::<name of body>` that runs `body`, which changes none of its arguments.

    Compilers, exporters and counters see one node. `torch.library.custom_op` does the same, and checks in every call
    that no result is a view of an argument: some 40 microseconds on a CPU, as much as a small kernel. The tests ask
    `torch.library.opcheck` instead.
    """
    name = body.__name__
    _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    return getattr(torch.ops.hybridzoo, name).default


def differentiable(
    op: torch._ops.OpOverload, name: str, save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """`op` with a gradient: `save(ctx, inputs, output)`, `differentiate(ctx, *grads)`, as in `register_autograd`.

    What PyTorch makes of a registered gradient compiles to one node per direction, whatever the inputs, but
    `torch.func.grad` stumbles over it, and forward mode passes it with tangents of zero. So outside of compilers an
    autograd function goes around the operator, which does neither. (Compilers would not take the same tensor as query
    and key through such a function, nor could a `torch.jit.trace` be saved.) For `torch.func`, `differentiate` too must
    compute with differentiable operators.

    There are two autograd functions. Only `Transformed` works with `torch.func`, but PyTorch binds its arguments by
    name in every call, which doubles the time of a call. So it is used under `torch.func` alone.
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
        if torch._C._are_functorch_transforms_active():  # asked by autograd functions too; there is no public question
            return Transformed.apply(*inputs)
        return Function.apply(*inputs) if _has_gradient(inputs) else op(*inputs)

    return call


def _has_gradient(inputs: tuple[Any, ...]) -> bool:
    """Whether a derivative is asked for, in reverse mode or in forward mode."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def differentiable_once(op: torch._ops.OpOverload, name: str) -> Callable[..., Any]:
    """The backward operator `op`, for `differentiate` to use: its own gradient, a second derivative, raises."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def differentiate(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{name} has no second derivative: its gradient cannot be differentiated")

    return differentiable(op, name, save, differentiate)


def full_precision(query: Tensor) -> AbstractContextManager[Any]:
    """Inside an operator autocast would still change the precision of its products, and of its output.

    Only where it is on: an exported program would show the switching.
    """
    device = query.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
