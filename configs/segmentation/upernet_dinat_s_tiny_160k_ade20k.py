r"""UPerNet with DiNAT_s-Tiny on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_dinat_s_tiny_160k_ade20k \
    --launcher pytorch --amp --weights dinat_s_tiny_in1k_224.pth

About 16 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
46.0 mIoU (47.4 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_s_tiny", dilations="ade20k_512", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
