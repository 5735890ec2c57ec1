"""One reader for every task: the same pixels, whatever the file's format, depth, mode and orientation."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_folders import crop
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hybridzoo.train import images
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import check_image, find_images, read_image, read_mask, read_picture, shown_size


@pytest.fixture(scope="module")
def photo():
    return crop("coffee")


def grey(photo):
    return np.asarray(photo.convert("L"))


def refused(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_image(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# Orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied(photo, suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    photo.save(path, exif=exif, **({"quality": 95} if suffix != "tif" else {}))
    stored = Image.open(path)
    right = ImageOps.exif_transpose(stored).convert("RGB") if suffix != "tif" else stored.convert("RGB")
    assert np.array_equal(read_image(path), right)
    assert read_image(path).size == ((80, 96) if orientation >= 5 else (96, 80))
    assert shown_size(path) == (read_image(path).size, orientation >= 5)


def test_orientation_behind_the_pixels_of_a_png(photo, tmp_path):
    path = tmp_path / "x.png"
    photo.save(path)
    data = path.read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    block = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_image(path).size == (80, 96)
    assert shown_size(path) == ((80, 96), True)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_beside_good_pixels_is_ignored(photo, tmp_path):
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        photo.save(tmp_path / "x.jpg", exif=exif)
        assert read_image(tmp_path / "x.jpg").size == (96, 80)
        assert shown_size(tmp_path / "x.jpg") == ((96, 80), False)


# Depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_the_whole_range(photo, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(grey(photo).astype(np.uint16) * 257).save(path)
    picture = read_picture(path)
    assert np.array_equal(np.asarray(picture.image), np.stack([grey(photo)] * 3, -1))
    assert picture.highest == 257 * int(grey(photo).max())


def test_16_bit_colour_keeps_the_upper_bits(photo, tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), np.asarray(photo)[:, :, ::-1].astype(np.uint16) * 257)
    picture = read_picture(path)
    assert np.array_equal(picture.image, photo)
    assert picture.highest == 257 * int(np.asarray(photo).max())
    assert "16-bit colour" in refused(path, white_value=4095)


def test_12_bits_from_the_header_are_scaled(tmp_path):
    """A TIFF of 12 bits a sample, two samples in three bytes."""
    values = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    flat = values.ravel()
    packed = np.stack([flat[::2] >> 4, (flat[::2] & 15) << 4 | flat[1::2] >> 8, flat[1::2] & 255], 1).astype(np.uint8)
    tags = [(256, 4, 8), (257, 4, 8), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 134), (277, 3, 1), (278, 4, 8),
            (279, 4, packed.size)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(head.ljust(134, b"\0") + packed.tobytes())
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.tif"))[..., 0], np.rint(values * (255 / 4095)))


def test_white_value_scales_and_saturates(photo, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(grey(photo).astype(np.uint16) * 16).save(path)  # 12 bits in 16
    assert np.asarray(read_image(path)).max() <= 16, "nearly black, which the checks of data and prediction refuse"
    assert read_picture(path).highest < images.DARK
    assert np.array_equal(np.asarray(read_image(path, white_value=255 * 16))[..., 0], grey(photo))
    assert np.asarray(read_image(path, white_value=100)).max() == 255


def test_floating_point_is_0_to_1(photo, tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(grey(photo).astype(np.float32) / 255).save(path)
    assert np.array_equal(np.asarray(read_image(path))[..., 0], grey(photo))
    Image.fromarray(grey(photo).astype(np.float32)).save(path)
    assert "floating point values from" in refused(path)
    assert np.array_equal(np.asarray(read_image(path, white_value=255))[..., 0], grey(photo))
    for bad in (np.nan, np.inf, -1):
        values = grey(photo).astype(np.float32) / 255
        values[3, 4] = bad
        Image.fromarray(values).save(path)
        assert "expected 0 to 1" in refused(path)
        assert "expected 0 to" in refused(path, white_value=2)


def test_32_bit_whole_numbers_need_a_white_value(photo, tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(grey(photo).astype(np.int32) * 100).save(path)
    assert "32-bit whole numbers" in refused(path)
    assert np.array_equal(np.asarray(read_image(path, white_value=25500))[..., 0], grey(photo))


# Modes ------------------------------------------------------------------------------------------------------------


def test_modes(photo, tmp_path):
    """What each mode becomes, by the rules in the module's text."""
    half = np.asarray(photo).copy()
    alpha = np.zeros((80, 96), np.uint8)
    alpha[:, 48:] = 255
    over_white = np.where(alpha[..., None] > 0, half, 255)
    Image.fromarray(np.dstack([half, alpha])).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), over_white)
    Image.fromarray(np.dstack([grey(photo), alpha])).save(tmp_path / "la.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "la.png"))[:, :48], np.full((80, 48, 3), 255))
    palette = photo.quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), palette.convert("RGB"))
    palette.save(tmp_path / "transparent.png", transparency=palette.getpixel((0, 0)))
    assert read_image(tmp_path / "transparent.png").getpixel((0, 0)) == (255, 255, 255)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert abs(np.asarray(read_image(tmp_path / "cmyk.jpg")).astype(int) - half).mean() < 8
    photo.convert("1").save(tmp_path / "1.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "1.png"))[..., 1], np.asarray(photo.convert("1")) * 255)
    photo.convert("L").save(tmp_path / "l.webp", lossless=True)
    assert np.asarray(read_image(tmp_path / "l.webp")).shape == (80, 96, 3)
    for path in tmp_path.iterdir():
        for full in (True, False):
            assert check_image(path, full=full) is None


# Refused ----------------------------------------------------------------------------------------------------------


def test_unsupported_formats_are_not_opened(photo, tmp_path):
    photo.save(tmp_path / "x.gif")
    (tmp_path / "x.gif").rename(tmp_path / "x.png")
    assert "holds GIF" in refused(tmp_path / "x.png")
    eps = io.BytesIO()
    photo.save(eps, "EPS")
    (tmp_path / "x.jpg").write_bytes(eps.getvalue())
    assert "holds PostScript" in refused(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    assert "HEIC" in refused(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(b"")
    assert "is empty" in refused(tmp_path / "x.jpg")
    assert "no such file" in refused(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in refused(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    ("size", "why"),
    [((100_000, 1), "one side more than 100 times"), ((1, 1000), "one side"), ((20_000, 20_000), "more than 100 mill")],
)
def test_shapes_out_of_bounds_are_refused_by_their_header(size, why, tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.new("1", size).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    message = refused(path)
    assert why in message or "bomb" in message
    with pytest.raises(UserError, match=r"x\.png"):
        shown_size(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "ppm", "jp2", "avif"])
def test_truncated_files_are_named(photo, suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    photo.save(path)
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(part * len(whole))])
        refused(path)
        with pytest.raises(UserError, match=f"{path}"):
            check_image(path, full=False)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM"]), st.data())
def test_damaged_bytes_give_a_picture_or_one_line(kind, data):
    """Any bytes of a valid file changed: never another exception."""
    buffer = io.BytesIO()
    crop("rocket", size=(24, 20)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    message = "x: "
    try:
        assert read_image(io.BytesIO(bytes(content)), name="x").mode == "RGB"
    except UserError as error:
        message = str(error)
    assert message.startswith("x: ")
    assert "\n" not in message


# Masks ------------------------------------------------------------------------------------------------------------


def test_masks_give_the_stored_ids(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    path = tmp_path / "m.png"
    for image in (Image.fromarray(ids), Image.fromarray(ids.astype(np.uint16))):
        image.save(path)
        assert np.array_equal(read_mask(path), ids)
    coloured = Image.fromarray(ids)
    coloured.putpalette(list(range(255, -1, -1)) * 3)
    coloured.save(path)
    assert Image.open(path).mode == "P"
    assert np.array_equal(read_mask(path), ids)
    Image.fromarray(ids > 0).save(path)
    assert Image.open(path).mode == "1"
    assert np.array_equal(read_mask(path), ids > 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ids).save(path, exif=exif)
    assert np.array_equal(read_mask(path), np.rot90(ids, -1))
    Image.fromarray(np.stack([ids] * 3, -1)).save(path)
    with pytest.raises(UserError, match="3 channels"):
        read_mask(path)


# Folders ----------------------------------------------------------------------------------------------------------


def test_images_below_a_folder_are_found(tmp_path):
    files = ("10.png", "9.JPG", "a/b/1.TIFF", "c.webp", "x.gif", "notes.txt", "._9.png", "a/.ipynb_checkpoints/1.png")
    for name in (*files, "@eaDir/1.png", "Thumbs.db", "__MACOSX/1.png", ".DS_Store", "real/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_images(tmp_path)

    def names(paths):
        return [str(Path(path).relative_to(tmp_path)) for path in paths]

    assert names(found.images) == ["9.JPG", "10.png", "a/b/1.TIFF", "c.webp", "gone.png", "linked/1.png", "real/1.png"]
    assert names(found.hidden) == [".DS_Store", "._9.png", "@eaDir", "Thumbs.db", "__MACOSX", "a/.ipynb_checkpoints"]
    assert names(found.others) == ["linked/circle", "notes.txt", "pipe.png", "real/circle", "x.gif"]
    assert "broken link" in refused(tmp_path / "gone.png")
