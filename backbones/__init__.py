"""One file per family. Importing this package registers every model with timm."""

from hybridzoo.backbones.biformer import BiFormer

__all__ = ["BiFormer"]
