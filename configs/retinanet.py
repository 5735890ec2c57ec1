"""RetinaNet on one's own data: boxes in one stage. Lin et al., arXiv 1708.02002; mmdet's model.

hybridzoo train retinanet --model dinat_mini --data scenes
"""

_base_ = ["_base_/everyday_detection.py", "mmdet::_base_/models/retinanet_r50_fpn.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="PyramidBackbone",
        name="dinat_mini",
        strides=(4, 8, 16, 32),
        out_norm="LN",
        norm_eval=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
