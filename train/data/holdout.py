"""A validation set taken from the training set, for data without one.

The names of the images and a seed decide which ones are held out: the result is the same when a run is resumed or
tested, and on every machine. Images that are added later move few of the others. The data folder is not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hybridzoo.train.errors import UserError


@dataclass(frozen=True)
class Holdout:
    """How the training images are divided.

    Attributes:
        fraction: fraction of the images that is held out, between 0 and 1.
        seed: seed of the random choice.
        held: True for the held-out images, False for the others.
    """

    fraction: float
    seed: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"--val-fraction {self.fraction:g}: give a fraction between 0 and 1, such as 0.2")

    def part(self, held: bool) -> Holdout:
        """One part of the same division."""
        return replace(self, held=held)

    def options(self) -> dict[str, Any]:
        """Plain values for a config; `Holdout(**options)` gives the same object."""
        return asdict(self)

    def keep(self, names: Sequence[str], groups: Sequence[str] | None = None) -> list[bool]:
        """Whether each image is in this part.

        Args:
            names: paths of the images below their folder.
            groups: the class of each; every class is divided, with at least one image in each part.

        Raises:
            UserError: fewer than two images in total, or in a class.
        """
        members: dict[str, list[int]] = {}
        for index, group in enumerate(groups if groups is not None else [""] * len(names)):
            members.setdefault(group, []).append(index)
        held: set[int] = set()
        for group, indices in members.items():
            if len(indices) < 2:
                what = f"class {group!r} has one image" if groups is not None else f"there is {len(indices)} image"
                raise UserError(f"--val-fraction {self.fraction:g}: {what}, which cannot be in both parts; add some")
            count = min(max(round(len(indices) * self.fraction), 1), len(indices) - 1)
            held.update(sorted(indices, key=lambda index: self._draw(names[index]))[:count])
        return [(index in held) == self.held for index in range(len(names))]

    def _draw(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def holdout_of(options: Mapping[str, Any] | None) -> Holdout | None:
    """The `Holdout` of `options` from a config or a checkpoint; None for None.

    Raises:
        UserError: invalid options.
    """
    if not options:
        return None
    fraction, seed = options.get("fraction"), options.get("seed", 0)
    if not isinstance(fraction, float) or type(seed) is not int:
        raise UserError(f"val_fraction: expected a fraction and a seed, got {dict(options)!r}")
    return Holdout(fraction, seed, options.get("held") is True)
