"""Fine-tune a classifier on one's own photographs: `hybridzoo train NAME --data DIR` is this recipe with that network.

hybridzoo train finetune --model dinat_mini --data photographs

DIR holds train/<class>/ and val/<class>/. Light augmentation, AdamW, the network's published weights where they can be
had, with the learning rate falling from layer to layer towards the stem (as in BEiT, arXiv 2106.08254, section 3.1).
"""

_base_ = ["_base_/everyday.py"]

task = "classification"
_transform = dict(
    input_size=224,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

model = dict(type="ImageClassifier", name="dinat_mini", num_classes=1000, label_smoothing=0.1, drop_path_rate=0.1)

train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="TimmDataset",
        split="train",
        transform=dict(
            is_training=True, scale=(0.35, 1.0), auto_augment="rand-m6-mstd0.5-inc1", re_prob=0.1, **_transform
        ),
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="TimmDataset", split="val", transform=dict(is_training=False, crop_pct=0.875, **_transform)),
)
val_evaluator = dict(type="TopK", topk=(1, 5))
val_cfg = dict()

optim_wrapper = dict(optimizer=dict(lr=1e-4))
default_hooks = dict(checkpoint=dict(save_best="accuracy/top1"))
settle = dict(network=True, data=True, images=30_000, scratch=dict(lr=3e-4, longer=3))
custom_imports = dict(imports=["hybridzoo.train", "hybridzoo.train.classification"])
