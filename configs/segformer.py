"""SegFormer's head on one's own data: a class for every pixel by linear layers. Xie et al., arXiv 2105.15203.

hybridzoo train segformer --model dinat_mini --data scenes
"""

_base_ = ["_base_/everyday_segmentation.py", "mmseg::_base_/models/segformer_mit-b0.py"]

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
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=150),
)
