"""The ImageNet recipe of NAT, DiNAT and DiNAT_s: global batch 8 x 128, float16, no moving average.

DeiT's recipe with 20 epochs of warm-up, a higher lowest rate, clipped gradients and a random interpolation. The authors
meant to exempt the bias tables from weight decay; their training code decayed them, and so does this.
"""

_base_ = ["classification.py"]

amp_dtype = "float16"
train_dataloader = dict(dataset=dict(transform=dict(interpolation="random")))
optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=5e-3, begin=20, end=300, by_epoch=True, convert_to_iter_based=True),
]
