"""One file over HTTP: whole and checked at its place, or not there at all.

What has come stays in `<file>.part` when a download ends early; a later call, of another process too, goes on from
there. Only Python's own HTTP client is used: it follows the proxies set in the environment, and each generation of
huggingface_hub brings another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import errno
import http.client
import logging
import os
import random
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from hybridzoo.checkpoints.files import BLOCK, Part, hash_of, is_web_page, only_one

_LOG = logging.getLogger(__name__)
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_GONE = {401: "it wants a login", 403: "it does not give it to us", 404: "nothing is there", 410: "it was removed"}
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_OF_DISK = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)


class DownloadError(RuntimeError):
    """A file that could not be had: one line that says which, why and what to do."""


class WrongHashError(DownloadError):
    """What came is not what was expected, and was thrown away."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How patient a download is.

    Attributes:
        attempts: failures in a row, without a byte gained, until it gives up.
        first_wait: seconds before the second attempt; doubles with each further one, give or take a half.
        longest_wait: seconds; a server that asks for a longer pause is not waited for.
        stall: seconds without a byte until the connection counts as lost.
        sleep: waits for so many seconds.
    """

    attempts: int = 5
    first_wait: float = 1.0
    longest_wait: float = 120.0
    stall: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.longest_wait, self.first_wait * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)


POLICY = Policy()


@dataclasses.dataclass(frozen=True)
class Received:
    """What came: bytes, hexadecimal SHA-256, and the server's mark of this version if it gave one."""

    size: int
    sha256: str
    etag: str


class _Failure(Exception):
    """An attempt failed in a way that may pass.

    Args:
        reason: of the failure.
        wait: seconds that the server asked for.
        fresh: what came so far is of no use.
    """

    def __init__(self, reason: str, *, wait: float | None = None, fresh: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.fresh = wait, fresh


def fetch(
    url: str, target: Path, *, sha256: str = "", progress: bool = True, policy: Policy | None = None
) -> Received | None:
    """Download `url` to `target` unless it exists; of several processes one downloads and the others wait for it.

    Args:
        url: http or https.
        target: the file to make; its folder is made too.
        sha256: hexadecimal, if known: anything else is refused.
        progress: show a bar where stderr is a terminal.
        policy: patience; default `POLICY`.

    Returns:
        What came; `None` where the file was there already or another process brought it meanwhile.

    Raises:
        DownloadError: it did not come whole.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url}: only http and https addresses can be downloaded")
    with _disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target):
            if target.exists():
                return None
            part = Part(target, url)
            _collect(part, progress, policy or POLICY)
            received = Received(part.size(), hash_of(part.path), part.note.get("etag", ""))
            if sha256 and received.sha256 != sha256.lower():
                part.discard()
                was = f"came with SHA-256 {received.sha256}, expected {sha256.lower()}"
                raise WrongHashError(f"{url}: {was}; it was thrown away, do not trust this source")
            part.finish()
            return received


def _collect(part: Part, progress: bool, policy: Policy) -> None:
    """Attempts until the part is complete; one that gained bytes starts the count of failures anew."""
    failures, furthest = 0, part.size()
    while not part.complete():
        try:
            _attempt(part, progress, policy)
            return
        except _Failure as failure:
            failures = 1 if part.size() > furthest else failures + 1
            furthest = max(furthest, part.size())
            if failure.fresh:
                part.discard()
            wait = policy.wait(failures) if failure.wait is None else failure.wait
            if failures >= policy.attempts or wait > policy.longest_wait:
                pause = f", and asks to wait {wait:.0f} s" if wait > policy.longest_wait else ""
                kept = f"; {part.size():,} bytes are kept, try again to go on from there" if part.validator() else ""
                raise DownloadError(f"{part.url}: {failure}{pause}{kept}") from failure.__cause__
            _LOG.info("%s: %s; trying again in %.1f s", part.url, failure, wait)
            policy.sleep(wait)


def _attempt(part: Part, progress: bool, policy: Policy) -> None:
    """One request: for what is missing if the part can be continued, else for everything."""
    from hybridzoo import __version__

    headers = {"User-Agent": f"hybridzoo/{__version__}", "Accept-Encoding": "identity"}
    if part.size() and part.validator():
        headers |= {"Range": f"bytes={part.size()}-", "If-Range": part.validator()}
    request = urllib.request.Request(part.url, headers=headers)
    opener = urllib.request.build_opener()  # `urlopen` would keep the proxies of its first call
    with _network_errors(), opener.open(request, timeout=policy.stall) as response:
        if response.headers.get("Content-Type", "").startswith(("text/html", "application/xhtml")):
            raise DownloadError(_is_a_page(part.url))
        length = response.headers.get("Content-Length", "")
        coming = int(length) if length.isdecimal() else None
        if not _continues(response, part):
            part.begin(response.headers, coming)
        have = part.size()
        total = None if coming is None else have + coming
        free = shutil.disk_usage(part.path.parent).free
        if coming is not None and coming > free:
            where = f"{part.path.parent} has {free:,} free; make room, or set TORCH_HOME to a folder elsewhere"
            raise DownloadError(f"{part.url}: needs {coming:,} bytes, {where}")
        bar = tqdm(
            desc=part.path.stem,
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: shown on a terminal only
        )
        with bar, part.append() as file:
            while block := response.read1(BLOCK):
                if not have and is_web_page(block):
                    raise DownloadError(_is_a_page(part.url))
                file.write(block)
                have += len(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have != total:
        raise _Failure(f"the connection was cut after {have:,} of {total:,} bytes")
    if not have:
        raise _Failure("the server sent an empty file")


def _continues(response: Any, part: Part) -> bool:
    """Whether the answer is the rest of the part: from the byte asked for, of the same version of the file."""
    if response.status != 206:
        return False
    span, etag = response.headers.get("Content-Range", ""), response.headers.get("ETag")
    whole = span.rpartition("/")[2]
    same = etag in (None, part.note.get("etag")) and whole in ("*", str(part.note.get("size")))
    if not (same and span.startswith(f"bytes {part.size()}-")):
        raise _Failure("the file on the server changed while it was downloaded", fresh=True)
    return True


def _is_a_page(url: str) -> str:
    message = f"{url}: the link leads to a web page, not to weights"
    if (urlsplit(url).hostname or "").endswith("google.com"):
        message += " (Google Drive asks to confirm large files in a browser, or its quota is used up)"
    return message


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, which it says as a number or as a date."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    """What the network throws: as a `_Failure` if it may pass, else as what a person can act on."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}".rstrip()
        if error.code == 416:  # what we have is not a part of it
            raise _Failure(answer, fresh=True) from error
        if error.code not in _TRANSIENT:
            raise DownloadError(f"{error.url}: {answer}: {_GONE.get(error.code, 'not to be had')}") from error
        raise _Failure(answer, wait=_retry_after(error.headers)) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"the server's certificate is not valid: {error.reason}") from error
        raise _Failure(f"no connection ({error.reason})") from error
    except TimeoutError as error:
        raise _Failure("the server stopped sending") from error
    except http.client.HTTPException as error:
        raise _Failure(f"the connection was cut ({type(error).__name__})") from error
    except OSError as error:
        if error.errno in _OF_DISK:
            raise
        raise _Failure(f"the connection was cut ({error})") from error


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What the file system refuses, as what a person can do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            message = f"{folder}: the disk is full; make room and try again, it goes on from what has come"
            raise DownloadError(message) from error
        message = f"{folder}: cannot be written ({error.strerror or error}); set TORCH_HOME to a folder of yours"
        raise DownloadError(message) from error
