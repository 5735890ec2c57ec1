"""Routed attention: each region of queries attends to the tokens of a short list of key regions."""

from hybridzoo.kernels.routed.api import bi_level_route, routed_attention2d

__all__ = ["bi_level_route", "routed_attention2d"]
