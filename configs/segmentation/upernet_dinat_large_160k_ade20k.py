r"""UPerNet with DiNAT-Large on ADE20K, 160,000 iterations, crops of 640 pixels.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_dinat_large_160k_ade20k \
    --launcher pytorch --weights dinat_large_in22k_224.pth

About 65 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float32:
54.0 mIoU (54.9 over several scales).
The weights are their ImageNet-22k checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat_640.py"]

model = dict(
    backbone=dict(name="dinat_large", dilations="ade20k_640", drop_path_rate=0.3),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
