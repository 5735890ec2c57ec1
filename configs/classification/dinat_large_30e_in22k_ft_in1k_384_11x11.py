r"""DiNAT-Large at 384 px with 11 x 11 windows: ImageNet-22k to ImageNet-1k in 30 epochs, as published: top-1 87.5 %.

torchrun --nproc-per-node 8 -m hybridzoo train dinat_large_30e_in22k_ft_in1k_384_11x11 --launcher pytorch \
    --data IMAGENET --weights dinat_large.in22k_11x11

The card of the weights states no weight decay for this one; it is that of the 7 x 7 windows.

Roughly 118 hours on eight A100: an estimate from its multiplications, not a measurement.
"""

_base_ = ["../_base_/classification_dinat_in22k_ft_in1k.py"]

model = dict(name="dinat_large", drop_path_rate=0.35, kernel_size=11)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-10))
train_dataloader = dict(dataset=dict(transform=dict(input_size=384)))
val_dataloader = dict(dataset=dict(transform=dict(input_size=384, crop_pct=1.0)))
