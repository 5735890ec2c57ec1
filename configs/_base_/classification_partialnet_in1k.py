"""The ImageNet recipe of PartialNet (and PATNet): 300 epochs of AdamW in float16, no moving average, no random erasing.

The authors train 280 epochs at 192 pixels and the last 20 at 224; one run of this engine has one size. To do the same
add `train_cfg.max_epochs=280`, then go on with `--resume` and `train_dataloader.dataset.transform.input_size=224`.
Every parameter is
decayed, norms and biases too, and the last stage's attention is trained with both its dropouts.

Their files say a batch of 256 with these learning rates, which were meant for 4096 (T0 to S) and 2048 (M, L), as here.
"""

_base_ = ["classification.py"]

amp_dtype = "float16"
model = dict(attn_drop_rate=0.1, proj_drop_rate=0.1, mixup=dict(cutmix_alpha=1.0, switch_prob=0.5))
train_dataloader = dict(
    batch_size=512,
    dataset=dict(transform=dict(input_size=192, color_jitter=0.0, re_prob=0.0)),
)
val_dataloader = dict(dataset=dict(transform=dict(crop_pct=0.9)))
train_cfg = dict(max_epochs=300)
optim_wrapper = dict(optimizer=dict(lr=4e-3), paramwise_cfg=dict(decay_1d=True))
param_scheduler = [
    dict(type="LinearLR", start_factor=2.5e-4, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=20, end=300, by_epoch=True, convert_to_iter_based=True),
]
