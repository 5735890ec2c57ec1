"""Names and messages as a terminal or a picture may show them, whoever chose them."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with an escape in place of what is no visible sign: "a\nb" becomes "a\\nb".

    Control characters move a terminal's cursor or change its colours, others turn the direction of writing, and a
    picture's text takes no line break. Letters of every script stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shown(value: object, most: int = 40) -> str:
    """Any value as a part of one line: text and numbers as Python writes them, of all else the kind."""
    if isinstance(value, str | bytes | int | float | None):
        text = repr(value[: 2 * most] if isinstance(value, str | bytes) else value)
        return text if len(text) <= most else f"{text[:most]}..."
    return f"a {type(value).__name__}"
