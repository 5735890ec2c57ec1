"""RetinaNet on COCO, 1x schedule (12 epochs), AdamW; mmdet's own model, data and schedule with a timm backbone.

COCO lies under data/coco as published: annotations/instances_{train,val}2017.json, train2017/, val2017/.
A global batch of 16 as 8 GPUs x 2: scale the learning rate with it.
"""

_base_ = [
    "runtime.py",
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
]

task = "detection"
default_scope = "mmdet"

model = dict(backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN", norm_eval=True))

optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
