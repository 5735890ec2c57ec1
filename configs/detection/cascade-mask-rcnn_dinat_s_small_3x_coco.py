r"""Cascade Mask R-CNN with DiNAT_s-Small on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train cascade-mask-rcnn_dinat_s_small_3x_coco \
    --launcher pytorch --amp --weights dinat_s_small_in1k_224.pth

About 70 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 52.3, mask AP 45.2.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_cascade-mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_s_small", dilations="coco", drop_path_rate=0.5),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
