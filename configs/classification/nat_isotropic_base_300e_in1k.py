"""Isotropic NAT-Base on ImageNet-1k, 300 epochs, as published: top-1 81.6 %.

torchrun --nproc-per-node 8 -m hybridzoo train nat_isotropic_base_300e_in1k --data IMAGENET --amp --launcher pytorch

Roughly 109 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_dinat_isotropic_base_in1k.py"]

model = dict(name="nat_isotropic_base", drop_path_rate=0.4)
