"""Semantic FPN on ADE20K, 80,000 iterations, AdamW with cosine decay; mmseg's own model and data, a timm backbone.

ADE20K lies under data/ade/ADEChallengeData2016 as published: images/{training,validation}, annotations/{training,...}.
A global batch of 32 as 8 GPUs x 4: scale the learning rate with it.
"""

_base_ = ["runtime.py", "mmseg::_base_/models/fpn_r50.py", "mmseg::_base_/datasets/ade20k.py"]

task = "segmentation"
default_scope = "mmseg"

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN"),
    decode_head=dict(num_classes=150, norm_cfg=norm_cfg),
)
sync_bn = "torch"  # over the GPUs, of backbone and head alike; one process keeps plain BatchNorm

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=1000, end=80_000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80_000, val_interval=8_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=8_000, save_best="mIoU"),
)
