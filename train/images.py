"""Finding and reading pictures, for training, testing, predicting and checking in all three tasks.

The formats in `FORMATS` are read, recognised by content, not by suffix; of several frames or pages, the first one. The
result is RGB with 8 bits per channel, turned upright by its EXIF orientation:

- grey is repeated in the three channels; 1-bit pictures are black and white; palettes, CMYK and YCbCr are converted;
- transparent pixels are laid over white; colour profiles are not applied;
- 16-bit colour keeps the upper 8 bits;
- grey with more than 8 bits is scaled so that `white_value` becomes 255.  The default is the largest value of the
  file's bit depth (65535 for 16 bits, 4095 for a TIFF that says 12), 1.0 for floating point; larger values are an
  error.

Refused, with an error that names the file: other formats, damaged files, more than `MAX_PIXELS`, a side more than
`MAX_RATIO` times the other. Reading takes about 16 bytes per pixel at most, 1.6 GB; a classifier's resize of the
shorter side to S pixels gives at most `MAX_RATIO` S x S.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import stat
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hybridzoo.train.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
# In upper or lower case; other files are left out, counted and named.
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".pbm", ".pgm", ".ppm", ".pnm",
            ".jp2", ".avif"}  # fmt: skip
MAX_PIXELS = 100_000_000
MAX_RATIO = 100
MANY, SAMPLE = 10_000, 2_000  # if a split has more images than MANY, about SAMPLE are opened before training
DARK = 4096  # a 16-bit picture with only smaller values would be nearly black: it is probably 12-bit data

# Pillow's exceptions for damaged files, and for impossible sizes in them.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
              NotImplementedError, RuntimeError, struct.error, Image.DecompressionBombError)  # fmt: skip

_PLAIN_MODES = {"1", "L", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "YCbCr"}  # turning these to RGB cannot fail
_SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot", "__macosx",
                 "$recycle.bin", "system volume information", "lost+found", "__pycache__"}  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 0x0102
_END_MARKS = {b"\x89PNG": b"IEND\xaeB`\x82", b"\xff\xd8": b"\xff\xd9"}
_OTHER_FORMATS = {b"GIF8": "GIF", b"%!PS": "PostScript", b"%PDF": "PDF", b"8BPS": "Photoshop", b"<svg": "SVG",
                  b"<?xm": "XML", b"<htm": "HTML", b"<!DO": "HTML", b"\0\0\1\0": "ICO"}  # fmt: skip

# Pillow warns at 89 million pixels; our limit is close and raises an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# Finding ----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The files below a folder.

    Attributes:
        images: files with a picture's suffix, in natural order ("2" before "10").
        hidden: names that begin with a dot, and system files (Thumbs.db, @eaDir, ...); such folders are not searched.
        others: the other files, and circular links.
    """

    images: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def find_images(folder: Path) -> Found:
    """Search a folder and all subfolders, also through links.

    A broken link counts as an image if its name does, so that reading it names the missing file.

    Raises:
        UserError: a folder cannot be listed.
    """
    found = Found()
    _look(folder, (), found)
    found.images.sort(key=natural_key)
    return found


def _look(folder: Path, above: tuple[tuple[int, int], ...], found: Found) -> None:
    try:
        status = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        found.others.append(folder)
        return
    for entry in entries:
        path = folder / entry.name
        if is_hidden(entry.name):
            found.hidden.append(path)
        elif entry.is_dir():
            _look(path, (*above, here), found)
        elif path.suffix.lower() in SUFFIXES and (entry.is_file() or not path.exists()):
            found.images.append(path)
        else:
            found.others.append(path)


def looked_at(images: Sequence[Path]) -> Sequence[Path]:
    """The images that are opened before training: all, or about `SAMPLE` evenly spaced ones if there are more than
    `MANY`."""
    return images if len(images) <= MANY else images[:: math.ceil(len(images) / SAMPLE)]


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is never data."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def natural_key(name: str | Path) -> tuple[list[Any], str]:
    """Sort key by which "2" comes before "10", and case only where nothing else differs."""
    text = str(name)
    parts: list[Any] = re.split(r"(\d+)", text.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, text


# Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture that was read.

    Attributes:
        image: RGB, upright.
        highest: the largest value, in 0..65535, of pictures stored as integers with more than 8 bits; otherwise None.
    """

    image: Image.Image
    highest: int | None = None


def read_image(source: Path | BinaryIO, *, name: str = "", white_value: float | None = None) -> Image.Image:
    """See `read_picture`; returns only the image."""
    return read_picture(source, name=name, white_value=white_value).image


def read_picture(source: Path | BinaryIO, *, name: str = "", white_value: float | None = None) -> Picture:
    """Decode a whole picture as RGB, upright.

    Args:
        source: a path, or an open file.
        name: name for errors; default the path.
        white_value: the value that becomes 255 in grey pictures with more than 8 bits; larger values become 255 too.

    Raises:
        UserError: the picture cannot be read, or is refused, see above.
    """
    name = name or str(source)
    try:
        with _open(source, name) as image:
            deep = _bits(image) > 8
            image.load()
            if image.mode.startswith(("I", "F")):
                rgb, highest = _scaled(image, white_value, name)
            else:
                if deep and white_value is not None:
                    raise ImageError(f"{name}: 16-bit colour, whose white value cannot be set; store it with 8 bits")
                rgb = _as_rgb(image)
                highest = 257 * int(np.asarray(rgb).max()) if deep else None
            return Picture(_upright(rgb, _orientation(image)), highest)
    except UNREADABLE as error:
        raise ImageError(f"{name}: {_reason(error, source)}") from error


def read_mask(path: Path) -> NDArray[Any]:
    """Decode a mask: (H, W) class ids, upright.

    The ids are the stored values: the indices of a palette, 0 and 1 for 1 bit.

    Raises:
        UserError: the file cannot be read, or does not have one channel of integers.
    """
    try:
        with _open(path, f"mask {path}") as image:
            channels = len(image.getbands())
            if channels != 1 or image.mode == "F":
                kind = "floating point values" if image.mode == "F" else f"{channels} channels"
                raise MaskError(f"mask {path} has {kind}; expected one channel, which holds class ids")
            image.load()
            ids = np.asarray(_upright(image, _orientation(image)))
            return ids.astype(np.uint8) if ids.dtype == bool else ids
    except UNREADABLE as error:
        raise ImageError(f"mask {path}: {_reason(error, path)}") from error


def without_zero(ids: NDArray[Any]) -> NDArray[Any]:
    """Class ids of a mask in which 0 is no class: 0 and 255 become 255, which is ignored, k becomes k - 1."""
    return np.where((ids == 0) | (ids == 255), 255, ids - np.asarray(1, ids.dtype)).astype(ids.dtype)


class ImageError(UserError):
    """A picture or mask cannot be read, or is refused."""


class MaskError(UserError):
    """A mask can be decoded, but does not hold class ids."""


def shown_size(path: Path) -> tuple[tuple[int, int], bool]:
    """(width, height) of `read_image`'s result, from the header only, and whether EXIF exchanges the two.

    Raises:
        UserError: errors of `read_image` that the header shows.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"{path}: {_reason(error, path)}") from error
    return _shown_size(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=200_000)  # checking, training and scoring ask for the same files
def _shown_size(path: Path, changed: int, size: int) -> tuple[tuple[int, int], bool]:
    try:
        with _open(path, str(path)) as image:
            width, height = image.size
            if image.format == "PNG" and "exif" not in image.info and not _late_exif(path):
                return (width, height), False  # Pillow would decode all pixels to find data after them
            turned = _orientation(image) >= 5
            if turned and image.format != "TIFF":  # formats for which Pillow gives the turned size
                width, height = height, width
            return (width, height), turned
    except UNREADABLE as error:
        raise ImageError(f"{path}: {_reason(error, path)}") from error


def check_image(path: Path, *, full: bool, white_value: float | None = None) -> int | None:
    """Check whether `read_image` can read a picture.

    Args:
        full: decode it. Otherwise only check the header and the end of PNG and JPEG files, and decode other formats.

    Returns:
        `Picture.highest`, if the picture was decoded.

    Raises:
        UserError: see `read_image`.
    """
    if not full and _ends_well(path):
        shown_size(path)
        return None
    try:
        with _open(path, str(path)) as image:
            if _bits(image) == 8 and image.mode in _PLAIN_MODES:
                image.load()
                return None
    except UNREADABLE as error:
        raise ImageError(f"{path}: {_reason(error, path)}") from error
    return read_picture(path, white_value=white_value).highest


def _open(source: Path | BinaryIO, name: str) -> Image.Image:
    """Open an image: read its header and check its size."""
    if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # reading from a pipe would never end
        raise ImageError(f"{name}: not a file")
    image = Image.open(source, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        problem = f"more than {MAX_PIXELS // 1_000_000} million pixels"
    elif max(width, height) > MAX_RATIO * min(width, height):
        problem = f"one side more than {MAX_RATIO} times the other"
    else:
        return image
    image.close()
    raise ImageError(f"{name}: {width}x{height}, {problem}; cut it into parts or make it smaller")


def _bits(image: Image.Image) -> int:
    """Stored bits per channel, according to the header."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]
    if image.mode.startswith(("I", "F")):
        return 16
    tiles: Any = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return 16 if isinstance(args, str) and "16" in args else 8


def _scaled(image: Image.Image, white_value: float | None, name: str) -> tuple[Image.Image, int | None]:
    """A grey picture with more than 8 bits as RGB, and its largest value in 0..65535."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (np.isfinite(values).all() and low >= 0 and (white_value is not None or high <= 1)):
            limits = "0 to 1" if white_value is None else f"0 to white_value={white_value:g}"
            raise ImageError(f"{name}: floating point values from {low:g} to {high:g}, expected {limits}; {_SCALE_IT}")
        white, highest = white_value or 1.0, None
    else:
        bits = _bits(image)
        if low < 0 or (bits > 16 and white_value is None):
            raise ImageError(f"{name}: {bits}-bit whole numbers from {low:g} to {high:g}; {_SCALE_IT}")
        white = white_value or 2.0**bits - 1
        highest = round(min(high * 65535 / white, 65535))
    scaled = values.astype(np.float32)
    scaled *= 255 / white
    np.clip(scaled, 0, 255, out=scaled)
    np.rint(scaled, out=scaled)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB"), highest


_SCALE_IT = "store it with 8 or 16 bits, or set white_value, the value of white"


def _as_rgb(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    over = image.convert("RGBA")
    page = Image.new("RGBA", over.size, "white")
    page.alpha_composite(over)
    return page.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except UNREADABLE:
        return 1  # damaged metadata, but good pixels
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _late_exif(path: Path) -> bool:
    """Whether a PNG has EXIF data, or text that may hold XMP, in any chunk."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
    return False


def _ends_well(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            mark = next((end for begin, end in _END_MARKS.items() if start.startswith(begin)), None)
            if mark is None:
                return False
            file.seek(-len(mark), os.SEEK_END)
            return file.read() == mark
    except OSError:
        return False


def _reason(error: BaseException, source: Path | BinaryIO) -> str:
    """The reason why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "a broken link" if isinstance(source, Path) and source.is_symlink() else "no such file"
    if isinstance(error, UnidentifiedImageError):
        return _what_it_is(source)
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _what_it_is(source: Path | BinaryIO) -> str:
    try:
        with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
            file.seek(0)
            start = file.read(16)
    except OSError:
        start = b" "
    if not start:
        return "is empty"
    kind = next((name for begin, name in _OTHER_FORMATS.items() if start.startswith(begin)), "")
    if start[4:8] == b"ftyp":
        kind = "HEIC or a video"
    formats = ", ".join(FORMATS)
    return f"holds {kind}, which is not read; convert it to PNG or JPEG" if kind else f"not an image ({formats})"
