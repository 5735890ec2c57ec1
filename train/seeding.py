"""Randomness that depends only on the run's seed and the position in the run.

A resumed run then equals an uninterrupted one. The images of a run do not depend on the number of loader workers or,
for equal global batches, of processes. mmengine seeds each worker with the same number in every epoch, so that epochs
repeat their augmentations; with persistent workers its runs cannot be resumed exactly.

Every sample's augmentation is seeded by (seed, epoch, position in the epoch): the sampler sends the seed along with the
index.  What happens on the device (mixup, drop path) is seeded by (seed, rank, iteration): see ``hooks.SeedHook``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, DATASETS
from timm.data.distributed_sampler import RepeatAugSampler as TimmRepeatAugSampler
from torch.utils.data import Sampler


def seed_all(*key: int, devices: bool = True) -> None:
    """Seed ``random``, NumPy and torch from the non-negative integers in ``key``.

    Args:
        key: any number of integers; different keys give independent streams.
        devices: also seed the accelerators' generators; False in loader workers.
    """
    first, second, third = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    if devices:
        torch.manual_seed(third)
    else:
        torch.default_generator.manual_seed(third)


class Draw(int):
    """A sample's index that also carries the key of its randomness."""

    key: tuple[int, ...]

    def __new__(cls, index: int, key: tuple[int, ...]) -> Draw:
        self = super().__new__(cls, index)
        self.key = key
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Draw, (int(self), self.key)


class DrawSampler(Sampler):
    """Any mmengine sampler, yielding :class:`Draw` instead of plain indices.

    Args:
        dataset: passed on to ``sampler``.
        sampler: config of the sampler to wrap.
        seed: of the run.
    """

    def __init__(self, dataset: Any, sampler: dict[str, Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0
        self._skipped = 0
        self.sampler = DATA_SAMPLERS.build(sampler, default_args={"dataset": dataset, "seed": seed})
        if hasattr(self.sampler, "skip"):  # mmengine uses this attribute to decide how to resume
            self.skip = self._skip

    def __iter__(self) -> Iterator[Draw]:
        rank, world_size = get_dist_info()
        for position, index in zip(itertools.count(self._skipped), self.sampler, strict=False):
            yield Draw(index, (self.seed, self.epoch, position * world_size + rank))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _skip(self, num_samples: int) -> None:
        self.sampler.skip(num_samples)
        self._skipped = num_samples


class SeededDataset:
    """Wraps a dataset; a sample is seeded by the :class:`Draw` that indexes it.

    Args:
        dataset: config of the dataset to wrap.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        object.__setattr__(self, "_dataset", DATASETS.build(dataset))

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, Draw):
            seed_all(*index.key, devices=False)
        return self._dataset[int(index)]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if (
            name.startswith("__") or name == "_dataset"
        ):  # copying and unpickling read attributes before there is a dataset
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)  # hooks replace pipelines this way

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "_dataset", state["_dataset"])


def seeded_dataloader(dataloader: dict[str, Any], seed: int) -> dict[str, Any]:
    """The config of a training loader with its sampler and dataset wrapped.

    A loader without a sampler (streaming datasets) is returned unchanged.
    """
    if not dataloader.get("sampler"):
        return dataloader
    return {
        **dataloader,
        "dataset": {"type": SeededDataset, "dataset": dataloader["dataset"]},
        "sampler": {"type": DrawSampler, "sampler": dataloader["sampler"], "seed": seed},
    }


@DATA_SAMPLERS.register_module()
class RepeatAugSampler(TimmRepeatAugSampler):
    """timm's sampler for repeated augmentation (each image several times per global batch), as an mmengine sampler.

    Args:
        dataset: sized.
        seed: of the run.
        num_repeats: copies of each image; the epoch keeps its length.
    """

    def __init__(self, dataset: Any, seed: int = 0, num_repeats: int = 3) -> None:
        rank, world_size = get_dist_info()
        super().__init__(dataset, num_replicas=world_size, rank=rank, num_repeats=num_repeats)
        self.seed = seed
        self.epoch = seed

    def set_epoch(self, epoch: int) -> None:
        self.epoch = self.seed + epoch
