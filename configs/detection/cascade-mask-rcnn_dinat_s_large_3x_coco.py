r"""Cascade Mask R-CNN with DiNAT_s-Large on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_dinat_s_large_3x_coco \
    --launcher pytorch --amp --weights dinat_s_large_in22k_224.pth

About 115 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 54.8, mask AP 47.2.
The weights are their ImageNet-22k checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_s_large", dilations="coco", drop_path_rate=0.6),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
