"""Four well-known networks in which other papers replace the attention, written once for all these papers.

A host has all parts except that attention: stem, stages, its own softmax attention, head. A family passes a factory of
its layers, and the number of blocks at the start of each stage that use them (`linear` in a variant's row).
"""

from hybridzoo.backbones.hosts.common import ALL, default_cfgs
from hybridzoo.backbones.hosts.cswin import CSwin, CSwinConfig
from hybridzoo.backbones.hosts.deit import DeiT, DeiTConfig
from hybridzoo.backbones.hosts.pvt import PVT, PVTConfig
from hybridzoo.backbones.hosts.swin import Swin, SwinConfig

__all__ = [
    "ALL",
    "PVT",
    "CSwin",
    "CSwinConfig",
    "DeiT",
    "DeiTConfig",
    "PVTConfig",
    "Swin",
    "SwinConfig",
    "default_cfgs",
]
