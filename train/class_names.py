"""Class names that people can read, and terminals and pictures can show."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from hybridzoo.train.errors import UserError


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse names that are empty or hold control characters (line breaks, terminal codes, undecodable bytes).

    Args:
        what: what an error calls a name, "classes.txt: class".

    Raises:
        UserError: names the first such name.
    """
    for name in names:
        if not name.strip():
            raise UserError(f"{what} {name!r} is empty; give it a name")
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
            raise UserError(f"{what} {name!a} holds control characters; rename it")
