"""Notes of a data check: what was repaired, left out or noticed, counted by kind, with the first of each kind."""

from __future__ import annotations


class Notes:
    """Notes in the order of their first appearance; `lines` has each kind once."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}
        self._said: list[str] = []

    def add(self, what: str, where: object = "", count: int = 1) -> None:
        """Count a note.

        Args:
            what: the kind, as a phrase that follows a number: "annotations without area: computed from mask or box".
            where: the file or entry; the first one is kept.
            count: how many at once.
        """
        before, first = self._kinds.get(what, (0, str(where)))
        if count:
            self._kinds[what] = (before + count, first)

    def lines(self) -> list[str]:
        """One line for each kind, "8 annotations without area: ...; the first: annotation id 3", then other lines."""
        shown = []
        for what, (count, first) in self._kinds.items():
            if count > 1:
                first = f"the first: {first}" if first else ""
            shown.append(f"{count} {what}" + (f"; {first}" if first else ""))
        return shown + self._said

    def say(self, line: str) -> None:
        """Add a line of text."""
        self._said.append(line)
