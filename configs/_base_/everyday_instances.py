"""Detection with masks: as everyday_detection, and the masks are read, cut and measured too."""

_base_ = ["everyday_detection.py"]

_side = (640, 640)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=_side, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomResize", scale=_side, ratio_range=(0.5, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=_side, allow_negative_crop=True, recompute_bbox=True),
            dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoScenesMetric", metric=["bbox", "segm"])
test_evaluator = val_evaluator
