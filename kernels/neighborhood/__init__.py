"""Operators on the `kernel x kernel` window around every token, with or without dilation: attention and dynamic
convolution."""

from hybridzoo.kernels.neighborhood.api import na2d, na2d_packed
from hybridzoo.kernels.neighborhood.mix import neighborhood_mix2d

__all__ = ["na2d", "na2d_packed", "neighborhood_mix2d"]
