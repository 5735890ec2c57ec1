"""PartialNet-T0 on ImageNet-1k, 300 epochs, the authors' recipe for it; they report no accuracy of this form.

torchrun --nproc-per-node 8 -m hybridzoo train partialnet_t0_300e_in1k --data IMAGENET --amp --launcher pytorch

The papers' form of the net: add `model.name=patnet_t0`.
"""

_base_ = ["../_base_/classification_partialnet_in1k.py"]

model = dict(name="partialnet_t0", drop_path_rate=0.0, mixup=dict(mixup_alpha=0.05))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment=None)))
optim_wrapper = dict(optimizer=dict(weight_decay=0.005))
