"""Writes tensors as safetensors, and a note of their origin beside them: both or neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridzoo.checkpoints.files import hash_of, write_note
from hybridzoo.checkpoints.reading import CheckpointError


def place_for(out: str | Path, source: Path, *, force: bool) -> Path:
    """The file to write, after checking that it and its note can be written.

    Raises:
        CheckpointError: the name is empty, a folder or the source; or the file exists and `force` is not given.
    """
    target = Path(out).expanduser()
    if not target.name:  # of an empty text too
        raise CheckpointError("out: is empty; name a file")
    for path in (target, note_of(target)):
        if path.is_dir():
            raise CheckpointError(f"out {path}: is a folder; name a file")
        if path.exists() and path.samefile(source):
            raise CheckpointError(f"out {path}: is the source itself; choose another name")
        if os.path.lexists(path) and not force:
            raise CheckpointError(f"out {path}: exists already; choose another name, or --force to replace it")
    return target


def note_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def write(state: Mapping[str, Tensor], note: Mapping[str, Any], target: Path) -> None:
    """Write both files; the file's hash is added to the note.

    Raises:
        CheckpointError: a file cannot be written; existing files stay unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    new = target.with_name(f"{target.name}.{os.getpid()}.new")
    try:
        new.touch(exist_ok=False)
        mode = new.stat().st_mode  # permissions like any new file; safetensors writes one that only its owner may read
        save_file(_apart(state), new, metadata={"format": "pt"})
        new.chmod(mode)
        write_note(note_of(target), {**note, "sha256": hash_of(new)})  # first, because it may fail
        os.replace(new, target)
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"out {target}: cannot be written ({reason})") from error
    finally:
        new.unlink(missing_ok=True)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that do not share memory, as safetensors requires."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state.items():
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    return tensors
