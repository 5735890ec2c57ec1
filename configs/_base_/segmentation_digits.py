"""SegFormer's head on scenes of handwritten digits of about 96 px: minutes on two CPU cores.

mmseg's model with a narrow head, trained on crops of 88 px, which fit into every scene. Digits must not be flipped.
"""

_base_ = ["scenes_digits.py", "mmseg::_base_/models/segformer_mit-b0.py"]

task = "segmentation"
default_scope = "mmseg"

_crop = (88, 88)
model = dict(
    data_preprocessor=dict(size=_crop),
    backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="BN"),
    decode_head=dict(
        channels=128,
        num_classes=11,
        dropout_ratio=0.0,
        norm_cfg=dict(type="BN"),
        # mmseg's 0.01 starts all ten digits alike; telling them apart then takes several times as long
        init_cfg=dict(type="Normal", std=0.1, override=dict(name="conv_seg")),
        loss_decode=dict(avg_non_ignore=True),
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

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=6, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=True, begin=0, end=6, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
custom_hooks = [dict(type="TimmEMAHook", decay=0.99, use_warmup=True)]
