"""FasterViT's ImageNet recipe: a global batch of 4096 as 32 x 128, 310 epochs, a moving average.

From a quarter of the training on the authors add a distillation loss from the moving average (MESA), which this engine
does not have. Weight decays are those of their YAML files; their TRAINING.md has others.
"""

_base_ = ["classification.py"]

amp_dtype = "float16"
train_dataloader = dict(dataset=dict(transform=dict(interpolation="random")))
optim_wrapper = dict(optimizer=dict(lr=5e-3), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=2e-4, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=5e-6, begin=20, end=300, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="TimmEMAHook", decay=0.9998)]
