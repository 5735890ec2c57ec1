"""A validation set cut from the training set, for data that have none.

Which images are held out follows from their names and a seed alone: it is the same when a run is resumed or tested and
on every machine, and images that are added later move few of the others. The data folder is not touched.
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
        fraction: share of the images that is held out, between 0 and 1.
        seed: of the draw.
        held: which of the two parts is meant: the held-out images, else the others.
    """

    fraction: float
    seed: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"--val-fraction {self.fraction:g}: give a share between 0 and 1, such as 0.2")

    def part(self, held: bool) -> Holdout:
        """The same division, and one of its parts."""
        return replace(self, held=held)

    def options(self) -> dict[str, Any]:
        """As a config holds it; `Holdout(**options)` is the same again."""
        return asdict(self)

    def keep(self, names: Sequence[str], groups: Sequence[str] | None = None) -> list[bool]:
        """Whether each image is in this part.

        Args:
            names: of the images, below their folder.
            groups: the class of each; every class gives its share, and keeps at least one image of either part.

        Raises:
            UserError: fewer than two images, in all or of a class.
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
    """What `Holdout.options` gave, from a config or a checkpoint; None of nothing.

    Raises:
        UserError: no such options.
    """
    if not options:
        return None
    fraction, seed = options.get("fraction"), options.get("seed", 0)
    if not isinstance(fraction, float) or type(seed) is not int:
        raise UserError(f"val_fraction: expected a fraction and a seed, got {dict(options)!r}")
    return Holdout(fraction, seed, options.get("held") is True)
