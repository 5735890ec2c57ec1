"""The order of a map's numbers in memory."""

from __future__ import annotations

from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """An NCHW map with its channels last in memory, which convolutions keep and permutations to NHWC need not copy.

    By permutation, because `torch.func.vmap` knows no memory formats.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
