r"""UPerNet with NAT-Small on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_nat_small_160k_ade20k \
    --launcher pytorch --amp --weights nat_small.pth

About 20 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
48.0 mIoU (49.5 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="nat_small", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
