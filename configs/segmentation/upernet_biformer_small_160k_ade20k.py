r"""UPerNet with BiFormer-S on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_biformer_small_160k_ade20k \
    --launcher pytorch --amp --weights biformer_small_best.pth

About 16 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
49.8 mIoU (50.8 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="biformer_small", regions=8, drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
