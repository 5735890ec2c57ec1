"""Backward passes of operators whose forward autograd can already differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` with respect to every input, given that of its output.

    Runs the forward once more: mmcv's autograd functions hand their backward the inputs, not a graph.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
