"""MaxViT's ImageNet recipe: a global batch of 4096 as 8 x 512, mixup without cutmix, a moving average.

The authors train in bfloat16 on TPUs, with RandAugment of TensorFlow (2 layers, magnitude 15) and BatchNorm over groups
of cores; timm's RandAugment stands here. Their 10,000 warm-up steps are 32 epochs of such batches.
"""

_base_ = ["classification.py"]

model = dict(mixup=dict(mixup_alpha=0.8, cutmix_alpha=0.0, switch_prob=0.0))
train_dataloader = dict(
    batch_size=512, dataset=dict(transform=dict(auto_augment="rand-m15-n2", color_jitter=0.0, re_prob=0.0))
)
train_cfg = dict(max_epochs=300)
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=32, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=32, end=300, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="TimmEMAHook", decay=0.9999)]
