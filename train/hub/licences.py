"""The licence of a model that started from other weights, for the hub's model card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from hybridzoo.train.errors import UserError
from hybridzoo.train.provenance import Start

# Beginning of a licence's text -> the hub's identifier.
_KNOWN = {
    "mit": "mit",
    "apache-2.0": "apache-2.0",
    "apache 2.0": "apache-2.0",
    "apache license 2.0": "apache-2.0",
    "bsd-3-clause": "bsd-3-clause",
    "cc-by-nc-4.0": "cc-by-nc-4.0",
    "cc-by-4.0": "cc-by-4.0",
}
_WORD = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_NVIDIA = "https://github.com/NVlabs/FasterViT/blob/main/LICENSE"


@dataclasses.dataclass(frozen=True)
class Licence:
    """The licence of a model.

    Attributes:
        word: the hub's identifier, for the card's `license`.
        name, link: given if `word` is "other".
        text: Markdown for the card.
        warning: one line for the person who publishes the model, or empty.
    """

    word: str
    text: str
    name: str = ""
    link: str = ""
    warning: str = ""


def licence_of(starts: Sequence[Start], started: bool, chosen: str | None = None) -> Licence:
    """The licence of a model, from the weights that it started from; the strictest of their licences applies.

    Args:
        starts: see `hybridzoo.train.provenance`.
        started: the run started from weights; the file may not say from which.
        chosen: the hub's identifier of the licence that the model's author chooses.

    Raises:
        UserError: `chosen` is not an identifier, or allows more than the weights' licences.
    """
    if chosen is not None and not _WORD.fullmatch(chosen):
        raise UserError(f"--license {chosen!r}: is not an identifier of the hub, such as mit or apache-2.0")
    named = [start for start in starts if start["licence"]]
    listed = "".join(f"- `{start['name']}`: {_of(start)}\n" for start in named)
    bound = next((start for start in named if _non_commercial(start["licence"])), None)
    if bound is not None:
        return _non_commercial_licence(bound, listed, chosen)
    unstated = next((start for start in named if _hub_word(start["licence"]) is None), None)
    if chosen is not None:
        text = f"The author of these weights chose `{chosen}`."
        if named:
            text += f" They started from weights whose licences apply too:\n\n{listed}"
        return Licence(chosen, text.rstrip(), warning=_doubt(unstated) if unstated else "")
    if unstated is not None or (started and not named):
        what = _doubt(unstated) if unstated else "the file does not say from which weights its training started"
        text = f"Not settled: {what}. Ask the authors before you use these weights or pass them on."
        return Licence("unknown", f"{text}\n\n{listed}".rstrip(), warning=what)
    if named:
        words = {_hub_word(start["licence"]) or "" for start in named}
        text = f"These weights started from others, whose licences apply:\n\n{listed}"
        if len(words) == 1:
            return Licence(words.pop(), text.rstrip())
        return Licence("other", text.rstrip(), name="several-see-below")
    text = "Trained from scratch; the author of these weights has not chosen a licence yet."
    return Licence("unknown", text, warning="no licence is chosen; set it for the card, e.g. with --license mit")


def _non_commercial_licence(bound: Start, listed: str, chosen: str | None) -> Licence:
    word = _hub_word(bound["licence"])
    if chosen is not None and chosen != word and chosen != "other":
        raise UserError(
            f"--license {chosen}: the training started from {bound['name']}, which is for non-commercial use only "
            f"({bound['licence']}), and what came of it is too; leave --license out"
        )
    text = (
        "**For non-commercial use only**: training started from weights under such a licence, which binds what came of "
        f"them.\n\n{listed}"
    ).rstrip()
    nvidia = "nvidia" in bound["licence"].lower()
    name = "nvidia-source-code-license-nc" if nvidia else "non-commercial"
    warning = f"{bound['name']}, which the training started from, is for non-commercial use only ({bound['licence']})"
    if word is not None:
        return Licence(word, text, warning=warning)
    return Licence("other", text, name=name, link=_NVIDIA if nvidia else bound["url"], warning=warning)


def _hub_word(licence: str) -> str | None:
    """The hub's identifier of a card's licence, None if the authors state none or the hub has no identifier for it."""
    low = licence.lower().strip()
    if "re-host" in low:  # the line on the hub was not written by the authors
        return None
    found = [known for known in _KNOWN if low == known or low.startswith((f"{known} ", f"{known}("))]
    return _KNOWN[found[0]] if found else None


def _non_commercial(licence: str) -> bool:
    low = licence.lower()
    return "non-commercial" in low or "noncommercial" in low or re.search(r"\bnc\b", low) is not None


def _doubt(start: Start) -> str:
    return f"the licence of the weights that it started from is not clear ({start['name']}: {_of(start)})"


def _of(start: Start) -> str:
    if start["licence"] == "unknown":
        return "licence unknown"
    if "none stated" in start["licence"].lower():
        return "its authors state no licence"
    return start["licence"]
