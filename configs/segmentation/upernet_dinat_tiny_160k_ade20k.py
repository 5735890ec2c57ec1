r"""UPerNet with DiNAT-Tiny on ADE20K, 160,000 iterations.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_dinat_tiny_160k_ade20k \
    --launcher pytorch --amp --weights dinat_tiny_in1k_224.pth

About 16 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
47.8 mIoU (48.8 over several scales).
The weights are their ImageNet checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_tiny", dilations="ade20k_512", drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
