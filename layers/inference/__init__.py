"""What makes inference faster, behind one door: `fuse()`. Layers and the papers' files do not know this room."""

from hybridzoo.layers.inference import norms  # its rules
from hybridzoo.layers.inference.fusing import FusedError, Fusible, folds, fuse

__all__ = ["FusedError", "Fusible", "folds", "fuse", "norms"]
