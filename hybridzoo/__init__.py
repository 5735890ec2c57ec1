"""hybridzoo: hybrid convolution/attention vision backbones that work today.

Importing this package registers its models with timm and does nothing heavier:

>>> import timm, hybridzoo
>>> model = timm.create_model("biformer_tiny", num_classes=10)
"""

from hybridzoo import backbones

__version__ = "0.1.0"
__all__ = ["__version__", "backbones"]
