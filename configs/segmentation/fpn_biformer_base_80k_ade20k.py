r"""Semantic FPN with BiFormer-B on ADE20K, 80,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train fpn_biformer_base_80k_ade20k \
    --launcher pytorch --amp --weights biformer_base_best.pth

About 13 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
49.9 mIoU.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_fpn.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_base", regions=8, drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
