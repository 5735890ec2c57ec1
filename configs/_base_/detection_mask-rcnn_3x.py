"""Mask R-CNN on COCO, 3x schedule: mmdet's own model with a timm backbone."""

_base_ = ["detection_3x.py", "mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

model = dict(backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN"))
