"""Sizes that an exported program leaves open: height and width of its images, and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hybridzoo.kernels import arguments


def surely(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; while a program is exported, whether it holds for all sizes left open.

    A plain `if` would bind the program to the sizes for which it took the same branch. What the condition only spares
    (padding by nothing, a table resized to its own size) is done in the program whether it is needed or not.
    """
    if arguments.exporting() and isinstance(condition, torch.SymBool):
        return statically_known_true(condition)
    return bool(condition)


def smaller(first: Any, second: Any) -> Any:
    """The smaller one of two sizes; `min` would decide between sizes left open."""
    return torch.sym_min(first, second) if _open(first, second) else min(first, second)


def larger(first: Any, second: Any) -> Any:
    """The larger one of two sizes; `max` would decide between sizes left open."""
    return torch.sym_max(first, second) if _open(first, second) else max(first, second)


def _open(*sizes: Any) -> bool:
    return any(isinstance(size, torch.SymInt) for size in sizes)
