"""What a check of data repaired, left out or noticed: counted by kind, the first of each kind named."""

from __future__ import annotations


class Notes:
    """Remarks in the order of their first appearance; `lines` says each kind once."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}
        self._said: list[str] = []

    def add(self, what: str, where: object = "", count: int = 1) -> None:
        """Count a remark.

        Args:
            what: the kind, as a phrase after a number: "annotations without area: computed from mask or box".
            where: the file or entry, kept of the first one.
            count: how many at once.
        """
        before, first = self._kinds.get(what, (0, str(where)))
        if count:
            self._kinds[what] = (before + count, first)

    def lines(self) -> list[str]:
        """One line a kind, "8 annotations without area: ...; the first: annotation id 3", then what was said."""
        shown = []
        for what, (count, first) in self._kinds.items():
            if count > 1:
                first = f"the first: {first}" if first else ""
            shown.append(f"{count} {what}" + (f"; {first}" if first else ""))
        return shown + self._said

    def say(self, line: str) -> None:
        """Keep a line as it is."""
        self._said.append(line)
