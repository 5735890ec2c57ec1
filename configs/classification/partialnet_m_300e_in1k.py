"""PartialNet-M on ImageNet-1k, 300 epochs, the authors' recipe for it; they report no accuracy of this form.

torchrun --nproc-per-node 8 -m hybridzoo train partialnet_m_300e_in1k --data IMAGENET --amp --launcher pytorch

The papers' form of the net: add `model.name=patnet_m`.
"""

_base_ = ["../_base_/classification_partialnet_large_in1k.py"]

model = dict(name="partialnet_m", drop_path_rate=0.2, mixup=dict(mixup_alpha=0.5))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m7-mstd0.5-inc1")))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), clip_grad=dict(max_norm=1.0))
