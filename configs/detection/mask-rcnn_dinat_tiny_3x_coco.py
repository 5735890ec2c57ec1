r"""Mask R-CNN with DiNAT-Tiny on COCO, 36 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train mask-rcnn_dinat_tiny_3x_coco \
    --launcher pytorch --amp --weights dinat_tiny_in1k_224.pth

About 36 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 48.6, mask AP 43.5.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_mask-rcnn_3x.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_tiny", dilations="coco", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
