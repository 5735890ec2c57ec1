"""Exports a network: record, write, compare with PyTorch at several sizes and batches, and only then keep the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridzoo.train.errors import UserError, reason
from hybridzoo.train.export.capture import Sizes, tries
from hybridzoo.train.export.comparing import TOLERANCE, compare
from hybridzoo.train.export.formats import FORMATS, Format
from hybridzoo.train.export.sources import Source


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: the file.
        files: all files that belong to it, including `path`.
        sizes: the images that it accepts.
        error: largest difference from PyTorch in the comparison, relative to an output's standard deviation.
        why: why the file does not accept every size; empty if it does, or if it was not requested.
    """

    path: Path
    files: tuple[Path, ...]
    sizes: Sizes
    error: float
    why: str


def export(
    source: Source, to: str, out: Path, *, dynamic: bool = True, force: bool = False, tolerance: float = TOLERANCE
) -> Exported:
    """Write a network as a file that computes the same.

    Args:
        source: from `sources`.
        to: a key of `FORMATS`.
        out: the file; a missing folder is created.
        dynamic: accept any height and width if the network allows it, otherwise only `source.size`.
        force: replace an existing file.
        tolerance: see `TOLERANCE`.

    Raises:
        UserError: the file exists already, the folder cannot be written, the format does not support the network, or
            the file computes something else. Then no file is written.
    """
    form = FORMATS[to]
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"--out {out}: is there already; name another file, or replace it (--force)")
    why, failure = "", None
    with _workplace(out) as folder:
        path = folder / out.name
        for wide in (True, False) if dynamic else (False,):
            try:
                sizes, error, why = _attempt(form, source, path, wide, why, tolerance)
                break
            except UserError:
                raise
            except Exception as problem:  # exporters raise many types of exceptions
                why, failure = reason(problem), problem
        else:
            raise UserError(f"{form.title}: {source.metadata['model']} cannot be exported ({why})") from failure
        files = sorted(folder.iterdir(), key=lambda file: file == path)  # the last file is the requested one
        for file in files:
            os.replace(file, out.parent / file.name)
    return Exported(out, tuple(out.parent / file.name for file in files), sizes, error, why)


def _attempt(
    form: Format, source: Source, path: Path, wide: bool, why: str, tolerance: float
) -> tuple[Sizes, float, str]:
    """Record, write and compare once, with dynamic or fixed sizes."""
    recorded, sizes, narrower = form.record(source, wide)
    form.write(recorded, path, {**source.metadata, "sizes": sizes.as_data()})
    run, at = form.open(path), tries(source.size)
    other = {0: (), 1: at.odd[:1]}.get(sizes.multiple, at.even[:1])
    error = max(compare(source, run, size, tolerance) for size in (*at.usual, *other))
    return sizes, error, narrower or why


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A temporary folder beside the file to write."""
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of an exported file.

    Raises:
        UserError: the suffix of the file is unknown.
    """
    for form in sorted(FORMATS.values(), key=lambda form: -len(form.suffix)):
        if path.name.endswith(form.suffix):
            return form.metadata(path)
    raise UserError(f"{path}: ends in none of {', '.join(form.suffix for form in FORMATS.values())}")
