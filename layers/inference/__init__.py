"""What makes inference faster, behind one door: `fuse()`. Layers and the papers' files do not know this room."""

from hybridzoo.layers.inference import attention, norms, packed, positions  # their rules
from hybridzoo.layers.inference.fusing import SWAPPED, FusedError, Fusible, fuse

__all__ = ["SWAPPED", "FusedError", "Fusible", "attention", "fuse", "norms", "packed", "positions"]
