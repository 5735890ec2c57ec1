r"""RetinaNet with BiFormer-B on COCO, 12 epochs.

torchrun --nproc-per-node 8 -m hybridzoo train retinanet_biformer_base_1x_coco \
    --launcher pytorch --amp --weights biformer_base_best.pth

About 19 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
box AP 47.1.
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/detection_retinanet.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_base", regions=16, drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
