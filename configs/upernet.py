"""UPerNet on one's own data: a class for every pixel. Xiao et al., arXiv 1807.10221; mmseg's model.

hybridzoo train upernet --model dinat_mini --data scenes
"""

_base_ = ["_base_/everyday_segmentation.py", "mmseg::_base_/models/upernet_swin.py"]

norm_cfg = dict(type="SyncBN", requires_grad=True)
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
    auxiliary_head=dict(in_channels=256, num_classes=150),
)
