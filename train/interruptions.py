"""Events that end a run from outside, reported in one line; and filters for libraries' messages."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridzoo.train.errors import Terminated, UserError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS}
_SHARED_MEMORY = re.compile(r"bus error|shared memory|No space left on device", re.IGNORECASE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide libraries' warnings that the user cannot do anything about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(mmengine|mmcv|mmdet|mmseg)\.")
        yield


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Turn these events into one line that says what to do: a full disk, too little shared memory, a missing file,
    SIGTERM."""
    intact = "the checkpoints there are intact"
    try:
        with quiet(), terminable(folder):
            yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(f"work_dir {folder}: {error.strerror}; {intact}: make room and use --resume") from error
        if (
            error.errno in _NOT_OURS
            and error.filename
            and Path(error.filename).absolute().is_relative_to(folder.absolute())
        ):
            raise UserError(f"work_dir {folder}: cannot be written ({error.strerror}); choose another") from error
        if "DataLoader worker" in str(error) or isinstance(error, FileNotFoundError):
            raise UserError(f"{_last_line(error)}; {intact}: restore the file and use --resume") from error
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "DataLoader worker" in text and "Terminated" in text:  # SIGTERM is meant for the whole run
            raise Terminated(_ended(folder)) from error
        if _SHARED_MEMORY.search(text):
            raise UserError(
                "shared memory (/dev/shm) is too small for the data loader's workers: make it larger (docker run "
                "--shm-size 8g), or train_dataloader.num_workers=0 val_dataloader.num_workers=0; "
                f"{intact}: use --resume"
            ) from error
        if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
            raise UserError(f"{text.partition('. ')[0]}: out of memory?; {intact}: use --resume") from error
        raise
    except Exception as error:
        if isinstance(error.__context__, Terminated):  # mmengine's bare `except` turns it into another
            raise error.__context__ from error
        raise


def _last_line(error: BaseException) -> str:
    """An error's message, without the traceback of a loader's worker."""
    line = str(error).strip().splitlines()[-1]
    return line.partition("Error: ")[2] or line


def _ended(folder: Path) -> str:
    return f"terminated; the checkpoints in {folder} are intact: use --resume"


@contextlib.contextmanager
def terminable(folder: Path) -> Iterator[None]:
    """SIGTERM (from a scheduler or `kill`) raises an exception in the run; a loader's worker ends at once."""
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise Terminated(_ended(folder))

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
