"""Sizes that an exported program leaves open: height and width of its images, and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybridzoo.kernels import arguments


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; while a program is exported, whether it holds for all sizes left open.

    A plain `if` would bind the program to the sizes for which it took the same branch. What the condition only spares
    (padding by nothing, a table resized to its own size) is done in the program whether it is needed or not.
    """
    if isinstance(condition, torch.SymBool) and arguments.exporting():
        return statically_known_true(condition)
    return bool(condition)


def smaller(first: Any, second: Any) -> Any:
    """The smaller one of two sizes; `min` would decide between sizes left open."""
    return torch.sym_min(first, second) if is_open(first, second) else min(first, second)


def larger(first: Any, second: Any) -> Any:
    """The larger one of two sizes; `max` would decide between sizes left open."""
    return torch.sym_max(first, second) if is_open(first, second) else max(first, second)


def parts(side: Any, part: Any) -> Any:
    """How many parts of `part` tokens cover `side` tokens.

    What is padded to `parts(side, part) * part` can be cut into parts in an exported program too: `-side % part` tokens
    are as many, but `torch.export` cannot prove that `part` then divides the sum. (Division is of positive numbers,
    since ONNX files round it towards zero.)
    """
    return (side + part - 1) // part


def in_order(x: Tensor) -> Tensor:
    """`x`; in a program that leaves its sizes open, with its axes in the order of memory.

    Whether a permuted tensor can be flattened without a copy depends on sizes of one. PyTorch looks, and `torch.export`
    would bind the program to what it sees.
    """
    if is_open(*x.shape[1:]) and arguments.exporting():
        return x.clone(memory_format=torch.contiguous_format)
    return x


def is_open(*sizes: Any) -> bool:
    """Whether one of the sizes is left open by a program."""
    return any(isinstance(size, torch.SymInt) for size in sizes)
