"""EfficientViT-M5 (MSRA) on ImageNet-1k, 300 epochs; published: top-1 77.1 %.

torchrun --nproc-per-node 8 -m hybridzoo train efficientvit_msra_m5_300e_in1k --data IMAGENET --launcher pytorch

About 30 hours on eight V100, say the authors.
"""

_base_ = ["../_base_/classification_efficientvit_msra_in1k.py"]

model = dict(name="efficientvit_msra_m5")
