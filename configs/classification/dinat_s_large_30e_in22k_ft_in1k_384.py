r"""DiNAT_s-Large at 384 px: ImageNet-22k to ImageNet-1k in 30 epochs, as published: top-1 87.4 %.

torchrun --nproc-per-node 8 -m hybridzoo train dinat_s_large_30e_in22k_ft_in1k_384 --launcher pytorch \
    --data IMAGENET --weights dinat_s_large.in22k

Roughly 130 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_dinat_in22k_ft_in1k.py"]

model = dict(name="dinat_s_large", drop_path_rate=0.35, dilations="in1k_384")
optim_wrapper = dict(optimizer=dict(weight_decay=1e-5))
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
