"""Conversion of names by tables: a row has a part of the published name and of ours. It works in both directions.

A part that starts with a dot may be anywhere in a name; any other part must be at its start. A part that ends with a
dot is followed by more; any other part is the end of the name. `*` is a number; both sides of a row have their numbers
in the same order. Rows are applied in order, each at most once; in reverse order from ours to published.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

Row = tuple[str, str]  # published, ours
Table = Sequence[Row]
Reshape = Callable[[Tensor], Tensor]

HEAD: Table = [(f"head.{part}", f"head.fc.{part}") for part in ("weight", "bias")]


def to_ours(name: str, table: Table) -> str:
    for published, ours in table:
        name = _replaced(name, published, ours)
    return name


def to_published(name: str, table: Table) -> str:
    for published, ours in reversed(table):
        name = _replaced(name, ours, published)
    return name


def shifted(published: str, ours: str, by: int, numbers: Iterable[int]) -> list[Row]:
    """A row for each of our `numbers`, which replaces `{}`; the published number is larger by `by`."""
    return [(published.format(number + by), ours.format(number)) for number in numbers]


def bias_table(tensor: Tensor) -> Tensor:
    """A table of relative positions as published by Swin, `(offsets, heads)`, indexed by query minus key, to ours.

    Ours is `(heads, rows, columns)`, indexed by key minus query; the window is square.
    """
    side = round(tensor.shape[0] ** 0.5)
    return tensor.t().unflatten(1, (side, side)).flip(1, 2).contiguous()


def published_bias_table(tensor: Tensor) -> Tensor:
    """The inverse of `bias_table`."""
    return tensor.flip(1, 2).flatten(1).t().contiguous()


def _replaced(name: str, old: str, new: str) -> str:
    return _pattern(old).sub(_replacement(new), name, count=1)


@functools.cache
def _pattern(part: str) -> re.Pattern[str]:
    begin, end = "" if part.startswith(".") else "^", "" if part.endswith(".") else "$"
    return re.compile(begin + re.escape(part).replace(r"\*", r"(\d+)") + end)


@functools.cache
def _replacement(part: str) -> str:
    pieces = part.split("*")
    return "".join(f"{piece}\\g<{i}>" for i, piece in enumerate(pieces[:-1], start=1)) + pieces[-1]
