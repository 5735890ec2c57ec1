"""Mask2Former on one's own data: a class for every pixel by masks. Cheng et al., arXiv 2112.01527; mmseg's model.

hybridzoo train mask2former --model dinat_mini --data scenes

It takes parts of mmdet. 100 queries; it needs more images and a longer run than upernet.
"""

_base_ = ["_base_/everyday_segmentation.py", "_base_/mask2former_model.py"]

optim_wrapper = dict(optimizer=dict(lr=1e-4), clip_grad=dict(max_norm=0.01))
settle = dict(images=80_000, scratch=dict(lr=1e-4))
