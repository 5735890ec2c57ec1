"""Detection of one's own objects: training squares of 640 pixels, cut from images resized at random.

An image is resized to fit the square, times 0.5 to 1.5, and flipped; test images fit the square.
"""

_base_ = ["everyday.py"]

task = "detection"
default_scope = "mmdet"

_side = (640, 640)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=_side, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoScenes",
        ann_file="annotations/train.json",
        data_prefix=dict(img="images/train/"),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomResize", scale=_side, ratio_range=(0.5, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=_side, allow_negative_crop=True),
            dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
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
        type="CocoScenes",
        ann_file="annotations/val.json",
        data_prefix=dict(img="images/val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoScenesMetric", metric="bbox")
test_evaluator = val_evaluator
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(optimizer=dict(lr=2e-4))
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"), visualization=dict(type="DetVisualizationHook"))
visualizer = dict(type="DetLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
settle = dict(network=True, data=True, images=20_000, scratch=dict(lr=1e-4, longer=3))
custom_imports = dict(imports=["hybridzoo.train", "hybridzoo.train.detection"])
