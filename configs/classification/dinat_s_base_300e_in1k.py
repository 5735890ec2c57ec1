"""DiNAT_s-Base on ImageNet-1k, 300 epochs, as published: top-1 83.8 %.

torchrun --nproc-per-node 8 -m hybridzoo train dinat_s_base_300e_in1k --data IMAGENET --amp --launcher pytorch

Roughly 99 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_dinat_in1k.py"]

model = dict(name="dinat_s_base", drop_path_rate=0.5)
