"""UPerNet as NAT and DiNAT were trained with it: the bias tables are not decayed either."""

_base_ = ["segmentation_upernet.py"]

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0)}))
