"""Operators on the `kernel x kernel` tokens around every token, dilated or not: attention, and dynamic convolution."""

from hybridzoo.kernels.neighborhood.api import na2d, na2d_packed
from hybridzoo.kernels.neighborhood.mix import neighborhood_mix2d

__all__ = ["na2d", "na2d_packed", "neighborhood_mix2d"]
