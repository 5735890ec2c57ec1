"""ViT with relative position bias-Base on ImageNet-1k, 300 epochs, as published: top-1 82.5 %.

torchrun --nproc-per-node 8 -m hybridzoo train vitrpb_base_300e_in1k --data IMAGENET --amp --launcher pytorch

Roughly 112 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_dinat_isotropic_base_in1k.py"]

model = dict(name="vitrpb_base", drop_path_rate=0.4)
