"""Tells from the first bytes and the length of a file whether it is a complete file of weights, or what it is."""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

HEAD = 512  # bytes that tell
_PAGE = re.compile(rb"\s*<(?:!doctype|!--|html|head|body|\?xml)", re.IGNORECASE)
_OPEN_PAGE = "it is a web page, not weights: open its address in a browser; it may require a confirmation or a login"
_CUT = "it is cut short: download or copy it again"
_CONTENTS = "its table of contents"
_BLOCK = 1 << 20  # bytes read at a time
# Of a zip archive: the header of a record (its name and more fields follow), the end record, and flags of a record.
_RECORD, _END = struct.Struct("<4sHHHHHIIIHH"), struct.Struct("<4sHHHHIIH")
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800


def is_web_page(head: bytes) -> bool:
    """Whether a file with these first bytes is a web page, which servers may send instead of a file."""
    return bool(_PAGE.match(head.removeprefix(b"\xef\xbb\xbf")))


def is_safetensors(head: bytes) -> bool:
    """Whether a file with these first bytes is safetensors, which starts with the length of a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def flaw(path: Path, *, sums: bool = False) -> str:
    """Why a file cannot be a complete file of weights, in one line; empty if it may be one.

    Zip archives (PyTorch's format since 1.6) and safetensors list the position of their content. All positions must be
    consistent, so that two programs cannot read different content from the same file. Pickles of older PyTorch have no
    such list: they must be read to find out whether they are complete.

    Args:
        path: the file.
        sums: also check the checksums of a zip archive, which reads the whole file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "the file is empty"
    if is_safetensors(head):
        return _flaw_of_safetensors(path, size)
    if head.startswith(b"PK"):
        return _flaw_of_zip(path, size, sums)
    return "" if head.startswith(b"\x80") else _what_it_is(head)


def _flaw_of_safetensors(path: Path, size: int) -> str:
    """The error of the safetensors library for the list of tensors, if any. No tensor is read."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return _CUT
        reason = ""
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            reason = str(error).rpartition("header: ")[2]
        if reason and "not fully covered" not in reason:
            return f"it begins like safetensors, but its list of tensors is broken ({reason[:160]})"
        # of entries with the same name, the library uses the last one, other programs the first
        entries = json.loads(file.read(length), object_pairs_hook=list)
    if len(dict(entries)) != len(entries):
        return "it begins like safetensors, but its list of tensors is broken (it has a name twice)"
    ends = [dict(entry)["data_offsets"][1] for name, entry in entries if name != "__metadata__"]
    more = size - 8 - length - max(ends, default=0)
    return _CUT if more < 0 else f"it is {more:,} bytes longer than its list of tensors says" if more else ""


def _flaw_of_zip(path: Path, size: int, sums: bool) -> str:
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                return _CUT
            with zipfile.ZipFile(file) as archive:
                return _flaw_of_archive(archive, file, size) or (_flaw_of_sums(archive, file) if sums else "")
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error, OverflowError, EOFError):
        return f"{_CONTENTS} is broken: download or copy it again"


def _flaw_of_archive(archive: zipfile.ZipFile, file: BinaryIO, size: int) -> str:
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    # PyTorch stores tensors uncompressed. Compressed or overlapping entries could fill the memory from a tiny file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it is a compressed zip archive, which PyTorch never writes: unpack it"
    if sum(entry.file_size for entry in entries) > size:
        return f"{_CONTENTS} lists more than the file contains"
    file.seek(size - _END.size)
    signature, _, _, _, count, _, begins, comment = _END.unpack(file.read(_END.size))
    whole = signature == b"PK\x05\x06" and not comment
    if not whole or count not in (len(entries), 0xFFFF) or begins not in (archive.start_dir, 0xFFFFFFFF):
        return f"{_CONTENTS} is not at the end of the file"
    # PyTorch ignores upper and lower case in the names of records, and looks in the folder of the first record.
    names = [entry.filename.lower() for entry in entries]
    if twice := next((name for name, number in Counter(names).items() if number > 1), None):
        return f"{_CONTENTS} names {twice!r} twice"
    if len({name.partition("/")[0] for name in names}) > 1:
        return f"{_CONTENTS} names more than one folder"
    position = 0
    for entry in entries:
        file.seek(entry.header_offset)
        head = _RECORD.unpack(file.read(_RECORD.size))
        kind, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = head
        name = entry.orig_filename.encode("utf-8" if flags & _UTF8 else "cp437")
        told = crc == entry.CRC and _agrees(packed, entry.compress_size) and _agrees(unpacked, entry.file_size)
        later = bool(flags & _SIZES_FOLLOW) and (crc, packed, unpacked) in ((0, 0, 0), (0, 0xFFFFFFFF, 0xFFFFFFFF))
        if not (
            (kind, flags, method) == (b"PK\x03\x04", entry.flag_bits, entry.compress_type)
            and file.read(name_length) == name
            and entry.filename == entry.orig_filename
            and entry.compress_size == entry.file_size
            and not flags & _ENCRYPTED
            and (told or later)
            and (entry.header_offset >= position if position else entry.header_offset == 0)
        ):
            return f"{_CONTENTS} and its record {entry.filename!r} disagree"
        position = entry.header_offset + _RECORD.size + name_length + extra_length + entry.file_size
    return "" if position <= archive.start_dir else f"{_CONTENTS} lies inside a record"


def _agrees(said: int, size: int) -> bool:
    return said in (size, 0xFFFFFFFF)  # 0xFFFFFFFF: the size follows in a longer field


def _flaw_of_sums(archive: zipfile.ZipFile, file: BinaryIO) -> str:
    """The first record with a wrong checksum.

    PyTorch can write files without checksums (`torch.serialization.set_crc32_options`); then all of them are 0.
    """
    entries = archive.infolist()
    if not any(entry.CRC for entry in entries):
        return ""
    for entry in entries:
        file.seek(entry.header_offset)
        *_, name_length, extra_length = _RECORD.unpack(file.read(_RECORD.size))
        file.seek(name_length + extra_length, os.SEEK_CUR)
        left, crc = entry.file_size, 0
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            left, crc = left - len(block), zlib.crc32(block, crc)
        if left or crc != entry.CRC:
            return f"its record {entry.filename!r} is damaged (wrong checksum): download or copy it again"
    return ""


def _what_it_is(head: bytes) -> str:
    """Describe a file of another format by its first bytes."""
    if is_web_page(head):
        return _OPEN_PAGE
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip: unpack it"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it, and use the file inside"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull"
    begins = " ".join(head[:60].decode("utf-8", errors="replace").split())
    if begins.isprintable() and "\ufffd" not in begins[:-1]:
        kind = "JSON" if begins[:1] in ("{", "[") else "text"
        return f"it is {kind}, not weights: {begins!r}"
    return f"it is not a file of weights: it begins with {head[:8].hex(' ')}"
