"""As the other NATs and DiNATs, with 50 epochs of warm-up and a moving average: the wide isotropic nets."""

_base_ = ["classification_dinat_in1k.py"]

custom_hooks = [dict(type="TimmEMAHook", decay=0.9998)]
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=50, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=5e-3, begin=50, end=300, by_epoch=True, convert_to_iter_based=True),
]
