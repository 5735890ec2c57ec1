"""Names by tables: a row for each part of a name, as published and as ours, read in either direction.

A part that begins with a dot is found anywhere in a name, any other one at its beginning. A part that ends with a dot
goes on, any other one ends the name. `*` is a number, which both sides of a row have in the same order. The rows are
applied one after the other, each at most once; from ours to published in reverse order.
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
    """A row for each of our `numbers`, in place of `{}`; the published number is larger by `by`."""
    return [(published.format(number + by), ours.format(number)) for number in numbers]


def bias_table(tensor: Tensor) -> Tensor:
    """Of relative positions, as Swin publishes it: `(offsets, heads)`, query minus key, in one row.

    Ours is `(heads, rows, columns)`, key minus query; the window is square.
    """
    side = round(tensor.shape[0] ** 0.5)
    return tensor.t().unflatten(1, (side, side)).flip(1, 2).contiguous()


def published_bias_table(tensor: Tensor) -> Tensor:
    """The way back from `bias_table`."""
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
