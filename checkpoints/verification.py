"""Checks a file of weights: its hash, names, shapes and numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hybridzoo.checkpoints import store
from hybridzoo.checkpoints.catalogue import Card, cards
from hybridzoo.checkpoints.conversion import check, split
from hybridzoo.checkpoints.files import NoteError, hash_of, read_note, read_record
from hybridzoo.checkpoints.reading import CheckpointError, read_checkpoint, unwrap
from hybridzoo.checkpoints.transfer import DownloadError


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of a check.

    Attributes:
        path: the file.
        name: the card that it was compared with.
        size: in bytes.
        sha256: hexadecimal.
        known: source of the expected hash: `"card"`, `"record"`, or `"hub"` (the file's name in the Hugging Face hub's
            cache); empty if there is none.
        values: number of values in the network's tensors, including the statistics of batch norms.
        problems: everything that is wrong, one line for each problem.
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

    Its hash must be that of the card or of the record, if there is one. All tensors must be finite and fit the network
    that the card describes.

    Args:
        path: the file.
        name: `model.tag`, or `model` for its default weights. Default: the name that the store or `convert` wrote to
            the note beside the file, or the card whose file in the store has this name.

    Raises:
        CheckpointError: there is no such file.
        ValueError: `name` has no card, or it is not given and cannot be found.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    beside = path.with_name(f"{path.name}.json")
    note = read_note(beside)
    card = store.find(name or str(note.get("name") or note.get("model") or "") or _owner(path))
    problems, digest, values = [], hash_of(path), 0
    try:
        known, expected = _expected(path, beside, card)
        if known and digest != expected:
            problems.append(f"SHA-256 is {digest}, its {known} says {expected}")
    except (NoteError, DownloadError) as error:
        known = ""
        problems.append(str(error))
    try:
        state, _ = unwrap(read_checkpoint(path), path, card.wrapper_key, strict=False)
        parts = split(state, card.model)
        left_out = tuple(map(str, note.get("left_out") or ())) if "layout" in note else ()
        parts = dataclasses.replace(parts, outside=parts.outside + left_out)  # `convert` wrote only a backbone
        values = sum(tensor.numel() for tensor in parts.network.values())
        check(parts, card.name, path)
    except (CheckpointError, ValueError) as error:
        problems.append(str(error))
    return Verification(path, card.name, path.stat().st_size, digest, known, values, tuple(problems))


def _expected(path: Path, beside: Path, card: Card) -> tuple[str, str]:
    """The source of the expected hash, and the hash; both empty if there is none.

    Raises:
        NoteError, DownloadError: a record exists, but cannot be read.
    """
    noted = read_record(beside)
    if "layout" in noted:  # a converted file is not the published one
        return "record", str(noted["sha256"])
    if card.sha256:
        return "card", card.sha256.lower()
    here = store.cached(card)
    if not noted and _same(here, path):
        noted = store.record_of(card, here)
    hub = store.hash_of_hub(path)
    return ("record", str(noted["sha256"])) if noted else ("hub", hub) if hub else ("", "")


def _owner(path: Path) -> str:
    """The card whose file is here, or whose file would have this name."""
    here = [card.name for card in cards(task=None) if card.url and _same(store.cached(card), path)]
    called: list[Card] = [card for card in cards(task=None) if card.url and store.file_name(card) == path.name]
    found = here or [card.name for card in called]
    if len(found) != 1:
        raise ValueError(f"name: {path} may contain any weights; name the expected ones, such as biformer_tiny.in1k")
    return found[0]


def _same(one: Path | None, other: Path) -> bool:
    return one is not None and one.samefile(other)
