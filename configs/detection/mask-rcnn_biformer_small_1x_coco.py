r"""Mask R-CNN with BiFormer-S on COCO, 12 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train mask-rcnn_biformer_small_1x_coco \
    --launcher pytorch --amp --weights biformer_small_best.pth

About 12 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 47.8, mask AP 43.2 (48.1 / 43.6 when the authors ran it again for their release).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_mask-rcnn.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_small", regions=16, drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
