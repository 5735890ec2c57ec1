"""Segmentation into one's own classes: crops of 512 pixels from images whose shorter side is 512, times 0.5 to 2.

Test images are resized so that their shorter side is 512, and read whole.
"""

_base_ = ["everyday.py"]

task = "segmentation"
default_scope = "mmseg"

_crop = (512, 512)
_scale = (2048, 512)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=_scale, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="MaskScenes",
        data_prefix=dict(img_path="images/train", seg_map_path="masks/train"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=_scale, ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type="RandomCrop", crop_size=_crop, cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="MaskScenes",
        data_prefix=dict(img_path="images/val", seg_map_path="masks/val"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

sync_bn = "torch"  # over GPUs; one process keeps plain BatchNorm
optim_wrapper = dict(optimizer=dict(lr=2e-4))
default_hooks = dict(checkpoint=dict(save_best="mIoU"), visualization=dict(type="SegVisualizationHook"))
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
settle = dict(network=True, data=True, images=40_000, scratch=dict(lr=2e-4, longer=2))
custom_imports = dict(imports=["hybridzoo.train", "hybridzoo.train.segmentation"])
