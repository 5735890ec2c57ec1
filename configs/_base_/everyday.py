"""What the recipes for one's own data share: 50 to 50,000 images, one machine, published weights where there are some.

`settle` lists what `hybridzoo train` works out when it knows the network, the data and the machine:

    network      widths, strides, input size, normalisation and layer decay follow from the network
    data         batch size, workers and moving average follow from the number of images, the length too
    images       how many training images a run sees where nobody says `--epochs`
    scratch      learning rate where no weights are to be had, and how many times longer such a run is
"""

_base_ = ["runtime.py"]

data_root = None
on_bad = "stop"
start = "published"  # weights to start from where nobody gives --weights: the network's published ones

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="TimmParamGroups",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(layer_decay=0.8859),
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=20, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=1, by_epoch=True, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=1, end=20, by_epoch=True, convert_to_iter_based=True),
]
custom_imports = dict(imports=["hybridzoo.train"], allow_failed_imports=False)
