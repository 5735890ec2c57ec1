"""Evaluation on a CPU a few images at a time, so that what a layer makes stays in the cache.

A batch's hidden maps are larger than any cache, and so large that malloc asks the operating system for fresh pages for
each of them: elementwise layers then cost as much as convolutions. The same layers on part of the batch do not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Elements of the largest tensor of a slice: 16 MB in float32. Half of what glibc's malloc keeps at most (its mmap
# threshold grows to 32 MB), and a share of a server's last-level cache.
SLICE = 2**22


def lean(x: Tensor) -> bool:
    """Whether what is computed from `x` runs on a CPU, eagerly and without gradients.

    Then nothing is kept for a backward pass or a graph: batches may be cut, fresh tensors overwritten.
    """
    return x.device.type == "cpu" and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    )


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
