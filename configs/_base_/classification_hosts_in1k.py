"""The ImageNet recipe of Agent Attention and InLine attention: 300 epochs of AdamW, no repeated augmentation.

Learning rates are for the global batch: the authors multiply all of them by batch / 512.
"""

_base_ = ["classification.py"]

train_cfg = dict(max_epochs=300)
