r"""UPerNet with DiNAT-Small on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_dinat_small_160k_ade20k \
    --launcher pytorch --amp --weights dinat_small_in1k_224.pth

About 20 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
48.9 mIoU (49.9 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_small", dilations="ade20k_512", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
