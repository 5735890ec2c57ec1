"""The cards as Markdown, for docs/models.md and the families' pages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from hybridzoo.checkpoints.catalogue import Card, cards

_SERIES = re.compile(r"^(?:biformer|fastervit|efficientvit_\w+?(?=_)|\w+(?=_))")  # a model's name without its size


def markdown_table() -> str:
    """All cards as Markdown tables, one line for each: classifiers, then detectors and segmentors."""
    head = ("model and tag", "parameters", "GMACs", "input", "top-1", "weights", "licence of the weights", "parity")
    lines = [
        (
            f"`{card.name}`",
            _millions([card]),
            _decimals([card.gmacs], 2),
            f"{card.input_size[1]} x {card.input_size[2]}",
            "-" if card.top1 is None else f"{card.top1:.1f}",
            _where([card]),
            _licences([card]),
            "-" if card.parity is None else f"{card.parity:.0e}",
        )
        for card in sorted(cards(), key=lambda card: card.family)
    ]
    others = [card for card in cards(task=None) if card.task != "classification"]
    dense = [(f"`{card.name}`", card.task, _where([card]), _licences([card])) for card in others]
    return (
        _table(head, lines)
        + "\nParity is the difference between our logits and the published network's, in float64 and "
        "relative to their\nstandard deviation. It was measured for the models that have a number.\n\n"
        "## Detectors and segmentors\n\n"
        "A training can start from their backbones: "
        "`hybridzoo train CONFIG --weights dinat_mini.upernet_160k_ade20k`.\n\n"
        + _table(("model and tag", "task", "weights", "licence of the weights"), sorted(dense))
    )


def series_table() -> str:
    """One line for each series of models, with the range over its sizes."""
    head = ("models", "parameters", "GMACs", "input", "top-1, as reported", "weights", "licence of the weights")
    lines = []
    for series, group in itertools.groupby(sorted(cards(), key=lambda c: (c.family, _series(c))), key=_series):
        found = list(group)
        top1 = [card.top1 for card in found if card.top1 is not None]
        lines.append(
            (
                f"`{series}_…`",
                _millions(found),
                _decimals([card.gmacs for card in found], 1),
                _span([str(card.input_size[1]) for card in sorted(found, key=lambda card: card.input_size)]),
                _decimals(top1, 1) if top1 else "-",
                _where(found),
                _licences(found),
            )
        )
    return _table(head, lines)


def write(root: Path = Path()) -> None:
    """Write docs/models.md."""
    (root / "docs" / "models.md").write_text(page(), encoding="utf-8")


def page() -> str:
    """All of docs/models.md."""
    return (
        "# Models and published weights\n\nMade from the cards by `make docs/models.md`.\n\n"
        f"## Series\n\n{series_table()}\n## Files\n\n{markdown_table()}"
    )


def _series(card: Card) -> str:
    found = _SERIES.match(card.model)
    assert found is not None
    return found[0]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ("---",) * len(head), *lines))


def _span(ordered: Sequence[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} - {ordered[-1]}"


def _decimals(values: Iterable[float], places: int) -> str:
    return _span([f"{value:.{places}f}" for value in sorted(values)])


def _millions(found: Iterable[Card]) -> str:
    return f"{_decimals([card.params / 1e6 for card in found], 1)} M"


def _where(found: Iterable[Card]) -> str:
    """The hosts of the files, with a remark if the links are dead or untested."""
    hosts = {urlsplit(card.url).hostname or "" for card in found if card.url}
    states = {card.status for card in found if card.url}
    remark = {frozenset({"doubtful"}): " (untested)", frozenset({"dead"}): " (dead)"}.get(frozenset(states), "")
    return ", ".join(sorted(hosts)) + remark if hosts else "none public"


def _licences(found: Iterable[Card]) -> str:
    short = (re.split(r" \(|: |;", card.licence)[0] for card in found if card.licence)
    return ", ".join(dict.fromkeys(short)) or "-"
