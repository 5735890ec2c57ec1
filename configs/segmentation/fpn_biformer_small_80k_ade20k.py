r"""Semantic FPN with BiFormer-S on ADE20K, 80,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train fpn_biformer_small_80k_ade20k \
    --launcher pytorch --amp --weights biformer_small_best.pth

About 8 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
48.9 mIoU.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_fpn.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_small", regions=8, drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
