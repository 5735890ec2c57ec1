r"""Cascade Mask R-CNN with DiNAT_s-Base on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_dinat_s_base_3x_coco \
    --launcher pytorch --amp --weights dinat_s_base_in1k_224.pth

About 82 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 52.6, mask AP 45.3.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_s_base", dilations="coco", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
