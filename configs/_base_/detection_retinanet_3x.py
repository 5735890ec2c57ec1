"""RetinaNet on COCO, 3x schedule with the multi-scale crops of DETR: mmdet's own model with a timm backbone.

Learning rate for a global batch of 16 as 8 GPUs x 2: half that of the two-stage detectors.
"""

_base_ = ["detection_3x.py", "mmdet::_base_/models/retinanet_r50_fpn.py"]

model = dict(backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN"))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
