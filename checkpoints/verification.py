"""Is a file of weights what it should be: its hash, its names and shapes, its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hybridzoo.checkpoints import store
from hybridzoo.checkpoints.catalogue import Card, cards
from hybridzoo.checkpoints.conversion import check, split
from hybridzoo.checkpoints.files import hash_of, read_note
from hybridzoo.checkpoints.reading import CheckpointError, read_checkpoint, unwrap


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        path: the file.
        name: the card it was compared with.
        size: bytes.
        sha256: hexadecimal.
        known: where the hash that it was compared with comes from, `"card"` or `"record"`; empty if there is none.
        values: numbers in the network's tensors, those of batch norm's statistics among them.
        problems: everything wrong with it, a line each.
    """

    path: Path
    name: str
    size: int
    sha256: str
    known: str
    values: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path, name: str | None = None) -> Verification:
    """Check a published file, or one that `convert` wrote, without executing anything in it.

    Its hash has to be the card's or the recorded one where either is known; every tensor has to find its place in the
    network that the card describes, and to be finite.

    Args:
        path: the file.
        name: `model.tag`, or `model` for its default weights; default: what the store or `convert` noted beside the
            file, or what a file of this name in the store belongs to.

    Raises:
        CheckpointError: there is no such file.
        ValueError: `name` has no card, or is not given and cannot be guessed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    note = read_note(path.with_name(f"{path.name}.json"))
    card = store.find(name or str(note.get("name") or note.get("model") or "") or _owner(path))
    problems, digest, known, values = [], hash_of(path), "", 0
    recorded = str(
        note.get("sha256") or (store.record_of(card).get("sha256", "") if path == store.cached(card) else "")
    )
    if card.sha256 and "layout" not in note:  # a converted file is not the published one
        known, expected = "card", card.sha256.lower()
    else:
        known, expected = ("record", recorded) if recorded else ("", digest)
    if digest != expected:
        problems.append(f"SHA-256 is {digest}, its {known} says {expected}")
    try:
        state, _ = unwrap(read_checkpoint(path), path, card.wrapper_key, strict=False)
        parts = split(state, card.model)
        values = sum(tensor.numel() for tensor in parts.network.values())
        bad = [key for key, tensor in parts.network.items() if not torch.isfinite(tensor).all()]
        if bad:
            problems.append(f"{len(bad)} tensors are not finite, first {bad[0]}")
        check(parts, card.name, path)
    except (CheckpointError, ValueError) as error:
        problems.append(str(error))
    return Verification(path, card.name, path.stat().st_size, digest, known, values, tuple(problems))


def _owner(path: Path) -> str:
    """The card whose file lies here, or would be called so."""
    here = [card.name for card in cards(task=None) if card.url and _same(store.cached(card), path)]
    called: list[Card] = [card for card in cards(task=None) if card.url and store.file_name(card) == path.name]
    found = here or [card.name for card in called]
    if len(found) != 1:
        raise ValueError(f"name: {path} could be anything; say what it should be, such as biformer_tiny.in1k")
    return found[0]


def _same(one: Path | None, other: Path) -> bool:
    return one is not None and one.samefile(other)
