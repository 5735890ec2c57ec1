"""The store of published weights: downloads a file once, checks it every time, and uses files that timm downloaded.

Files are in PyTorch's cache (`torch.hub.get_dir()/checkpoints`), where timm looks for them too. Files that timm
downloaded into the Hugging Face hub's cache are used from there. `<file>.json` in PyTorch's cache records the hash of a
file of either cache at its first use; a file that later differs from its record is refused. Files of the hub are
downloaded like all others, see `transfer`.

Environment variables:
    TORCH_HOME, HF_HOME: other folders for the two caches.
    HF_HUB_OFFLINE: with 1, only files in the caches are used.
    HF_ENDPOINT, HF_TOKEN: a mirror of the hub, and a login for it.
    HYBRIDZOO_MIRROR: a mirror of all hosts: this address replaces `https://host` in every link.
    http_proxy, https_proxy, no_proxy: as usual.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import torch

from hybridzoo.checkpoints.catalogue import Card, cards, find
from hybridzoo.checkpoints.containers import flaw
from hybridzoo.checkpoints.files import NoteError, hash_of, read_record, write_note
from hybridzoo.checkpoints.reading import CheckpointError, UnsafeError, read_checkpoint
from hybridzoo.checkpoints.transfer import DownloadError, GoneError, WrongHashError, fetch, is_address

_LOG = logging.getLogger(__name__)
_HUB = re.compile(r"^https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/([^?#]+)")
_KINDS = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".ckpt", ".pkl")
_SAYS_NOTHING = {"pytorch_model", "model", "content", "checkpoint", "weights"}  # names that many files share
_TWINS = {"model.safetensors": "pytorch_model.bin", "pytorch_model.bin": "model.safetensors"}  # timm's files on the hub
_LOCAL = "give a file that you have: --weights FILE, or pretrained_cfg_overlay=dict(file=...)"


def download(name: str, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The published file of one card, from the cache or downloaded from the authors' link.

    Args:
        name: `model.tag`, or `model` for its default weights.
        cache_dir: a folder to use instead of the two caches (timm's argument of the same name). `~` is the user's home.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        Path of the complete file, with the same content as at its first download.

    Raises:
        ValueError: `name` has no card, or `cache_dir` is empty.
        DownloadError: there is no public file, it cannot be downloaded, or its content has changed.
    """
    card = find(name)
    path = cached(card, cache_dir=cache_dir)
    if path is None:
        path = _bring(card, cache_dir, progress)
    _check(path, card, cache_dir)
    return path


def cached(card: Card, *, cache_dir: str | Path | None = None) -> Path | None:
    """The path of the card's file on this machine, without a check; None if there is none. Never uses the network.

    A repository of timm on the hub has two files with the same tensors; either is used.
    """
    folder = _folder(cache_dir)
    path = folder / file_name(card)
    if path.is_file():
        return path
    hub = _HUB.match(card.url)
    if hub:
        from huggingface_hub import try_to_load_from_cache

        repository, revision, file = hub.groups()
        file, where = unquote(file), None if cache_dir is None else folder
        twin = _TWINS.get(file, file) if repository.startswith("timm/") else file
        for wanted in dict.fromkeys((file, twin)):
            found = try_to_load_from_cache(repository, wanted, cache_dir=where, revision=revision)
            if isinstance(found, str):
                return Path(found)
    return None


def file_name(card: Card) -> str:
    """The path of the card's file in PyTorch's cache.

    It has the name in its address if only one card uses that name, otherwise the name of the card. Names consist of
    letters, digits, dots, dashes and underscores, so the file stays in its folder.
    """
    name = _last(card.url)
    kind = next((kind for kind in _KINDS if name.lower().endswith(kind)), "")
    shared = any(_last(other.url) == name for other in cards(task=None) if other.name != card.name)
    if not kind or shared or name.partition(".")[0] in _SAYS_NOTHING:
        name = f"{card.name}{kind or '.pth'}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[-200:]


def record_of(card: Card, path: Path | None = None, *, cache_dir: str | Path | None = None) -> dict[str, object]:
    """The record of the card's file from its first download: name, url, sha256, size, etag, date. Empty without one.

    Raises:
        DownloadError: the record cannot be read.
    """
    try:
        return read_record(_record(card, path, cache_dir))
    except NoteError as error:
        raise DownloadError(f"{card.name}: {error}") from error


def hash_of_hub(path: Path) -> str:
    """The SHA-256 in the name of a large file in the hub's cache; empty for other files."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else ""


def licence_notice(card: Card) -> str:
    """A warning about the licence, for weights that may not be used freely; empty for the others."""
    licence = card.licence.lower()
    if "non-commercial" in licence or "noncommercial" in licence or re.search(r"\bnc\b", licence):
        return f"{card.name}: these weights are for non-commercial use only ({card.licence})"
    if not licence or "none stated" in licence:
        return f"{card.name}: the authors state no licence for these weights; ask them before you pass them on"
    return ""


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _bring(card: Card, cache_dir: str | Path | None, progress: bool) -> Path:
    if card.status == "none" or not card.url:
        raise DownloadError(f"{card.name}: its authors published no weights; {_LOCAL}")
    if card.status == "dead":
        raise DownloadError(f"{card.name}: the authors' link is dead ({card.url}); {_LOCAL}")
    if offline():
        raise DownloadError(f"{card.name}: is not in the cache, and HF_HUB_OFFLINE forbids downloads; {_LOCAL}")
    _LOG.info("downloading %s from %s", card.name, card.url)
    path = _folder(cache_dir) / file_name(card)
    recorded = str(record_of(card, cache_dir=cache_dir).get("sha256", ""))
    url, token = _address(card)
    try:
        received = fetch(url, path, sha256=card.sha256 or recorded, token=token, flaw=_flaw, progress=progress)
    except DownloadError as error:
        if isinstance(error, WrongHashError) and recorded and not card.sha256:
            record = _record(card, None, cache_dir)
            raise DownloadError(f"{card.name}: {error}; if the authors replaced the file, delete {record}") from error
        doubtful = isinstance(error, GoneError) and card.status == "doubtful"
        doubts = "; the link on its card has never been tested successfully" if doubtful else ""
        raise DownloadError(f"{card.name}: {error}; {_LOCAL}{doubts}") from error
    if received is not None:
        _note(path, card, cache_dir, received.sha256, received.etag)
    return path


def _address(card: Card) -> tuple[str, str]:
    """The address to download the card's file from, and the login for it.

    Raises:
        DownloadError: a mirror in the environment variables is not a valid address.
    """
    hub = _HUB.match(card.url)
    variable = "HYBRIDZOO_MIRROR" if os.environ.get("HYBRIDZOO_MIRROR") else "HF_ENDPOINT" if hub else ""
    mirror = os.environ.get(variable, "").rstrip("/")
    if mirror and not is_address(mirror):
        raise DownloadError(f"{card.name}: {variable} is {mirror!r}, which is not an http or https address")
    token = ""
    if hub and variable != "HYBRIDZOO_MIRROR":
        from huggingface_hub import get_token

        token = get_token() or ""
    path = urlsplit(card.url)._replace(scheme="", netloc="").geturl()
    return (f"{mirror}{path}" if mirror else card.url), token


def _flaw(path: Path) -> str:
    """Why a downloaded file is not kept. A complete file that needs code to be executed is kept; reading refuses it."""
    reason = flaw(path)
    with path.open("rb") as file:
        old = file.read(1) == b"\x80"
    if old and not reason:  # an old pickle does not record its length
        try:
            read_checkpoint(path)
        except UnsafeError:
            pass
        except CheckpointError as error:
            reason = str(error).partition("cannot be read (")[2].removesuffix(")") or str(error)
    return reason


def _check(path: Path, card: Card, cache_dir: str | Path | None) -> None:
    """Refuse a file whose hash differs from its card or its record; record a file that has neither."""
    record, recorded = _record(card, path, cache_dir), record_of(card, path, cache_dir=cache_dir)
    published = "" if _is_twin(card, path) else card.sha256
    expected = published or str(recorded.get("sha256", "")) or hash_of_hub(path)
    digest = hash_of(path)
    if expected and digest != expected.lower():
        if published:
            since = "as on its card"
        else:
            day = str(recorded.get("date"))[:10]
            since = f"as at its first download, {day}" if recorded else "as in the hub's cache"
        hint = "delete it to download it again" + (f"; if the change is intended, delete {record}" if recorded else "")
        raise DownloadError(f"{path}: has SHA-256 {digest}, not {expected} {since}; {hint}")
    if not recorded:
        if reason := _flaw(path):
            raise DownloadError(f"{path}: is not a complete file of weights ({reason}); delete it to download it again")
        _note(path, card, cache_dir, digest, "")


def _note(path: Path, card: Card, cache_dir: str | Path | None, digest: str, etag: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    note = dict(name=card.name, url=card.url, sha256=digest, size=path.stat().st_size, etag=etag, date=now)
    record = _record(card, path, cache_dir)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_note(record, note)
    except OSError as error:  # a shared cache may be read-only
        _LOG.info("%s: not recorded (%s)", record, error)


def _record(card: Card, path: Path | None, cache_dir: str | Path | None) -> Path:
    """The record of a card's file, or of the same file in the other format."""
    kind = path.suffix if path is not None and _is_twin(card, path) else ""
    return _folder(cache_dir) / f"{file_name(card)}{kind}.json"


def _is_twin(card: Card, path: Path) -> bool:
    return path.name == _TWINS.get(_last(card.url))


def _folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is None:
        return Path(torch.hub.get_dir()) / "checkpoints"
    if not str(cache_dir):
        raise ValueError("cache_dir: is empty; name a folder, or leave it out for PyTorch's cache")
    return Path(cache_dir).expanduser()


@functools.cache
def _last(url: str) -> str:
    """The last part of the path of an address, without escapes, folders and query."""
    return PurePosixPath(unquote(urlsplit(url).path).replace("\\", "/")).name
