"""EfficientViT-M0 (MSRA) on ImageNet-1k, 300 epochs; published: top-1 63.3 %.

torchrun --nproc-per-node 8 -m hybridzoo train efficientvit_msra_m0_300e_in1k --data IMAGENET --launcher pytorch

Less than M5's 30 hours on eight V100; reading the images decides.
"""

_base_ = ["../_base_/classification_efficientvit_msra_in1k.py"]

model = dict(name="efficientvit_msra_m0")
