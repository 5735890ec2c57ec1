r"""UPerNet with BiFormer-B on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_biformer_base_160k_ade20k \
    --launcher pytorch --amp --weights biformer_base_best.pth

About 22 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
51.0 mIoU (51.7 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_base", regions=8, drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
