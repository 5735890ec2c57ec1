"""Files that exist completely or not at all: parts that can be resumed, small notes, locks, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

_LOG = logging.getLogger(__name__)
BLOCK = 1 << 20  # bytes read and written at a time


def hash_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class NoteError(ValueError):
    """A note that exists, but cannot be used."""


def read_note(path: Path) -> dict[str, Any]:
    """A small JSON object; empty if there is no file or it cannot be read."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def read_record(path: Path) -> dict[str, Any]:
    """The note of a file's hash; empty only if there is none.

    Raises:
        NoteError: the note cannot be read or has no SHA-256. Then its file must not be trusted.
    """
    if not os.path.lexists(path):
        return {}
    note = read_note(path)
    if not re.fullmatch(r"[0-9a-f]{64}", str(note.get("sha256"))):
        raise NoteError(f"{path}: is not a readable record of a file's hash; delete it if you trust the file beside it")
    return note


def write_note(path: Path, note: Mapping[str, Any]) -> None:
    """Write a small JSON object completely or not at all. A link with this name is replaced, not followed."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            file.write(json.dumps(note, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(target: Path) -> Iterator[None]:
    """A lock: one process at a time works on `target`, the others wait. If the process dies, the system frees it."""
    locks = target.parent / ".locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _LOG.warning("%s: another process is downloading it; waiting", target.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Part:
    """A partial download, `<file>.part`, and a note of its address and version, `<file>.part.json`.

    Args:
        target: the file that it becomes.
        url: its address; a part from another address is discarded.
    """

    def __init__(self, target: Path, url: str) -> None:
        self.url = url
        self.path = target.with_name(f"{target.name}.part")
        self._target = target
        self._note_path = target.with_name(f"{target.name}.part.json")
        self.note = read_note(self._note_path)
        if self.note.get("url") != url or self.path.is_symlink():
            self.discard()

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def complete(self) -> bool:
        return 0 < self.size() == self.note.get("size")

    def validator(self) -> str:
        """The mark of this version of the file: a strong ETag, or the date of its last change; empty if unknown."""
        etag = self.note.get("etag", "")
        return etag if etag and not etag.startswith("W/") else self.note.get("last_modified", "")

    def begin(self, headers: Any, size: int | None, promised: str = "") -> None:
        """Start over with the version of the file that the server's headers announce, and its SHA-256 if known."""
        self.discard()
        # The note is written first: a part without a note is never continued.
        note = dict(etag=headers.get("ETag", ""), last_modified=headers.get("Last-Modified", ""))
        self.note = {"url": self.url, "size": size, **note, "promised": promised}
        write_note(self._note_path, self.note)

    def append(self) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        return open(os.open(self.path, flags, 0o666), "ab")

    def discard(self) -> None:
        self.note = {}
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Rename the complete part to its target; a link with that name is replaced, not followed."""
        os.replace(self.path, self._target)
        self._note_path.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):  # so that the name survives a power cut too
            folder = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
