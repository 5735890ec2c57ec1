"""Mask2Former on ADE20K, 160,000 iterations, crops of 640 pixels: the settings of its Swin-L, a timm backbone.

ADE20K lies under data/ade/ADEChallengeData2016 as published: images/{training,validation}, annotations/{training,...}.
A global batch of 16 as 8 GPUs x 2: scale the learning rate with it.
"""

_base_ = ["runtime.py", "mask2former_model.py", "mmseg::_base_/datasets/ade20k.py"]

task = "segmentation"
default_scope = "mmseg"

_crop = (640, 640)
model = dict(
    backbone=dict(strides=None, out_indices=(0, 1, 2, 3)),
    data_preprocessor=dict(size=_crop),
    decode_head=dict(num_queries=100),
)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(
                type="RandomChoiceResize",
                scales=[64 * tenth for tenth in range(5, 21)],
                resize_type="ResizeShortestEdge",
                max_size=2560,
            ),
            dict(type="RandomCrop", crop_size=_crop, cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ]
    ),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2560, 640), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

_embedding = dict(lr_mult=1.0, decay_mult=0.0)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01),
    paramwise_cfg=dict(
        custom_keys=dict(
            backbone=dict(lr_mult=0.1, decay_mult=1.0),
            query_embed=_embedding,
            query_feat=_embedding,
            level_embed=_embedding,
        ),
        norm_decay_mult=0.0,
    ),
)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=160_000)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160_000, val_interval=16_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=16_000, save_best="mIoU"),
)
