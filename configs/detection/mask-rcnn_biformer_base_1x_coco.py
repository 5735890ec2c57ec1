r"""Mask R-CNN with BiFormer-B on COCO, 12 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train mask-rcnn_biformer_base_1x_coco \
    --launcher pytorch --amp --weights biformer_base_best.pth

About 20 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 48.6, mask AP 43.7.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_mask-rcnn.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_base", regions=16, drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
