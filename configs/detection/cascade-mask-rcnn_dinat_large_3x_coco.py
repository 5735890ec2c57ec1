r"""Cascade Mask R-CNN with DiNAT-Large on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_dinat_large_3x_coco \
    --launcher pytorch --weights dinat_large_in22k_224.pth

About 108 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float32:
box AP 55.3, mask AP 47.8.
The weights are their ImageNet-22k checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

model = dict(
    backbone=dict(name="dinat_large", dilations="coco", drop_path_rate=0.6),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
