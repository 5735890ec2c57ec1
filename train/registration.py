"""Registers this package with mmengine, mmdet and mmseg when `hybridzoo.train` imports it."""

import importlib.util

import hybridzoo.backbones
import hybridzoo.train.backbone
import hybridzoo.train.batchnorm
import hybridzoo.train.early_stop
import hybridzoo.train.hooks
import hybridzoo.train.necks
import hybridzoo.train.optim
import hybridzoo.train.progress
import hybridzoo.train.raw
import hybridzoo.train.tracking  # noqa: F401

if importlib.util.find_spec("mmcv") is not None:
    from hybridzoo.train import mmcv_ops

    mmcv_ops.install()
