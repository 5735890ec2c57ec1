r"""UPerNet with DiNAT-Mini on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_dinat_mini_160k_ade20k \
    --launcher pytorch --amp --weights dinat_mini_in1k_224.pth

About 14 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
45.8 mIoU (47.2 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_mini", dilations="ade20k_512", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
