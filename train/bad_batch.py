"""Finds errors in a batch whose loss is not finite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_IGNORED = 255  # value of a mask without a class


def describe(batch: Any, files: Sequence[str] = (), classes: int | None = None) -> str:
    """One sentence on the first error in a batch, with the files that have it; empty if the data is correct.

    Args:
        batch: (images, targets) of classification, or `inputs` and `data_samples` of mmdet and mmseg.
        files: the images' names in the batch's order, if the batch has none.
        classes: their number, if known.
    """
    found: dict[str, list[str]] = {}
    for index, (image, sample) in enumerate(_samples(batch)):
        name = getattr(sample, "img_path", None) or (files[index] if index < len(files) else f"image {index + 1}")
        for fault in _faults(image, sample, classes):
            found.setdefault(fault, []).append(str(name))
    if not found:
        return ""
    fault, names = next(iter(found.items()))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the data has {fault}: {', '.join(names[:3])}{more}"


def files_of(loader: Any, batch_idx: int) -> list[str]:
    """The files of a batch, from the order in which the sampler draws them; empty if the order is unknown.

    Args:
        loader: the training loader, in the epoch of the batch.
        batch_idx: number of the batch in the epoch.
    """
    names = getattr(loader.dataset, "filenames", None)
    size, sampler = getattr(loader, "batch_size", None), loader.sampler
    if names is None or not size or hasattr(sampler, "skip"):  # an endless sampler may have started elsewhere
        return []
    every = names(absolute=True)
    return [every[int(index)] for index in itertools.islice(iter(sampler), batch_idx * size, (batch_idx + 1) * size)]


def number_of_classes(model: nn.Module) -> int | None:
    """Number of classes of a classifier, detector or segmentor, None if unknown."""
    parts = (getattr(model, name, None) for name in ("model", "bbox_head", "decode_head"))
    head = getattr(getattr(model, "roi_head", None), "bbox_head", None)
    for part in (*parts, head[0] if isinstance(head, nn.ModuleList) else head):
        if isinstance(found := getattr(part, "num_classes", None), int) and found > 0:
            return found
    return None


def _samples(batch: Any) -> Iterator[tuple[Tensor, Any]]:
    if isinstance(batch, dict):
        inputs, samples = batch.get("inputs", ()), batch.get("data_samples", ())
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, samples = batch
    else:
        return
    yield from zip(inputs, samples, strict=False)


def _faults(image: Any, sample: Any, classes: int | None) -> Iterator[str]:
    if isinstance(image, Tensor) and not _finite(image):
        yield "pixels that are not finite"
    if isinstance(sample, Tensor):
        labels: Tensor | None = sample
    else:
        instances = getattr(sample, "gt_instances", None)
        boxes = getattr(instances, "bboxes", None)
        boxes = getattr(boxes, "tensor", boxes)
        if isinstance(boxes, Tensor) and not _finite(boxes):
            yield "boxes that are not finite"
        elif isinstance(boxes, Tensor) and boxes.numel() and bool((boxes[:, 2:] < boxes[:, :2]).any()):
            yield "boxes with right < left or bottom < top"
        labels = getattr(instances, "labels", None)
        mask = getattr(getattr(sample, "gt_sem_seg", None), "data", None)
        if isinstance(mask, Tensor):
            labels = mask[mask != _IGNORED]
    if isinstance(labels, Tensor) and not _finite(labels):
        yield "targets that are not finite"
    elif isinstance(labels, Tensor) and labels.numel() and not labels.is_floating_point() and classes is not None:
        outside = labels[(labels < 0) | (labels >= classes)]
        if outside.numel():
            yield f"the label {int(outside.flatten()[0])}, of classes 0 to {classes - 1}"


def _finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
