"""Cascade Mask R-CNN on COCO, 3x schedule: mmdet's own model with a timm backbone and the box heads of Swin's.

Each of the three heads has four convolutions and one linear layer, and is trained on decoded boxes.
"""

_base_ = ["detection_3x.py", "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"]


def _box_head(spread):
    return dict(
        type="ConvFCBBoxHead",
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=spread),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        norm_cfg=dict(type="BN", requires_grad=True),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )


model = dict(
    backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="LN"),
    roi_head=dict(
        bbox_head=[
            _box_head([0.1, 0.1, 0.2, 0.2]),
            _box_head([0.05, 0.05, 0.1, 0.1]),
            _box_head([0.033, 0.033, 0.067, 0.067]),
        ]
    ),
)
sync_bn = "torch"  # of the box heads, over the GPUs; one process keeps plain BatchNorm
