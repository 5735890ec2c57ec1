r"""DiNAT_s-Large: ImageNet-22k to ImageNet-1k in 30 epochs, as published: top-1 86.5 %.

torchrun --nproc-per-node 8 -m hybridzoo train dinat_s_large_30e_in22k_ft_in1k --launcher pytorch \
    --data IMAGENET --weights dinat_s_large.in22k

Roughly 44 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_dinat_in22k_ft_in1k.py"]

model = dict(name="dinat_s_large", drop_path_rate=0.35)
