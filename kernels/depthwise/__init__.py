"""Dynamic depthwise convolution: every image brings the 3x3 kernels of its own channels."""

from hybridzoo.kernels.depthwise.api import dynamic_depthwise_conv2d

__all__ = ["dynamic_depthwise_conv2d"]
