"""Markdown tables and cells that several pages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from hybridzoo.checkpoints import Card


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table and an empty line; a bar inside a cell is escaped."""
    rows = (head, ("---",) * len(head), *lines)
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows) + "\n"


def score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def size(card: Card) -> str:
    return f"{card.input_size[1]}\u00a0x\u00a0{card.input_size[2]}"  # not broken into lines


def link(card: Card) -> str:
    """Host of a file as a link; what is known of the link follows."""
    if not card.url:
        return "none public"
    states = {"doubtful": " (untested)", "dead": " (dead)", "ok": ""}
    return f"[{urlsplit(card.url).hostname}]({card.url}){states.get(card.status, '')}"
