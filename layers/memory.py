"""The order of a map's numbers in memory."""

from __future__ import annotations

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """An NCHW map with channels last in memory. Convolutions keep this order, and permuting it to NHWC is a view.

    Uses permutations, because `torch.func.vmap` does not support memory formats.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
