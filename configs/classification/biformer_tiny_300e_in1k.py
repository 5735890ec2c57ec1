"""BiFormer-T on ImageNet-1k, 300 epochs, as published: top-1 81.4 %.

torchrun --nproc-per-node 8 -m hybridzoo train biformer_tiny_300e_in1k --data IMAGENET --amp --launcher pytorch

Roughly 14 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_biformer_in1k.py"]

model = dict(name="biformer_tiny", drop_path_rate=0.1)
