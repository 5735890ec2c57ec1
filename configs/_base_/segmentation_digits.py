"""A slim Semantic FPN on scenes of handwritten digits of about 128 px: minutes on two CPU cores.

mmseg's model with a narrow pyramid and head, trained on crops of 112 px, which fit into every scene. Digits must not be
flipped.
"""

_base_ = ["runtime.py", "mmseg::_base_/models/fpn_r50.py"]

task = "segmentation"
default_scope = "mmseg"
data_root = None
digits = dict(kind="scenes", seed=0)
on_bad = "stop"

_width = 96
_crop = (112, 112)
_norm = dict(type="BN", requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_crop),
    backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN"),
    neck=dict(out_channels=_width),
    decode_head=dict(
        in_channels=[_width] * 4, channels=64, num_classes=11, norm_cfg=_norm, loss_decode=dict(avg_non_ignore=True)
    ),
)

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="MaskScenes",
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomCrop", crop_size=_crop),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="MaskScenes",
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=5, val_interval=1)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmParamGroups",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
