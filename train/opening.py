"""The lines at the start of a run: data, network, weights, device, length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop

from hybridzoo.train.compose import network_of

_NAMED = 8  # classes that are listed by name


def lines(runner: Any) -> Iterator[str]:
    """The lines for a runner that is about to train."""
    loop = runner.train_loop
    sizes = [f"{_count(loop.dataloader.dataset)} training images"]
    if runner.val_loop is not None:
        sizes.append(f"{_count(runner.val_loop.dataloader.dataset)} validation images")
    classes = [str(name) for name in (getattr(loop.dataloader.dataset, "metainfo", None) or {}).get("classes") or ()]
    named = ", ".join(classes[:_NAMED]) + (", ..." if len(classes) > _NAMED else "")
    yield f"data: {', '.join(sizes)}" + (f"; {len(classes)} classes: {named}" if classes else "")

    model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
    name, kind = network_of(runner.cfg).get("name", ""), type(model).__name__
    all_of_them = sum(parameter.numel() for parameter in model.parameters())
    learn = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    part = "" if learn == all_of_them else f", {_short(learn)} of them learn"
    whole = name if runner.cfg.task == "classification" else f"{kind} on {name}"
    yield f"network: {whole}, {_short(all_of_them)} parameters{part}"
    yield f"weights: {getattr(runner, 'origin', '') or 'from scratch'}"

    device = next(model.parameters()).device
    threads = torch.get_num_threads()
    what = f"{threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    processes = get_world_size()
    more = f", {processes} processes" if processes > 1 else ""
    precision = _precision(runner.optim_wrapper)
    yield f"device: {device} ({what}){more}, {precision}"

    batch = getattr(loop.dataloader, "batch_size", None) or runner.cfg.train_dataloader.get("batch_size")
    if isinstance(loop, EpochBasedTrainLoop):
        epochs = "1 epoch" if loop.max_epochs == 1 else f"{loop.max_epochs} epochs"
        length = f"{epochs} of {len(loop.dataloader)} iterations"
    else:
        length = f"{loop.max_iters} iterations"
    yield f"run: {length}, {batch} images each" + (f" and process, {batch * processes} in all" if more else "")


def _count(dataset: Any) -> str:
    try:
        return f"{len(dataset):,}"
    except TypeError:  # a stream of shards
        return "an unknown number of"


def _short(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 10_000 else f"{number:,}"


def _precision(wrapper: Any) -> str:
    dtype = getattr(wrapper, "cast_dtype", None)
    return f"mixed precision ({str(dtype).removeprefix('torch.')})" if dtype is not None else "float32"
