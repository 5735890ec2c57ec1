r"""Cascade Mask R-CNN with NAT-Base on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_nat_base_3x_coco \
    --launcher pytorch --amp --weights nat_base.pth

About 79 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 52.3, mask AP 45.1.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="nat_base", drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
