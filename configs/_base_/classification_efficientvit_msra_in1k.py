"""The ImageNet recipe of EfficientViT (MSRA): batch 8 x 256, float32, repeated augmentation, raw weights evaluated.

Run it without `--amp`: the authors trained in float32. They clip gradients adaptively (AGC, 0.02), which this engine
does not have; gradients are not clipped here. Nothing is dropped, and biases, norms and attention tables are not
decayed. Their learning rate moves once an epoch, here every iteration.
"""

_base_ = ["classification.py"]

train_dataloader = dict(batch_size=256, sampler=dict(_delete_=True, type="RepeatAugSampler", num_repeats=3))
custom_hooks = [dict(type="TimmEMAHook", decay=0.99996, evaluate="raw")]
train_cfg = dict(max_epochs=300)
optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.025))
param_scheduler = [
    dict(type="LinearLR", start_factor=2.5e-4, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5, end=300, by_epoch=True, convert_to_iter_based=True),
]
