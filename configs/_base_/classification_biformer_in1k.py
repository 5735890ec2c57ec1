"""BiFormer's ImageNet recipe: global batch 8 x 128, float16, repeated augmentation, raw weights evaluated.

The authors decay the learning rate once an epoch; here it moves every iteration.  Their moving average (0.99996) was
saved but never evaluated: the published accuracies are the raw weights'.
"""

_base_ = ["classification.py"]

amp_dtype = "float16"
train_dataloader = dict(sampler=dict(_delete_=True, type="RepeatAugSampler", num_repeats=3))
custom_hooks = [dict(type="TimmEMAHook", decay=0.99996, evaluate="raw")]
