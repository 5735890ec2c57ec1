"""Dynamic depthwise convolution: every image has its own 3x3 kernel for each channel."""

from hybridzoo.kernels.depthwise.api import dynamic_depthwise_conv2d

__all__ = ["dynamic_depthwise_conv2d"]
