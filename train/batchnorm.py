"""Networks with BatchNorm: no batches with a single image, and running statistics that fit the weights."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mmengine import Config
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, DefaultScope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import tell


def learning_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    """BatchNorms that use the batch's statistics in training; frozen ones are left out."""
    model.train()
    return (module for module in model.modules() if isinstance(module, _BatchNorm) and module.training)


def drop_a_last_one(loader: DataLoader, model: nn.Module) -> None:
    """Drop an epoch's last batch if it is a single image and the model has BatchNorm, which cannot learn from one.

    Args:
        loader: the training loader; one without a batch sampler (streaming datasets) stays unchanged.
        model: the model that is trained.
    """
    batches: Any = loader.batch_sampler
    sampler: Any = loader.sampler
    endless = not hasattr(sampler, "__len__") or hasattr(sampler, "skip")  # mmengine checks this attribute
    if endless or getattr(batches, "drop_last", True) or batches.batch_size < 2:
        return
    images = len(sampler)
    if images % batches.batch_size == 1 and images > 1 and any(True for _ in learning_norms(model)):
        batches.drop_last = True
        tell(f"each epoch leaves one of the {images} images out: BatchNorm cannot learn from a last batch of one image")


# Modules that need real memory, or more than an image, raise these; then nothing is known.
_UNKNOWN = (RuntimeError, NotImplementedError, AttributeError, TypeError)


class _SingleValue(Exception):
    """A BatchNorm got one value per channel."""


def single_images(config: Config) -> None:
    """Refuse batches of one image if a BatchNorm then gets a single value per channel, from which it cannot learn.

    The model is built and called on the meta device, and only if a batch is one image.

    Args:
        config: of a run, after its data is configured.

    Raises:
        UserError: names the BatchNorm, and what to do.
    """
    loader = config.get("train_dataloader") or {}
    if loader.get("batch_size") != 1 or get_world_size() > 1:
        return
    side = _side(config)
    found = _single_value(config, side)
    if found:
        raise UserError(
            f"train_dataloader.batch_size=1: with one image of {side} px the BatchNorm {found} gets a single value per "
            "channel and cannot learn; use --batch-size 2 or more"
        )


def _side(config: Config) -> int:
    """Side of the training images in pixels, None if the config does not say it."""
    if config.task == "classification":
        size = (config.train_dataloader.dataset.get("transform") or {}).get("input_size", 224)
    else:
        size = (config.model.get("data_preprocessor") or {}).get("size") or 512
    return int(size if isinstance(size, int) else min(size[-2:]))


def _single_value(config: Config, side: int) -> str:
    """Name of the first BatchNorm that gets a single value per channel for one square image; empty if none does."""

    def look(module: nn.Module, inputs: Any, name: str) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise _SingleValue(name)

    described = copy.deepcopy(config.model)
    described.pop("pretrained", None)
    with DefaultScope.overwrite_default_scope(config.get("default_scope", "mmengine")), torch.device("meta"):
        model: Any = MODELS.build(described)
    names = {module: name for name, module in model.named_modules()}
    for module in learning_norms(model):
        module.register_forward_pre_hook(partial(look, name=names[module]))
    image = torch.zeros(1, 3, side, side, device="meta")
    try:
        with torch.no_grad(), contextlib.suppress(*_UNKNOWN):
            if config.task == "classification":
                model(image)
            else:
                maps = model.extract_feat(image)
                for head in ("decode_head", "auxiliary_head", "rpn_head", "bbox_head"):
                    for part in _listed(getattr(model, head, None)):
                        with contextlib.suppress(*_UNKNOWN):
                            part(maps)
    except _SingleValue as single:
        return str(single)
    return ""


def _listed(head: Any) -> list[Any]:
    return list(head) if isinstance(head, nn.ModuleList) else [head] if head is not None else []


@HOOKS.register_module()
class BatchNormWarmUpHook(Hook):
    """A new BatchNorm's running statistics are the mean over its first batches, then the usual moving average.

    They start at mean 0 and variance 1. With momentum m, a fraction (1 - m) ** n of these values is left after n
    batches. If the true variance is 1e-9, as in EfficientViT's published initialisation, validation sees little else
    for hundreds of batches. Here batch n has the momentum max(m, 1 / n), so that the first batch replaces the initial
    values. Training does not read running statistics, so its results stay the same bits.

    Statistics that were loaded with weights are kept: their layers count as having seen 1 / m batches. BatchNorm's own
    buffer counts the batches, and checkpoints contain it, so that a run resumed in its first batches continues
    unchanged. Compiled models are not changed, because a compiler treats the momentum as a constant.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._momenta: dict[_BatchNorm, float] = {}

    def before_train(self, runner: Any) -> None:
        self._momenta = {}
        if runner.cfg.get("compile"):
            return
        for module in runner.model.modules():
            if not isinstance(module, _BatchNorm) or module.running_var is None or not module.momentum:
                continue
            self._momenta[module] = module.momentum
            if runner.iter == 0 and not _is_fresh(module):
                assert module.num_batches_tracked is not None
                module.num_batches_tracked.clamp_(min=math.ceil(1 / module.momentum))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        for module, momentum in list(self._momenta.items()):
            if module.training:  # else frozen
                module.momentum = max(momentum, 1 / (1 + int(module.num_batches_tracked or 0)))
                if module.momentum == momentum:
                    del self._momenta[module]

    def after_train(self, runner: Any) -> None:
        for module, momentum in self._momenta.items():
            module.momentum = momentum


def _is_fresh(module: _BatchNorm) -> bool:
    """Whether running statistics have PyTorch's initial values."""
    assert module.running_mean is not None
    assert module.running_var is not None
    return bool((module.running_mean == 0).all() and (module.running_var == 1).all())
