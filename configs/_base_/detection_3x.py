"""COCO for 36 epochs with the multi-scale crops of DETR, AdamW: the "3x" schedule of Swin and its successors, no model.

COCO lies under data/coco as published: annotations/instances_{train,val}2017.json, train2017/, val2017/.
A global batch of 16 as 8 GPUs x 2: scale the learning rate with it. Norms and bias tables are not decayed.
"""

_base_ = ["runtime.py", "mmdet::_base_/datasets/coco_instance.py", "mmdet::_base_/schedules/schedule_1x.py"]

task = "detection"
default_scope = "mmdet"

_sides = [(side, 1333) for side in range(480, 801, 32)]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(
                type="RandomChoice",
                transforms=[
                    [dict(type="RandomChoiceResize", scales=_sides, keep_ratio=True)],
                    [
                        dict(
                            type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True
                        ),
                        dict(
                            type="RandomCrop",
                            crop_type="absolute_range",
                            crop_size=(384, 600),
                            allow_negative_crop=True,
                        ),
                        dict(type="RandomChoiceResize", scales=_sides, keep_ratio=True),
                    ],
                ],
            ),
            dict(type="PackDetInputs"),
        ]
    )
)

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0), "rpb": dict(decay_mult=0.0)}),
)
default_hooks = dict(checkpoint=dict(save_best="coco/segm_mAP"))
