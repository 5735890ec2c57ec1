"""Classification on the embedded handwritten digits at 32 px: minutes on two CPU cores."""

_base_ = ["classification.py"]

digits = dict(kind="classification", seed=0)

model = dict(label_smoothing=0.1, mixup=None)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(
        # The drawings vary in colour and shape as it is; of a digit, a closer crop would cut parts off.
        transform=dict(
            _delete_=True,
            input_size=32,
            is_training=True,
            scale=(0.85, 1.0),
            ratio=(0.85, 1.18),
            hflip=0.0,
            color_jitter=None,
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(transform=dict(_delete_=True, input_size=32, is_training=False, crop_pct=1.0)),
)

train_cfg = dict(max_epochs=5, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-2, begin=1, end=5, by_epoch=True, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(fused=True), clip_grad=dict(max_norm=5.0))
