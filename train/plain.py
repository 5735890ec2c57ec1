"""Makes names and messages safe to show on a terminal or in a picture."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""`text` with escapes for characters that are not visible: "a\nb" becomes "a\\nb".

    Control characters move a terminal's cursor or change colours, others change the writing direction, and text in a
    picture cannot have line breaks. Letters of every script are kept.
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shown(value: object, most: int = 40) -> str:
    """Any value in one line: text and numbers as Python literals, otherwise the type."""
    if isinstance(value, str | bytes | int | float | None):
        text = repr(value[: 2 * most] if isinstance(value, str | bytes) else value)
        return text if len(text) <= most else f"{text[:most]}..."
    return f"a {type(value).__name__}"
