"""What the operators share: first derivatives, for autograd and for `torch.func`, and shelter from autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def differentiable(
    op: torch.library.CustomOpDef, name: str, save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """`op` with a gradient: `save(ctx, inputs, output)`, `differentiate(ctx, *grads)`, as in `register_autograd`.

    What PyTorch makes of a registered gradient compiles to one node per direction, whatever the inputs, but
    `torch.func.grad` stumbles over it, and forward mode passes it with tangents of zero. So outside of compilers an
    autograd function goes around the operator, which does neither. (Compilers would not take the same tensor as query
    and key through such a function, nor could a `torch.jit.trace` be saved.) For `torch.func`, `differentiate` too must
    compute with differentiable operators.
    """
    op.register_autograd(differentiate, setup_context=save)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(save)
        backward = staticmethod(differentiate)

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian); use torch.func.vjp or jacrev"
            )

    def call(*inputs: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return op(*inputs) if traced else Function.apply(*inputs)

    return call


def differentiable_once(op: torch.library.CustomOpDef, name: str) -> Callable[..., Any]:
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
