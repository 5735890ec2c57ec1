"""Training images that could be read at the start of the run, but not any more."""

from __future__ import annotations

import sys
from typing import Any

import torch

from hybridzoo.train.errors import UserError
from hybridzoo.train.images import ImageError
from hybridzoo.train.plain import printable


class Lost:
    """Counts them over all workers of a loader, and reports each once, in the worker that finds it.

    Args:
        count: images in the dataset.
    """

    def __init__(self, count: int) -> None:
        self.seen = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def add(self, index: int, error: ImageError) -> None:
        """Count the image at an index of the dataset.

        Raises:
            UserError: more than half of the images are lost, so the data itself is missing.
        """
        if self.seen[index]:
            return
        self.seen[index] = 1
        lost, count = int(self.seen.sum()), len(self.seen)
        if 2 * lost > count:
            raise UserError(f"{lost} of {count} training images cannot be read any more; the last: {error}") from error
        print(printable(f"skipping an image that cannot be read any more, {lost} so far: {error}"), file=sys.stderr)


class SkipsLost:
    """For a dataset of mmengine: a training image that cannot be read any more is replaced by another one."""

    lost: Lost | None = None

    def skip_lost(self: Any, on_bad: str) -> None:
        """Once the dataset is made: whether to (`on_bad="skip"`) or to stop, as in validation and tests."""
        self.lost = Lost(len(self)) if on_bad == "skip" and not self.test_mode else None

    def prepare_data(self, index: int) -> Any:
        try:
            return super().prepare_data(index)  # type: ignore[misc]  # the dataset's
        except ImageError as error:
            if self.lost is None:
                raise
            self.lost.add(index, error)
            return None  # mmengine draws another one
