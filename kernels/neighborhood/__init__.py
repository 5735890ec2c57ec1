"""Neighborhood attention: every token attends to a window of `kernel x kernel` tokens around it, dilated or not."""

from hybridzoo.kernels.neighborhood.api import na2d

__all__ = ["na2d"]
