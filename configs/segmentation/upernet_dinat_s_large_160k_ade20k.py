r"""UPerNet with DiNAT_s-Large on ADE20K, 160,000 iterations, crops of 640 pixels.

torchrun --nproc-per-node 8 -m hybridzoo train upernet_dinat_s_large_160k_ade20k \
    --launcher pytorch --amp --weights dinat_s_large_in22k_224.pth

About 72 hours on 8 A100 (an estimate). Published, in the authors' README and trained in float16:
53.4 mIoU (54.6 over several scales).
The weights are their ImageNet-22k checkpoint.
"""

_base_ = ["../_base_/segmentation_upernet_dinat_640.py"]

amp_dtype = "float16"
model = dict(
    backbone=dict(name="dinat_s_large", dilations="ade20k_640", drop_path_rate=0.3),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
