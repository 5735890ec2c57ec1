r"""Cascade Mask R-CNN with NAT-Small on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_nat_small_3x_coco \
    --launcher pytorch --amp --weights nat_small.pth

About 69 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 52.0, mask AP 44.9.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="nat_small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
