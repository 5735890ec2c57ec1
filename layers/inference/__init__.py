"""Faster inference by `fuse()`. Layers and the families' files do not import this folder."""

from hybridzoo.layers.inference import attention, norms, packed, positions  # their rules
from hybridzoo.layers.inference.fusing import SWAPPED, FusedError, Fusible, fuse

__all__ = ["SWAPPED", "FusedError", "Fusible", "attention", "fuse", "norms", "packed", "positions"]
