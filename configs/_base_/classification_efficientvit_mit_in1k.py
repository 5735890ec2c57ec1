"""EfficientViT's (MIT) ImageNet recipe: batch 8 x 128, 20 epochs of warm-up and 300 more, binary cross-entropy.

The authors draw the image size of every batch from 128 to 224, estimate BatchNorm's statistics again before each
evaluation, let drop path grow over the training, and distil the L models from the moving average (MESA); this engine
does not.
"""

_base_ = ["classification.py"]

model = dict(binary=True, mixup=dict(switch_prob=0.5))
train_dataloader = dict(dataset=dict(transform=dict(color_jitter=0.0, re_prob=0.0)))
train_cfg = dict(max_epochs=320)
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.1), clip_grad=dict(type="value", clip_value=2.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=20, end=320, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="TimmEMAHook", decay=0.9998, use_warmup=True)]
