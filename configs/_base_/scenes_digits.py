"""What detection and segmentation of the embedded scenes share: the data, the optimiser, the loops."""

_base_ = ["runtime.py"]

data_root = None
digits = dict(kind="scenes", seed=0)
on_bad = "stop"

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmParamGroups",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
