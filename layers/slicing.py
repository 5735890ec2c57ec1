"""Evaluation on a CPU a few images at a time, so that what a layer makes stays in the cache.

A batch's hidden maps are larger than any cache, and so large that malloc asks the operating system for fresh pages for
each of them: elementwise layers then cost as much as convolutions. The same layers on part of the batch do not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

# Elements of the largest tensor of a slice: 8 MB in float32. A few of them fit into what glibc's malloc keeps when they
# are freed, twice the largest block that it ever asked the operating system for, and into a server's last-level cache.
SLICE = 2**21


def lean(x: Tensor) -> bool:
    """Whether what is computed from `x` runs on a CPU and is not `recorded`.

    Then batches may be cut, and fresh tensors overwritten unless they are `watched`.
    """
    return x.device.type == "cpu" and not recorded(x)


def recorded(x: Tensor) -> bool:
    """Whether operations on `x` are kept for a backward pass, go into a graph or are transformed."""
    graph = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return graph or transformed(x)


def transformed(x: Tensor) -> bool:
    """Whether `x` stands for something else inside `torch.func`'s transforms (vmap, grad): it has no memory to ask."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def watched(*modules: nn.Module) -> bool:
    """Whether forward hooks, on these modules or on all, may have kept what goes in or out: do not overwrite it then.

    Where `b` overwrites what `a` has just returned, both are to be asked about.
    """
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def by_images(function: Callable[[Tensor], Tensor], x: Tensor, elements: int, training: bool) -> Tensor:
    """`function(x)`, a few images at a time where `lean(x)` and the batch is too large for the cache.

    Forward hooks inside `function` see those few images.

    Args:
        function: tensor `(batch, …)` -> tensor `(batch, …)`; in evaluation every image for itself.
        x: its argument.
        elements: of the largest tensor that `function` makes, for one image.
        training: whether the function's modules train; then the batch stays whole.
    """
    parts = 1 if training or not lean(x) else min(len(x), -(-len(x) * elements // SLICE))
    return torch.cat([function(part) for part in x.chunk(parts)]) if parts > 1 else function(x)
