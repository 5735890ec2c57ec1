"""UPerNet on ADE20K, 160,000 iterations, AdamW with linear decay; mmseg's own model and data, a timm backbone.

ADE20K lies under data/ade/ADEChallengeData2016 as published: images/{training,validation}, annotations/{training,...}.
A global batch of 16 as 8 GPUs x 2: scale the learning rate with it.
"""

_base_ = ["runtime.py", "mmseg::_base_/models/upernet_swin.py", "mmseg::_base_/datasets/ade20k.py"]

task = "segmentation"
default_scope = "mmseg"

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN"),
    decode_head=dict(num_classes=150, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=150, norm_cfg=norm_cfg),
)
sync_bn = "torch"  # over the GPUs, of backbone and heads alike; one process keeps plain BatchNorm

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, weight_decay=0.01),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160_000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=16_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16_000, save_best="mIoU"),
)
