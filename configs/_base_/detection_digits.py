"""A slim Mask R-CNN on scenes of handwritten digits of about 96 px: minutes on two CPU cores.

mmdet's model with a quarter of its width: narrow pyramid, small box head, two mask convolutions, few sampled regions.
Long scenes are cropped to 96 px, so that no batch is padded to more. Digits must not be flipped.
"""

_base_ = ["scenes_digits.py", "mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

task = "detection"
default_scope = "mmdet"

_width = 64
_strides = [4, 8, 16, 32]
model = dict(
    backbone=dict(_delete_=True, type="PyramidBackbone", out_norm="BN"),
    neck=dict(out_channels=_width, num_outs=4),
    rpn_head=dict(in_channels=_width, feat_channels=_width, anchor_generator=dict(strides=_strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=_width, finest_scale=28, roi_layer=dict(sampling_ratio=2)),
        mask_roi_extractor=dict(out_channels=_width, finest_scale=28, roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=_width, fc_out_channels=256, num_classes=10),
        mask_head=dict(in_channels=_width, conv_out_channels=_width, num_convs=2, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)

train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoScenes",
        ann_file="annotations/train.json",
        data_prefix=dict(img="images/train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomCrop", crop_size=(96, 96), recompute_bbox=True),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoScenes",
        ann_file="annotations/val.json",
        data_prefix=dict(img="images/val/"),
        test_mode=True,
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale_factor=1.0),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoScenesMetric", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP_50"))
