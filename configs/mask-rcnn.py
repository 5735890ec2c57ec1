"""Mask R-CNN on one's own data: boxes and masks of objects. He et al., arXiv 1703.06870; mmdet's model.

hybridzoo train mask-rcnn --model dinat_mini --data scenes
"""

_base_ = ["_base_/everyday_instances.py", "mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

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
