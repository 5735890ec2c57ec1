r"""Mask R-CNN with NAT-Small on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train mask-rcnn_nat_small_3x_coco \
    --launcher pytorch --amp --weights nat_small.pth

About 46 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 48.4, mask AP 43.2.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="nat_small", drop_path_rate=0.35),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
