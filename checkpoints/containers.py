"""What a file is, by its first bytes and its length: a whole container of weights, or what lies there instead."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

HEAD = 512  # bytes that tell
_PAGE = re.compile(rb"\s*<(?:!doctype|!--|html|head|body|\?xml)", re.IGNORECASE)
_OPEN_PAGE = "it is a web page, not weights: open its address in a browser, which may ask to confirm or log in"
_CUT = "it is cut short: download or copy it again"


def is_web_page(head: bytes) -> bool:
    """Whether a file that begins like this is a page for people: what a server sends instead of a file."""
    return bool(_PAGE.match(head.removeprefix(b"\xef\xbb\xbf")))


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins like this holds safetensors: the length of a JSON object, and the object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def flaw(path: Path) -> str:
    """Why a file cannot be a whole file of weights, in one line; empty where nothing speaks against it.

    Zip archives (PyTorch's format since 1.6) and safetensors say how long they are. Older PyTorch's pickles do not:
    whether they are whole only reading them tells.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "the file is empty"
    if is_safetensors(head):
        return _flaw_of_safetensors(path, size)
    if head.startswith(b"PK"):
        return _flaw_of_zip(path, size)
    return "" if head.startswith(b"\x80") else _what_it_is(head)


def _flaw_of_safetensors(path: Path, size: int) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return _CUT
        text = file.read(length)
    try:
        tensors = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        whole = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "it begins like safetensors, but its list of tensors is broken"
    if whole != size:
        return _CUT if size < whole else f"it is {size - whole:,} bytes longer than its list of tensors says"
    return ""


def _flaw_of_zip(path: Path, size: int) -> str:
    if not zipfile.is_zipfile(path):
        return _CUT
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return "its table of contents is broken: download or copy it again"
    # PyTorch stores tensors as they are. What is compressed could fill the memory from a file of a few bytes, and so
    # could entries that lie on top of each other.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it is a compressed zip archive, which PyTorch never writes: unpack it"
    if sum(entry.file_size for entry in entries) > size:
        return "its table of contents promises more than the file holds"
    return ""


def _what_it_is(head: bytes) -> str:
    """A file that is no container, by its first bytes."""
    if is_web_page(head):
        return _OPEN_PAGE
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip: unpack it"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it, and give the file inside"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: type git lfs pull"
    begins = " ".join(head[:60].decode("utf-8", errors="replace").split())
    if begins.isprintable() and "\ufffd" not in begins[:-1]:
        kind = "JSON" if begins[:1] in ("{", "[") else "text"
        return f"it is {kind}, not weights: {begins!r}"
    return f"it is no file of weights: it begins with {head[:8].hex(' ')}"
