r"""Cascade Mask R-CNN with NAT-Tiny on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_nat_tiny_3x_coco \
    --launcher pytorch --amp --weights nat_tiny.pth

About 63 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 51.4, mask AP 44.5.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="nat_tiny", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
