"""Cascade Mask R-CNN on one's own data: boxes refined three times, and masks. Cai and Vasconcelos, arXiv 1906.09756.

hybridzoo train cascade-mask-rcnn --model dinat_mini --data scenes
"""

_base_ = ["_base_/everyday_instances.py", "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"]

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
