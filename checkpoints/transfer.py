"""One file over HTTP: whole and checked at its place, or not there at all.

What has come stays in `<file>.part` when a download ends early; a later call, of another process too, goes on from
there. What turns out to be something else than the file is thrown away. Files of the Hugging Face hub come this way
too: huggingface_hub (2.4) throws away what had come when it is killed or gives up, asks once where a server is busy,
and keeps a page or another file that has the expected length.
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
_GONE = {401: "it wants a login", 403: "it does not give it to us", 404: "nothing is there", 410: "it was removed"}
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_OF_DISK = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
_ELSEWHERE = "choose another folder by TORCH_HOME or cache_dir"


class DownloadError(RuntimeError):
    """A file that could not be had: one line that says which, why and what to do."""


class GoneError(DownloadError):
    """Nothing at the address is, or leads to, the file: no further attempt will bring it."""


class WrongHashError(DownloadError):
    """What came is not what was expected, and was thrown away."""


class _EndlessError(GoneError):
    """More came than any file has: nothing of it is kept."""


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


@dataclasses.dataclass(frozen=True)
class Policy:
    """How patient a download is; times in seconds, sizes in bytes."""

    attempts: int = 5  # failures in a row, without a byte gained, until it gives up
    first_wait: float = 1.0  # before the second attempt; doubles with each further one, give or take a half
    longest_wait: float = 120.0  # a server that asks for a longer pause is not waited for
    stall: float = 30.0  # without a byte until the connection counts as lost
    largest: int = 20_000_000_000  # a server that sends more, or says so, is not listened to
    spare: int = 1_000_000_000  # stays free on the disk, or half of what is free, if a server says no length
    patience: float = 120.0  # in which at least `slowest` bytes have to come
    slowest: int = 20_000
    sleep: Callable[[float], None] = time.sleep


POLICY = Policy()


@dataclasses.dataclass(frozen=True)
class Received:
    """What came: bytes, hexadecimal SHA-256, and the server's mark of this version if it gave one."""

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
    """Download `url` to `target` unless it exists; of several processes one downloads and the others wait for it.

    Args:
        url: http or https.
        target: the file to make; its folder is made too.
        sha256: hexadecimal, if known: anything else is refused.
        token: a login of the address's host.
        flaw: says what is wrong with a file that came to its end, empty for nothing; then it is thrown away.
        progress: show a bar where stderr is a terminal.
        policy: patience; default `POLICY`.

    Returns:
        What came; `None` where the file was there already or another process brought it meanwhile.

    Raises:
        DownloadError: it did not come whole.
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
                raise GoneError(f"{url}: what came is of no use, and was thrown away: {reason}")
            received = Received(part.size(), hash_of(part.path), part.note.get("etag", ""))
            expected = (sha256 or part.note.get("promised", "")).lower()
            if expected and received.sha256 != expected:
                part.discard()
                was = f"came with SHA-256 {received.sha256}, expected {expected}"
                raise WrongHashError(f"{url}: {was}; it was thrown away, do not trust this source")
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
    """Attempts to complete a part; the fields are `fetch`'s."""

    part: Part
    token: str
    progress: bool
    policy: Policy

    def complete(self) -> None:
        """Try until the part is complete; an attempt that gained bytes starts the count of failures anew."""
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
                    pause = f", and asks to wait {wait:.0f} s" if too_long else ""
                    goes_on = part.size() > 0 and part.validator()
                    kept = f"; {part.size():,} bytes are kept, try again to go on from there" if goes_on else ""
                    raise DownloadError(f"{part.url}: {failure}{pause}{kept}") from failure.__cause__
                _LOG.info("%s: %s; trying again in %.1f s", part.url, failure, wait)
                policy.sleep(wait)

    def _attempt(self) -> None:
        """One request: for what is missing if the part can be continued, else for everything."""
        from hybridzoo import __version__

        part = self.part
        headers = {"User-Agent": f"hybridzoo/{__version__}", "Accept-Encoding": "identity"}
        if part.size() and part.validator():
            headers |= {"Range": f"bytes={part.size()}-", "If-Range": part.validator()}
        request = urllib.request.Request(part.url, headers=headers)
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        redirects = _Redirects()
        opener = urllib.request.build_opener(redirects)  # `urlopen` would keep the proxies of its first call
        with opener.open(request, timeout=self.policy.stall) as response:
            if response.headers.get("Content-Type", "").startswith(("text/html", "application/xhtml")):
                raise GoneError(_is_a_page(part.url))
            packed = response.headers.get("Content-Encoding", "identity").strip().lower()
            if packed not in ("", "identity"):
                raise GoneError(f"{part.url}: comes packed as {_shown(packed)}, which was not asked for")
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
        """The file's bytes if known, and how many are listened to; `coming` are those that the server announced."""
        part, have, largest = self.part, self.part.size(), self.policy.largest
        free = shutil.disk_usage(part.path.parent).free
        if coming is None:  # nothing but the end of the connection ends the file
            return None, min(largest, have + free - min(self.policy.spare, free // 2))
        total = have + coming
        if total > largest:
            raise GoneError(f"{part.url}: says that it has {total:,} bytes; no weights have more than {largest:,}")
        if coming > free:
            where = f"{part.path.parent} has {free:,} free; make room, or {_ELSEWHERE}"
            raise DownloadError(f"{part.url}: needs {coming:,} bytes, {where}")
        return total, total

    def _bar(self, total: int | None) -> tqdm[Any]:
        hidden = None if self.progress else True  # None: shown on a terminal only
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
                    raise DownloadError(f"{url}: the server is too slow ({slow}); try again, it goes on from there")
                began, before = time.monotonic(), have


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, and from https to https only; tells no other host the login.

    Attributes:
        promised: SHA-256 that the Hugging Face hub names for a file before it leads to where the file is; or empty.
    """

    def __init__(self) -> None:
        self.promised = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise GoneError(f"leads from {old.scheme} to {_shown(newurl)}, which is not followed")
        self.promised = self.promised or _promised(headers)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            following.unredirected_hdrs.update(req.unredirected_hdrs)
        return following


def _continues(response: Any, part: Part, *, asked: bool) -> bool:
    """Whether the answer is the rest of the part: from the byte asked for, of the same version of the file."""
    if response.status != 206:
        return False
    if not asked:
        raise GoneError(f"{part.url}: the server sends a part of the file where all of it was asked for")
    span, etag = response.headers.get("Content-Range", ""), response.headers.get("ETag")
    whole = span.rpartition("/")[2]
    same = etag in (None, part.note.get("etag")) and whole in ("*", str(part.note.get("size")))
    if not (same and span.startswith(f"bytes {part.size()}-")):
        raise _Failure("the file on the server changed while it was downloaded", fresh=True)
    return True


def _promised(headers: Any) -> str:
    """The SHA-256 that the Hugging Face hub gives with a large file's address, empty for other servers and files."""
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag") or "")
    return found[1] if found else ""


def _shown(text: str, most: int = 120) -> str:
    """What a server said, as part of one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


def _is_a_page(url: str) -> str:
    message = f"{url}: the link leads to a web page, not to weights"
    if (urlsplit(url).hostname or "").endswith("google.com"):
        message += " (Google Drive asks to confirm large files in a browser, or its quota is used up)"
    return message


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, which it says as a number or as a date."""
    text = headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """What the network throws: as a `_Failure` if it may pass, else as what a person can act on."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        reason = "and leads in circles" if "infinite loop" in str(error.reason) else _shown(str(error.reason))
        answer = f"the server answers {error.code} {reason}".rstrip()
        if error.code == 416:  # what we have is not a part of it
            raise _Failure(answer, fresh=True) from error
        if error.code not in _TRANSIENT:
            raise GoneError(f"{url}: {answer}: {_GONE.get(error.code, 'not to be had')}") from error
        raise _Failure(answer, wait=_retry_after(error.headers)) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"the server's certificate is not valid: {error.reason}") from error
        raise _Failure(f"no connection ({error.reason})") from error
    except GoneError as error:  # of a redirect, which does not know where it began
        raise error if str(error).startswith(url) else GoneError(f"{url}: {error}") from None
    except (ValueError, UnicodeError, http.client.InvalidURL) as error:  # of an address that it leads to
        raise GoneError(f"{url}: leads to what is no address ({_shown(str(error))})") from error
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
        raise DownloadError(f"{folder}: cannot be written ({error.strerror or error}); {_ELSEWHERE}") from error
