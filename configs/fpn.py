"""Semantic FPN on one's own data: a class for every pixel, cheaply. Kirillov et al., arXiv 1901.02446; mmseg's model.

hybridzoo train fpn --model dinat_mini --data scenes
"""

_base_ = ["_base_/everyday_segmentation.py", "mmseg::_base_/models/fpn_r50.py"]

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(
        _delete_=True,
        type="PyramidBackbone",
        name="dinat_mini",
        strides=(4, 8, 16, 32),
        out_norm="LN",
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
    decode_head=dict(num_classes=150),
)
