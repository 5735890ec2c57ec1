"""Downloads one file over HTTP: the result is a complete, checked file, or no file.

If a download stops early, the received part stays in `<file>.part`, and a later call (also of another process) resumes
it. A response that is not the file is discarded. Files of the Hugging Face hub are downloaded in the same way, because
huggingface_hub (2.4) discards the received part when it is killed or gives up, does not retry if a server is busy, and
keeps a web page or another file that has the expected length.
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
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from hybridzoo.checkpoints.containers import is_web_page
from hybridzoo.checkpoints.files import BLOCK, Part, hash_of, only_one

_LOG = logging.getLogger(__name__)
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_GONE = {401: "a login is needed", 403: "access is forbidden", 404: "there is no such file", 410: "it was removed"}
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_OF_DISK = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
_ELSEWHERE = "choose another folder by TORCH_HOME or cache_dir"


class DownloadError(RuntimeError):
    """A file could not be downloaded: one line that names the file, the reason and what to do."""


class GoneError(DownloadError):
    """The file is not at this address: another attempt would not help."""


class WrongHashError(DownloadError):
    """The response was not the expected file, and was discarded."""


class _EndlessError(GoneError):
    """The response was longer than any file of weights; nothing of it is kept."""


class _Failure(Exception):
    """An attempt failed, but another one may succeed.

    Args:
        reason: of the failure.
        wait: seconds to wait, if the server requested it.
        fresh: the received part is useless; start over.
    """

    def __init__(self, reason: str, *, wait: float | None = None, fresh: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.fresh = wait, fresh


@dataclasses.dataclass(frozen=True)
class Policy:
    """Retries, time limits (seconds) and size limits (bytes) of a download."""

    attempts: int = 5  # failures in a row without a new byte before it gives up
    first_wait: float = 1.0  # before the second attempt; doubled for each further one, plus or minus a random half
    longest_wait: float = 120.0  # if a server requests a longer wait, the download fails
    stall: float = 30.0  # without a byte before the connection counts as lost
    largest: int = 20_000_000_000  # if a server sends or announces more, the download fails
    spare: int = 1_000_000_000  # kept free on the disk, at most half of the free space, if a server announces no length
    patience: float = 120.0  # in this time at least `slowest` bytes must arrive
    slowest: int = 20_000
    sleep: Callable[[float], None] = time.sleep


POLICY = Policy()


@dataclasses.dataclass(frozen=True)
class Received:
    """A finished download: size in bytes, hexadecimal SHA-256, and the server's mark of this version, if any."""

    size: int
    sha256: str
    etag: str


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str = "",
    token: str = "",
    flaw: Callable[[Path], str] | None = None,
    progress: bool = True,
    policy: Policy | None = None,
) -> Received | None:
    """Download `url` to `target` unless it exists. If several processes call this, one downloads and the others wait.

    Args:
        url: http or https.
        target: the file to write; its folder is created too.
        sha256: hexadecimal, if known; a file with another hash is refused.
        token: login for the host of the address.
        flaw: returns what is wrong with a downloaded file (which is then discarded), or an empty string.
        progress: show a progress bar if stderr is a terminal.
        policy: retries and limits; default `POLICY`.

    Returns:
        The download; `None` if the file existed already or another process downloaded it.

    Raises:
        DownloadError: the file could not be downloaded completely.
    """
    if not is_address(url):
        raise DownloadError(f"{url}: only http and https addresses can be downloaded")
    with _disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target):
            if target.is_dir():
                raise DownloadError(f"{target}: is a folder; move it away")
            if target.exists():
                return None
            part = Part(target, url)
            _Download(part, token, progress, policy or POLICY).complete()
            reason = flaw(part.path) if flaw is not None else ""
            if reason:
                part.discard()
                raise GoneError(f"{url}: the downloaded file is not usable and was discarded: {reason}")
            received = Received(part.size(), hash_of(part.path), part.note.get("etag", ""))
            expected = (sha256 or part.note.get("promised", "")).lower()
            if expected and received.sha256 != expected:
                part.discard()
                was = f"has SHA-256 {received.sha256}, expected {expected}"
                raise WrongHashError(f"{url}: {was}; it was discarded, do not trust this source")
            part.finish()
            return received


def is_address(url: str) -> bool:
    """Whether this is an http or https address."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class _Download:
    """Attempts to complete a part; the fields are the arguments of `fetch`."""

    part: Part
    token: str
    progress: bool
    policy: Policy

    def complete(self) -> None:
        """Try until the part is complete. An attempt that received bytes resets the count of failures."""
        part, policy = self.part, self.policy
        failures, furthest = 0, part.size()
        while not part.complete():
            try:
                with _network_errors(part.url):
                    self._attempt()
                return
            except GoneError as error:
                if not part.size() or isinstance(error, _EndlessError):
                    part.discard()
                raise
            except _Failure as failure:
                failures = 1 if part.size() > furthest else failures + 1
                furthest = max(furthest, part.size())
                if failure.fresh:
                    part.discard()
                backoff = min(policy.longest_wait, policy.first_wait * 2 ** (failures - 1)) * random.uniform(0.5, 1.5)
                wait = backoff if failure.wait is None else failure.wait
                too_long = failure.wait is not None and wait > policy.longest_wait
                if failures >= policy.attempts or too_long:
                    pause = f" and requests a wait of {wait:.0f} s" if too_long else ""
                    goes_on = part.size() > 0 and part.validator()
                    kept = f"; {part.size():,} bytes are kept; try again to resume" if goes_on else ""
                    raise DownloadError(f"{part.url}: {failure}{pause}{kept}") from failure.__cause__
                _LOG.info("%s: %s; trying again in %.1f s", part.url, failure, wait)
                policy.sleep(wait)

    def _attempt(self) -> None:
        """One request: for the missing bytes if the part can be resumed, otherwise for the whole file."""
        from hybridzoo import __version__

        part = self.part
        headers = {"User-Agent": f"hybridzoo/{__version__}", "Accept-Encoding": "identity"}
        if part.size() and part.validator():
            headers |= {"Range": f"bytes={part.size()}-", "If-Range": part.validator()}
        request = urllib.request.Request(part.url, headers=headers)
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        redirects = _Redirects()
        opener = urllib.request.build_opener(redirects)  # `urlopen` would always use the proxies of its first call
        with opener.open(request, timeout=self.policy.stall) as response:
            if response.headers.get("Content-Type", "").startswith(("text/html", "application/xhtml")):
                raise GoneError(_is_a_page(part.url))
            packed = response.headers.get("Content-Encoding", "identity").strip().lower()
            if packed not in ("", "identity"):
                raise GoneError(f"{part.url}: is sent with encoding {_shown(packed)}, which was not requested")
            length = response.headers.get("Content-Length", "")
            coming = int(length[:20]) if length.isascii() and length.isdecimal() else None
            if not _continues(response, part, asked="Range" in headers):
                part.begin(response.headers, coming, redirects.promised or _promised(response.headers))
            total, most = self._limits(coming)
            with self._bar(total) as bar, part.append() as file:
                self._write(response, file, most, bar)
                file.flush()
                os.fsync(file.fileno())
        if total is not None and part.size() != total:
            raise _Failure(f"the connection was cut after {part.size():,} of {total:,} bytes")
        if not part.size():
            raise _Failure("the server sent an empty file")

    def _limits(self, coming: int | None) -> tuple[int | None, int]:
        """The size of the file, if known, and the number of bytes to accept. `coming`: the announced number."""
        part, have, largest = self.part, self.part.size(), self.policy.largest
        free = shutil.disk_usage(part.path.parent).free
        if coming is None:  # only the end of the connection marks the end of the file
            return None, min(largest, have + free - min(self.policy.spare, free // 2))
        total = have + coming
        if total > largest:
            raise GoneError(f"{part.url}: the server announces {total:,} bytes; no weights have more than {largest:,}")
        if coming > free:
            where = f"{part.path.parent} has {free:,} free; make room, or {_ELSEWHERE}"
            raise DownloadError(f"{part.url}: needs {coming:,} bytes, {where}")
        return total, total

    def _bar(self, total: int | None) -> tqdm[Any]:
        hidden = None if self.progress else True  # None: shown only on a terminal
        name, have = self.part.path.stem, self.part.size()
        return tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, disable=hidden)

    def _write(self, response: Any, file: BinaryIO, most: int, bar: tqdm[Any]) -> None:
        url, policy, have = self.part.url, self.policy, self.part.size()
        began, before = time.monotonic(), have
        while block := response.read1(BLOCK):
            if not have and is_web_page(block):
                raise GoneError(_is_a_page(url))
            if have + len(block) > most:
                raise _EndlessError(f"{url}: the server sends more than {most:,} bytes and does not end")
            file.write(block)
            have += len(block)
            bar.update(len(block))
            if time.monotonic() - began > policy.patience:
                if have - before < policy.slowest:
                    slow = f"{have - before:,} bytes in {policy.patience:.0f} s"
                    raise DownloadError(f"{url}: the server is too slow ({slow}); try again to resume")
                began, before = time.monotonic(), have


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to http and https, from https only to https; never sends the login to another host.

    Attributes:
        promised: SHA-256 that the Hugging Face hub sends with the redirect to the file; or empty.
    """

    def __init__(self) -> None:
        self.promised = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise GoneError(f"redirects from {old.scheme} to {_shown(newurl)}, which is not followed")
        self.promised = self.promised or _promised(headers)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.unredirected_hdrs.update(req.unredirected_hdrs)
        return following


def _continues(response: Any, part: Part, *, asked: bool) -> bool:
    """Whether the response continues the part: from the requested byte, in the same version of the file."""
    if response.status != 206:
        return False
    if not asked:
        raise GoneError(f"{part.url}: the server sends a part of the file, but the whole file was requested")
    span, etag = response.headers.get("Content-Range", ""), response.headers.get("ETag")
    whole = span.rpartition("/")[2]
    same = etag in (None, part.note.get("etag")) and whole in ("*", str(part.note.get("size")))
    if not (same and span.startswith(f"bytes {part.size()}-")):
        raise _Failure("the file on the server changed while it was downloaded", fresh=True)
    return True


def _promised(headers: Any) -> str:
    """The SHA-256 that the Hugging Face hub sends with the address of a large file; empty for all other files."""
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag") or "")
    return found[1] if found else ""


def _shown(text: str, most: int = 120) -> str:
    """Text from a server, shortened for a message of one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


def _is_a_page(url: str) -> str:
    message = f"{url}: the link leads to a web page, not to weights"
    if (urlsplit(url).hostname or "").endswith("google.com"):
        message += " (Google Drive asks to confirm large files in a browser, or its quota is used up)"
    return message


def _retry_after(headers: Any) -> float | None:
    """The wait in seconds that a server requests, as a number or as a date."""
    text = headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Convert network errors: to `_Failure` if another attempt may succeed, otherwise to a message for the user."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        reason = "and redirects in a circle" if "infinite loop" in str(error.reason) else _shown(str(error.reason))
        answer = f"the server answers {error.code} {reason}".rstrip()
        if error.code == 416:  # our part does not belong to this file
            raise _Failure(answer, fresh=True) from error
        if error.code not in _TRANSIENT:
            raise GoneError(f"{url}: {answer}: {_GONE.get(error.code, 'not to be had')}") from error
        raise _Failure(answer, wait=_retry_after(error.headers)) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"the server's certificate is not valid: {error.reason}") from error
        raise _Failure(f"no connection ({error.reason})") from error
    except GoneError as error:  # from a redirect, which does not know the first address
        raise error if str(error).startswith(url) else GoneError(f"{url}: {error}") from None
    except (ValueError, UnicodeError, http.client.InvalidURL) as error:  # raised for the address of a redirect
        raise GoneError(f"{url}: redirects to an invalid address ({_shown(str(error))})") from error
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
    """Convert errors of the file system to a message that tells the user what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            message = f"{folder}: the disk is full; free some space and try again to resume"
            raise DownloadError(message) from error
        raise DownloadError(f"{folder}: cannot be written ({error.strerror or error}); {_ELSEWHERE}") from error
