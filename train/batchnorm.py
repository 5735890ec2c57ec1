"""What a network with BatchNorm needs of a run: no batch of a single image, statistics that belong to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from hybridzoo.train.weights import tell


def learning_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    """BatchNorms that use the batch's own statistics in training, unlike those that are frozen."""
    model.train()
    return (module for module in model.modules() if isinstance(module, _BatchNorm) and module.training)


def drop_a_last_one(loader: DataLoader, model: nn.Module) -> None:
    """Leave an epoch's last batch out if it is a single image and the model has BatchNorm, which learns nothing of one.

    Args:
        loader: of training; one without a batch sampler, as streaming datasets have, stays as it is.
        model: that it feeds.
    """
    batches: Any = loader.batch_sampler
    sampler: Any = loader.sampler
    endless = not hasattr(sampler, "__len__") or hasattr(sampler, "skip")  # the sign mmengine goes by
    if endless or getattr(batches, "drop_last", True) or batches.batch_size < 2:
        return
    images = len(sampler)
    if images % batches.batch_size == 1 and images > 1 and any(True for _ in learning_norms(model)):
        batches.drop_last = True
        tell(f"each epoch leaves one of the {images} images out: BatchNorm cannot learn of a last batch of one")
