"""Renaming by rules: what the families' key maps have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Replacement = str | Callable[[re.Match[str]], str]
Rules = Sequence[tuple[str, Replacement]]  # (pattern, replacement), in the order of their application


def rename(key: str, rules: Rules) -> str:
    """`key` after every rule has been applied once, in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key, count=1)
    return key
