"""Dynamic convolution of neighborhoods: `na2d`'s windows, with weights from one vector for each place of the window."""

from hybridzoo.kernels.mix.api import neighborhood_mix2d

__all__ = ["neighborhood_mix2d"]
