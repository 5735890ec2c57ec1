"""What is inside a config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def dicts(node: Any) -> Iterator[Any]:
    """`node` and all dicts inside it, also in lists and tuples; an outer one before its inner ones."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for item in node:
            yield from dicts(item)
