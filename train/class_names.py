"""Checks of class names: readable by people, and safe for terminals and pictures."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from hybridzoo.train.errors import UserError


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse names that are empty or hold control characters (line breaks, terminal codes, undecodable bytes).

    Args:
        what: the name of the thing in errors, e.g. "classes.txt: class".

    Raises:
        UserError: the message has the first such name.
    """
    for name in names:
        if not name.strip():
            raise UserError(f"{what} {name!r} is empty; give it a name")
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
            raise UserError(f"{what} {name!a} holds control characters; rename it")


def compare_with_model(data: Sequence[str], model: Sequence[str], where: str) -> None:
    """Refuse data with a class that a trained model does not have. Order and missing classes do not matter.

    Args:
        where: the data's names come from, for the message.

    Raises:
        UserError: the message has both lists.
    """
    extra = [name for name in data if name not in set(model)]
    if not extra:
        return
    more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
    missing = [name for name in model if name not in set(data)]
    lacking = f"; it knows {_listed(missing)}, which the data does not have" if missing else ""
    raise UserError(
        f"{where}: the model has no class {extra[0]!r}{more}, which cannot be scored{lacking}. "
        f"The data has {_listed(data)}; the model has {_listed(model)}"
    )


def _listed(names: Sequence[str], most: int = 40) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
