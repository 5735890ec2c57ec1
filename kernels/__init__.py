"""Operators: pure functions on tensors. Each folder has an API, a PyTorch and a Triton implementation, a reference."""

from hybridzoo.kernels.depthwise import dynamic_depthwise_conv2d
from hybridzoo.kernels.mix import neighborhood_mix2d
from hybridzoo.kernels.neighborhood import na2d, na2d_packed
from hybridzoo.kernels.routed import bi_level_route, routed_attention2d

__all__ = [
    "bi_level_route",
    "dynamic_depthwise_conv2d",
    "na2d",
    "na2d_packed",
    "neighborhood_mix2d",
    "routed_attention2d",
]
