"""The folder of a run: locking, the run that its files belong to, and its newest checkpoint.

One run at a time trains in a folder. It locks `run.json`, and the system releases the lock when the process ends for
any reason. The file has the run's name, and so has every checkpoint (`meta["run"]`), so that files of earlier runs or
copies are never used for this run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybridzoo.train.errors import UserError, explain
from hybridzoo.train.plain import printable
from hybridzoo.train.weights import peek

try:
    import fcntl
except ImportError:  # Windows: no locking there
    fcntl = None  # type: ignore[assignment]

NAME = "run.json"
CHECKPOINTS = ("epoch_*.pth", "iter_*.pth")  # files from which a run can be resumed
OUTPUTS = (*CHECKPOINTS, "best_*.pth", "final.pth")
_LOGS = re.compile(r"\d{8}_\d{6}")  # mmengine's folder of logs, named by the time
_held: set[Path] = set()  # this process's locks: the system's locks do not exclude the same process


class RunFolder:
    """The folder of one run: `claim` locks it, and the end of the context releases it.

    Args:
        path: the folder, which may not exist yet.
        config: name of the file in it for the run's config.
    """

    def __init__(self, path: Path, config: str = "") -> None:
        self.path = path
        self._config = config
        self._file: int | None = None
        self._key = path / NAME
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._found: set[str] = set()  # files at the time of the claim
        self._keep = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._file is None:
            return
        if not os.fstat(self._file).st_size:  # no run has started
            self._key.unlink(missing_ok=True)
        elif error is not None and not self._keep and explain(error) is not None:
            self._remove()
        os.close(self._file)  # releases the lock
        _held.discard(self._key)
        self._file = None
        for folder in self._made if error is not None and not self._keep else ():
            with contextlib.suppress(OSError):  # it has other files
                folder.rmdir()

    def keep(self) -> None:
        """A step was made, or a run is resumed: from now on an error does not change the folder."""
        self._keep = True

    def _remove(self) -> None:
        """Remove the files that a run writes before its first step, after an early error: its config, log and name."""
        for file in self.path.iterdir():
            early = file.name in (NAME, "wandb", self._config) or _LOGS.fullmatch(file.name)
            if early and file.name not in self._found:
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file, ignore_errors=True)
                else:
                    file.unlink(missing_ok=True)

    def claim(self) -> None:
        """Create the folder, and prevent other runs from training in it.

        Raises:
            UserError: another run is training in it, or it cannot be written.
        """
        if self._file is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._key = self.path.resolve() / NAME
            # POSIX locks belong to one process: a loader's worker that lives longer does not keep the lock.
            while self._key not in _held and not self._lock():
                pass
        except OSError as error:
            what = "cannot be created" if not self.path.is_dir() else "cannot be written"
            raise UserError(f"work_dir {self.path}: {what} ({error.strerror}); choose another --work-dir") from error
        if self._file is None:
            raise UserError(
                f"work_dir {self.path}: another run is training in it; wait until it ends, or choose another --work-dir"
            )
        _held.add(self._key)
        fresh = not os.fstat(self._file).st_size
        self._found = {file.name for file in self.path.iterdir()} - ({NAME} if fresh else set())

    def _lock(self) -> bool:
        """Open and lock the file; False if it was deleted meanwhile, None if another process has the lock."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(self._key, flags, 0o666)
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return True
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
                file = os.open(self._key, flags, 0o666)  # a file system without locks
        try:
            current = os.path.samestat(os.fstat(file), os.stat(self._key))
        except FileNotFoundError:
            current = False
        if not current:
            os.close(file)
            return False
        self._file = file
        return True

    def begin(self, run: str) -> None:
        """Note that the folder belongs to `run` from now on."""
        if self._file is None:  # another process of the same run has the lock
            return
        text = (json.dumps({"run": run}) + "\n").encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text, 0)
        os.fsync(self._file)


def new_run() -> str:
    """A unique name."""
    return uuid.uuid4().hex


def refuse_old_files(folder: Path, *, resume: bool = False) -> None:
    """Refuse to start a new run in a folder with another run's files.

    Args:
        resume: the run should be resumed, but there is no checkpoint.

    Raises:
        UserError: the folder holds checkpoints or weights of a run.
    """
    found = sorted(path.name for pattern in OUTPUTS for path in folder.glob(pattern))
    if found:
        files = f"{', '.join(found[:4])}{' ...' if len(found) > 4 else ''}"
        what = "but no checkpoint to resume from: choose" if resume else "add --resume to continue it, or choose"
        raise UserError(f"work_dir {folder}: holds a run's {files}{',' if resume else ';'} {what} another --work-dir")


def run_of(folder: Path) -> str:
    """The name of the folder's run, empty if unknown."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    run = found.get("run") if isinstance(found, dict) else None
    return run if isinstance(run, str) else ""


def newest_first(folder: Path) -> Iterator[Path]:
    """The checkpoints of the folder's run, most progress first, independent of file names and dates.

    If the folder does not name its run, for example after copying checkpoints into a new folder, all must belong to one
    run. Skipped files are reported.

    Raises:
        UserError: there are checkpoints, but none of this run can be read, or it is unknown which run this is.
    """
    found: list[tuple[tuple[int, int], Path, str]] = []
    problems: list[str] = []
    paths = sorted(path for pattern in CHECKPOINTS for path in folder.glob(pattern))
    for path in paths:
        try:
            content = peek(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if "optimizer" not in content:  # only weights
            continue
        meta = content.get("meta")
        if isinstance(meta, dict) and (progress := _progress(meta)) is not None:
            run = meta.get("run")
            found.append((progress, path, run if isinstance(run, str) else ""))
        else:
            problems.append(f"checkpoint {path}: does not say how many iterations its run had done")
    runs, own = {run for _, _, run in found}, run_of(folder)
    if own not in runs and len(runs) > 1:
        raise UserError(
            f"work_dir {folder}: holds checkpoints of {len(runs)} runs ({', '.join(p.name for _, p, _ in found)}); "
            "keep those of one run only"
        )
    mine = own if own in runs else next(iter(runs), "")
    for problem in problems:
        print(printable(f"skipping {problem}"))
    for _, path, run in found:
        if run != mine:
            print(printable(f"skipping checkpoint {path}: is of another run"))
    if problems and not found:
        raise UserError(f"work_dir {folder}: none of its checkpoints can be resumed; the first: {problems[0]}")
    yield from (path for _, path, run in sorted(found, reverse=True) if run == mine)


def _progress(meta: Mapping[str, Any]) -> tuple[int, int] | None:
    """(iterations, epochs) done in a checkpoint."""
    iterations, epochs = meta.get("iter"), meta.get("epoch")
    if any(type(number) is not int or not 0 <= number < 1 << 53 for number in (iterations, epochs)):
        return None
    return int(iterations or 0), int(epochs or 0)
