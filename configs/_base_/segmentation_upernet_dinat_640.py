"""UPerNet on ADE20K in crops of 640 pixels, for the large DiNATs."""

_base_ = ["segmentation_upernet_dinat.py"]

_crop = (640, 640)
_scale = (2560, 640)
model = dict(data_preprocessor=dict(size=_crop))
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="RandomResize", scale=_scale, ratio_range=(0.5, 2.0), keep_ratio=True),
            dict(type="RandomCrop", crop_size=_crop, cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ]
    )
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=_scale, keep_ratio=True),
            dict(type="LoadAnnotations", reduce_zero_label=True),
            dict(type="PackSegInputs"),
        ]
    )
)
test_dataloader = val_dataloader
