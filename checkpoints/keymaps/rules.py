"""Renaming by rules: what the families' key maps have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence

Rules = Sequence[tuple[str, str]]  # (pattern, replacement), in the order of their application


def rename(key: str, rules: Rules) -> str:
    """`key` after every rule has been applied once, in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key, count=1)
    return key
