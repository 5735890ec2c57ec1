"""DINO on COCO, 12 epochs, as mmdet trains it: AdamW 1e-4, a tenth of it in the backbone, the rate falls at epoch 11.

COCO lies under data/coco as published: annotations/instances_{train,val}2017.json, train2017/, val2017/.
A global batch of 16 as 8 GPUs x 2: scale the learning rate with it.
"""

_base_ = ["detection_3x.py", "dino_model.py"]

model = dict(backbone=dict(strides=None, out_indices=(1, 2, 3)))
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
train_cfg = dict(max_epochs=12)
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1)]
optim_wrapper = dict(
    optimizer=dict(weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1),
    paramwise_cfg=dict(custom_keys=dict(_delete_=True, backbone=dict(lr_mult=0.1))),
)
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
val_evaluator = dict(metric="bbox")
test_evaluator = dict(metric="bbox")
