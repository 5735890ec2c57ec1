"""PartialNet's ImageNet recipe for M and L: half the batch and the learning rate of the smaller ones."""

_base_ = ["classification_partialnet_in1k.py"]

train_dataloader = dict(batch_size=256)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=5e-4, begin=0, end=20, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=20, end=300, by_epoch=True, convert_to_iter_based=True),
]
