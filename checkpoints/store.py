"""The store of published weights: download once, check every time, share the cache with timm.

Files of the Hugging Face hub lie in its cache, all others in PyTorch's (`torch.hub.get_dir()/checkpoints`), where timm
looks for them too. In the latter `<file>.json` records what came at first use, for files of the hub as well; what does
not agree with its record later is refused.

Environment:
    TORCH_HOME, HF_HOME: other places for the two caches.
    HF_HUB_OFFLINE: 1 answers from the cache alone.
    HF_ENDPOINT: a mirror of the hub.
    HYBRIDZOO_MIRROR: a mirror of everything: this address takes the place of every link's `https://host`.
    http_proxy, https_proxy, no_proxy: as everywhere.
"""

from __future__ import annotations

import datetime
import difflib
import errno
import logging
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import torch

from hybridzoo.checkpoints.catalogue import Card, cards
from hybridzoo.checkpoints.files import hash_of, read_note, write_note
from hybridzoo.checkpoints.transfer import DownloadError, WrongHashError, fetch

_LOG = logging.getLogger(__name__)
_HUB = re.compile(r"^https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/([^?#]+)")
_KINDS = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".ckpt", ".pkl")
_SAYS_NOTHING = {"pytorch_model", "model", "content", "checkpoint", "weights"}  # names that many files have
_LOCAL = "give a file that you have: --weights FILE, or pretrained_cfg_overlay=dict(file=...)"


def find(name: str) -> Card:
    """The card of `model.tag`, or of a model's default weights.

    Raises:
        ValueError: no such card; the message has the nearest names.
    """
    for card in cards(task=None):
        if name in (card.name, card.model):
            return card
    names = {other for card in cards(task=None) for other in (card.model, card.name)}
    near = difflib.get_close_matches(name, sorted(names), n=3)
    known = f"did you mean {', '.join(near)}?" if near else "hybridzoo checkpoints list has all"
    raise ValueError(f"name: no weights are known as {name!r}; {known}")


def download(name: str, *, cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The published file of one card, from the cache or else from where its authors put it.

    Args:
        name: `model.tag`, or `model` for its default weights.
        cache_dir: instead of the two caches; timm's argument of the same name.
        progress: show a bar where stderr is a terminal.

    Returns:
        The file, whole, and the same as when it first came.

    Raises:
        ValueError: `name` has no card.
        DownloadError: there is no public file, it cannot be had, or it is not what it was.
    """
    card = find(name)
    path = cached(card, cache_dir=cache_dir)
    if path is None:
        path = _bring(card, cache_dir, progress)
    _check(path, card, cache_dir)
    return path


def cached(card: Card, *, cache_dir: str | Path | None = None) -> Path | None:
    """Where the card's file is on this machine, unchecked; None if it is not. Never uses the network."""
    path = _folder(cache_dir) / file_name(card)
    if path.is_file():
        return path
    hub = _HUB.match(card.url)
    if hub:
        from huggingface_hub import try_to_load_from_cache

        repository, revision, file = hub.groups()
        found = try_to_load_from_cache(repository, unquote(file), cache_dir=cache_dir, revision=revision)
        return Path(found) if isinstance(found, str) else None
    return None


def file_name(card: Card) -> str:
    """The card's file in PyTorch's cache: as its address calls it where that is one card's alone, else after the card.

    The name holds nothing but letters, digits, dots, dashes and underscores, so that it stays in its folder.
    """
    name = _last(card.url)
    kind = next((kind for kind in _KINDS if name.lower().endswith(kind)), "")
    shared = any(_last(other.url) == name for other in cards(task=None) if other.name != card.name)
    if not kind or shared or name.partition(".")[0] in _SAYS_NOTHING:
        name = f"{card.name}{kind or '.pth'}"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[-200:]


def record_of(card: Card, *, cache_dir: str | Path | None = None) -> dict[str, object]:
    """What was recorded when the card's file first came: name, url, sha256, size, etag, date; empty if it never did."""
    return read_note(_record(card, cache_dir))


def licence_notice(card: Card) -> str:
    """What to say of weights that may not be used freely; empty for the others."""
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
        raise DownloadError(f"{card.name}: is not in the cache, and HF_HUB_OFFLINE forbids to download it; {_LOCAL}")
    _LOG.info("downloading %s from %s", card.name, card.url)
    try:
        mirror = os.environ.get("HYBRIDZOO_MIRROR", "")
        if _HUB.match(card.url) and not mirror:
            return _from_hub(card, cache_dir, progress)
        parts = urlsplit(card.url)
        url = f"{mirror.rstrip('/')}{parts._replace(scheme='', netloc='').geturl()}" if mirror else card.url
        path = _folder(cache_dir) / file_name(card)
        recorded = str(record_of(card, cache_dir=cache_dir).get("sha256", ""))
        received = fetch(url, path, sha256=card.sha256 or recorded, progress=progress)
        if received is not None:
            _note(path, card, cache_dir, received.sha256, received.etag)
        return path
    except DownloadError as error:
        if isinstance(error, WrongHashError) and not card.sha256:
            record = _record(card, cache_dir)
            raise DownloadError(f"{card.name}: {error}; if the authors changed it rightly, delete {record}") from error
        doubts = f"; about this link: {card.notes}" if card.status == "doubtful" and card.notes else ""
        raise DownloadError(f"{card.name}: {error}; {_LOCAL}{doubts}") from error


def _from_hub(card: Card, cache_dir: str | Path | None, progress: bool) -> Path:
    """huggingface_hub does the work: what timm brought is not downloaded again, and the other way round."""
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hub = _HUB.match(card.url)
    assert hub is not None
    repository, revision, file = hub.groups()
    silence = not progress and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository,
                unquote(file),
                revision=revision,
                cache_dir=cache_dir,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
                library_name="hybridzoo",
            )
        )
    except Exception as error:  # each generation of huggingface_hub and of its HTTP client has its own kinds
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DownloadError(f"{card.url}: the disk is full; make room, or set HF_HOME") from error
        if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
            raise DownloadError(f"the cache cannot be written ({error}); set HF_HOME to a folder of yours") from error
        raise DownloadError(f"{card.url}: {_first_line(error.__cause__ or error)}") from error
    finally:
        if silence:
            enable_progress_bars()


def _check(path: Path, card: Card, cache_dir: str | Path | None) -> None:
    """Refuse a file that is not what its card or its record says; record one that has neither."""
    record, recorded = _record(card, cache_dir), record_of(card, cache_dir=cache_dir)
    expected = card.sha256 or str(recorded.get("sha256", "")) or _hash_of_hub(path)
    digest = hash_of(path)
    if expected and digest != expected.lower():
        since = "as its card says" if card.sha256 else f"as when it first came, {str(recorded.get('date', '?'))[:10]}"
        hint = "delete it to download it again" + ("" if card.sha256 else f"; if the change is right, delete {record}")
        raise DownloadError(f"{path}: has SHA-256 {digest}, not {expected} {since}; {hint}")
    if not recorded:
        _note(path, card, cache_dir, digest, "")


def _hash_of_hub(path: Path) -> str:
    """The hub's cache names large files after their SHA-256; empty for others."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def _note(path: Path, card: Card, cache_dir: str | Path | None, digest: str, etag: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    note = dict(name=card.name, url=card.url, sha256=digest, size=path.stat().st_size, etag=etag, date=now)
    record = _record(card, cache_dir)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_note(record, note)
    except OSError as error:  # a cache that others filled and that we may only read
        _LOG.info("%s: not recorded (%s)", record, error)


def _record(card: Card, cache_dir: str | Path | None) -> Path:
    return _folder(cache_dir) / f"{file_name(card)}.json"


def _folder(cache_dir: str | Path | None) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" if cache_dir is None else Path(cache_dir)


def _last(url: str) -> str:
    """The last part of an address's path, without its escapes, folders and questions."""
    return PurePosixPath(unquote(urlsplit(url).path).replace("\\", "/")).name


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
