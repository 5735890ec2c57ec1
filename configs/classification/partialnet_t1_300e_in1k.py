"""PartialNet-T1 on ImageNet-1k, 300 epochs, the authors' recipe for it; they report no accuracy of this form.

torchrun --nproc-per-node 8 -m hybridzoo train partialnet_t1_300e_in1k --data IMAGENET --amp --launcher pytorch

The papers' form of the net: add `model.name=patnet_t1`.
"""

_base_ = ["../_base_/classification_partialnet_in1k.py"]

model = dict(name="partialnet_t1", drop_path_rate=0.02, mixup=dict(mixup_alpha=0.1))
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m3-mstd0.5-inc1")))
optim_wrapper = dict(optimizer=dict(weight_decay=0.01))
