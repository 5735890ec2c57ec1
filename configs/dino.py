"""DINO on one's own data: boxes by a transformer with denoising queries. Zhang et al., arXiv 2203.03605; mmdet's model.

hybridzoo train dino --model dinat_mini --data scenes

Four scales, 900 queries. It needs more images and a longer run than mask-rcnn, and then finds more. Images are padded
to squares, so that every one has a place for each query.
"""

_base_ = ["_base_/everyday_detection.py", "_base_/dino_model.py"]

_side = (640, 640)
_pad = dict(type="Pad", size=_side, pad_val=dict(img=(124, 116, 104)))
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=_side, keep_ratio=True),
    _pad,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="RandomResize", scale=_side, ratio_range=(0.5, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=_side, allow_negative_crop=True),
            dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
            dict(type="RandomFlip", prob=0.5),
            _pad,
            dict(type="PackDetInputs"),
        ]
    )
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4), clip_grad=dict(max_norm=0.1))
settle = dict(images=40_000, scratch=dict(lr=1e-4))
