"""Neighborhood attention: every token attends to the `kernel x kernel` window around it, with or without dilation."""

from hybridzoo.kernels.neighborhood.api import na2d, na2d_packed

__all__ = ["na2d", "na2d_packed"]
