"""ImageNet-22k to ImageNet-1k, as DiNAT-Large and DiNAT_s-Large were fine-tuned: global batch 8 x 64, float32.

30 epochs, the learning rate falling linearly from 5e-5 to nothing; neither mixup nor cutmix. The rest is the recipe of
the 300 epochs. The start is the 22k network: give it with `--weights`.
"""

_base_ = ["classification_dinat_in1k.py"]

model = dict(mixup=None)
train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=5e-5, weight_decay=1e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1.0, end_factor=0.0, begin=0, end=30, by_epoch=True, convert_to_iter_based=True),
]
