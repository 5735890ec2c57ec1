"""Classification on an image folder at 224 px: the DeiT recipe, which most families here were trained with.

300 epochs of AdamW, learning rate 1e-3 for a global batch of 1024, cosine with 5 epochs of warm-up, and 10 epochs more
at the lowest rate.
"""

_base_ = ["runtime.py"]

task = "classification"
data_root = None
# An image that cannot be read: "stop" before the training, or "skip" it with a count.
on_bad = "stop"

model = dict(
    type="ImageClassifier",
    num_classes=1000,
    label_smoothing=0.1,
    mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
)

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="TimmDataset",
        split="train",
        transform=dict(
            input_size=224,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            re_prob=0.25,
            re_mode="pixel",
            interpolation="bicubic",
        ),
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="TimmDataset",
        split="val",
        transform=dict(input_size=224, is_training=False, interpolation="bicubic", crop_pct=0.875),
    ),
)
val_evaluator = dict(type="TopK", topk=(1, 5))

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=310, val_interval=5)
val_cfg = dict()

optim_wrapper = dict(
    constructor="TimmParamGroups",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-2, begin=5, end=300, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
