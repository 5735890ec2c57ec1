"""Pictures of predictions: boxes and masks, class maps, class probabilities, and grids of them.

Small images are enlarged first, so that lines and text are thin compared with a 32 or 128 px image. Every picture has
its classes as text. The colours are Paul Tol's "muted" set, which suits all types of colour vision; its indigo is
lighter here, for dark images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from hybridzoo.train.plain import printable

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

PALETTE: tuple[Colour, ...] = (
    (204, 102, 119), (92, 77, 190), (221, 204, 119), (17, 119, 51), (136, 204, 238),
    (136, 34, 85), (68, 170, 153), (153, 153, 51), (170, 68, 153), (221, 221, 221),
)  # fmt: skip
RIGHT, WRONG, QUIET = (17, 119, 51), (204, 51, 17), (150, 150, 150)
INK, PAPER = (34, 34, 34), (255, 255, 255)
WIDEST_NAME = 1200  # px; longer names are cut
SHORT_SIDE = 384  # px that the shorter side of a small image is enlarged to, at least


def draw_boxes(
    image: Image.Image | NDArray[np.uint8],
    boxes: Any,
    labels: Any,
    scores: Any = None,
    masks: Any = None,
    class_names: Sequence[str] = (),
) -> Image.Image:
    """Objects with box, name, score and optional mask. Arguments may be tensors, arrays or lists.

    Args:
        image: RGB; an array is (H, W, 3) uint8.
        boxes: (N, 4) left, top, right, bottom in pixels.
        labels: (N,) index into `class_names`.
        scores: (N,) in 0..1, or None, as for ground truth.
        masks: (N, H, W), nonzero inside, or None.
        class_names: names; without them the index is written.
    """
    picture, scale = _enlarge(image)
    edges = _array(boxes).reshape(-1, 4).astype(float) * scale
    classes = _array(labels).astype(int).reshape(-1)
    shares = None if scores is None else _array(scores).astype(float).reshape(-1)
    order = range(len(classes)) if shares is None else np.argsort(shares, kind="stable").tolist()  # best on top
    if masks is not None:
        for i in order:
            picture = _tint(picture, _array(masks)[i] != 0, _colour(int(classes[i])), 0.55)
    pen = ImageDraw.Draw(picture)
    width = max(2, round(min(picture.size) / 190))
    for i in order:
        left, top, right, bottom = edges[i].tolist()
        outline = (left, top, max(right - 1, left), max(bottom - 1, top))
        pen.rectangle(outline, outline=_colour(int(classes[i])), width=width)
    taken: list[Box] = []
    font = _font(_text_size(picture))
    for i in reversed(list(order)):
        text = _name(int(classes[i]), class_names) + ("" if shares is None else f" {shares[i]:.2f}")
        _tag(pen, text, edges[i].tolist(), font, _colour(int(classes[i])), picture.size, taken)
    return picture


def draw_segmentation(
    image: Image.Image | NDArray[np.uint8], classes: Any, class_names: Sequence[str] = (), *, ignored: int = 255
) -> Image.Image:
    """The image with its class map over it: names in the larger regions, and a legend below.

    Args:
        image: RGB; an array is (H, W, 3) uint8.
        classes: (H, W) class ids.
        class_names: names; without them the id is written.  A first class named "background" stays uncoloured.
        ignored: an id that stays uncoloured.
    """
    from scipy import ndimage

    ids = _array(classes).astype(int)
    picture, scale = _enlarge(image)
    first = 1 if _name(0, class_names) == "background" else 0
    colours = {i: _colour(i - first) for i in np.unique(ids).tolist() if i >= first and i != ignored}
    for i, colour in colours.items():
        picture = _tint(picture, ids == i, colour, 0.7)
    pen = ImageDraw.Draw(picture)
    font = _font(_text_size(picture))
    for i, colour in colours.items():
        regions, _ = ndimage.label(ids == i, structure=np.ones((3, 3)))
        for region, window in enumerate(ndimage.find_objects(regions), 1):
            inside = np.pad(regions[window] == region, 1)
            if inside.sum() < max(0.003 * ids.size, 12):
                continue
            depth = ndimage.distance_transform_edt(
                inside
            )  # a ring's centre is outside it, but its pixel farthest from the edge is inside
            y, x = np.unravel_index(int(depth.argmax()), depth.shape)
            spot = ((window[1].start + x - 0.5) * scale, (window[0].start + y - 0.5) * scale)
            fill, stroke = _text_colours(colour)
            room = picture.width - 8
            small = _fitting(_name(i, class_names), font, room)
            text = _shorten(_name(i, class_names), small, room)
            half = small.getlength(text) / 2 + 4
            spot = (min(max(spot[0], half), picture.width - half), spot[1])
            pen.text(spot, text, fill, small, anchor="mm", stroke_width=2, stroke_fill=stroke)
    return _legend(picture, [(_name(i, class_names), colour) for i, colour in colours.items()])


def draw_classification(
    image: Image.Image | NDArray[np.uint8], best: Sequence[tuple[str, float]], truth: str | None = None
) -> Image.Image:
    """The image above a bar for each class.

    Args:
        image: RGB or grey; an array is (H, W, 3) or (H, W) uint8.
        best: (name, probability in 0..1), likeliest first.
        truth: the correct name; its bar is green, and a wrong first prediction is red.
    """
    picture, _ = _enlarge(image, SHORT_SIDE * 5 // 8)
    picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    font = _font(15)
    line, pad = 24, 8
    best = [(printable(name), share) for name, share in best]
    names = 1 + max((math.ceil(font.getlength(name)) for name, _ in best), default=0)
    names = min(names, WIDEST_NAME)
    width = max(picture.width, 220, names + 110)
    sheet = Image.new("RGB", (width, picture.height + pad + line * len(best) + pad), PAPER)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    start, end = names + 2 * pad, width - pad - math.ceil(font.getlength("100 %")) - pad
    for i, (name, share) in enumerate(best):
        y = picture.height + pad + i * line + line // 2
        colour = QUIET
        if truth is not None and name == printable(truth):
            colour = RIGHT
        elif i == 0:
            colour = PALETTE[1] if truth is None else WRONG
        pen.text((pad, y), _shorten(name, font, names), INK, font, anchor="lm")
        pen.rectangle((start, y - 7, end, y + 7), fill=(240, 240, 240))
        if share > 0:
            pen.rectangle((start, y - 7, start + round((end - start) * min(share, 1)), y + 7), fill=colour)
        pen.text((width - pad, y), f"{100 * share:.0f} %", INK, font, anchor="rm")
    if truth is not None and best and best[0][0] != printable(truth):
        note = _shorten(f"is {printable(truth)}", font, sheet.width - 12)
        left = (sheet.width - picture.width) // 2 + 6 if font.getlength(note) < picture.width - 12 else 6
        box = pen.textbbox((left, 6), note, font)
        pen.rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), fill=WRONG)
        pen.text((left, 6), note, PAPER, font)
    return sheet


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """A picture, enlarged if it is small, with a line of text below, in a font size that fits."""
    picture, _ = _enlarge(picture, 160)
    sheet = Image.new("RGB", (max(picture.width, 160), picture.height + 24), PAPER)
    sheet.paste(picture, ((sheet.width - picture.width) // 2, 0))
    text = printable(text)
    font = _fitting(text, _font(15), sheet.width)
    spot = (sheet.width / 2, picture.height + 13)
    ImageDraw.Draw(sheet).text(spot, _shorten(text, font, sheet.width), INK, font, anchor="mm")
    return sheet


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), *, gap: int = 16) -> Image.Image:
    """Pictures in rows and columns on white, a title above each column; each is centred in its cell."""
    if not rows or not any(rows):
        raise ValueError("grid: rows is empty")
    columns = max(len(row) for row in rows)
    widths = [max((row[c].width for row in rows if c < len(row)), default=0) for c in range(columns)]
    heights = [max(picture.height for picture in row) if row else 0 for row in rows]
    head = 34 if titles else 0
    size = (sum(widths) + gap * (columns + 1), head + sum(heights) + gap * (len(rows) + 1))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    x = gap
    for c, width in enumerate(widths):
        if c < len(titles):
            pen.text((x + width / 2, gap / 2 + head / 2), titles[c], INK, _font(20, bold=True), anchor="mm")
        y = head + gap
        for r, row in enumerate(rows):
            if c < len(row):
                sheet.paste(row[c], (x + (width - row[c].width) // 2, y + (heights[r] - row[c].height) // 2))
            y += heights[r] + gap
        x += width + gap
    return sheet


def side_by_side(prediction: Image.Image, truth: Image.Image) -> Image.Image:
    """A prediction next to the truth."""
    return grid([[prediction, truth]], ("prediction", "ground truth"))


# Parts ------------------------------------------------------------------------------------------------------------


def _array(values: Any) -> NDArray[Any]:
    """A tensor (on any device), array or list as a NumPy array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _enlarge(image: Image.Image | NDArray[np.uint8], short_side: int = SHORT_SIDE) -> tuple[Image.Image, int]:
    """RGB copy whose shorter side is at least `short_side`, and the integer factor."""
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    scale = max(1, math.ceil(short_side / min(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC), scale


def _tint(picture: Image.Image, mask: NDArray[np.bool_], colour: Colour, strength: float) -> Image.Image:
    """Colour the inside of a mask of the unscaled image, with a visible edge."""
    large = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    scale = picture.width / mask.shape[1]
    inside = np.asarray(large.filter(ImageFilter.GaussianBlur(0.6 * scale)) if scale > 1 else large) > 127
    core = inside.copy()
    for _ in range(
        max(1, round(min(picture.size) / 250))
    ):  # erode by one pixel at a time; outside the image counts as inside
        padded = np.pad(core, 1, constant_values=True)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    alpha = np.where(core, strength, np.where(inside, 1.0, 0.0)) * 255
    return Image.composite(Image.new("RGB", picture.size, colour), picture, Image.fromarray(alpha.astype(np.uint8)))


def _tag(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: list[float],
    font: ImageFont.FreeTypeFont,
    colour: Colour,
    size: tuple[int, int],
    taken: list[Box],
) -> None:
    """Write `text` at the corner of `box` where it covers least of the tags in `taken`, and add it to `taken`."""
    font = _fitting(text, font, size[0] - 8)
    text = _shorten(text, font, size[0] - 8)
    width, height = math.ceil(font.getlength(text)) + 8, round(font.size * 1.3)
    left, top, right, bottom = box
    corners = [(left, top - height), (right - width, top - height), (left, bottom), (right - width, bottom),
               (left, top), (right - width, top), (left, bottom - height),
               (right - width, bottom - height)]  # fmt: skip
    spots = []
    for x, y in corners:
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        spots.append((x, y, x + width, y + height))
    spot = min(spots, key=lambda s: sum(_shared(s, other) for other in taken))
    taken.append(spot)
    pen.rectangle(spot, fill=colour)
    pen.text((spot[0] + 4, (spot[1] + spot[3]) / 2), text, _text_colours(colour)[0], font, anchor="lm")


def _shared(a: Box, b: Box) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _legend(picture: Image.Image, entries: Sequence[tuple[str, Colour]]) -> Image.Image:
    """The picture with lines of coloured squares and names below."""
    if not entries:
        return picture
    font, line, pad = _font(16), 26, 8
    places: list[tuple[float, int]] = []
    entries = [(_shorten(name, font, WIDEST_NAME), colour) for name, colour in entries]
    whole = max(picture.width, *(math.ceil(22 + font.getlength(name) + 14 + pad) for name, _ in entries))
    x, row = float(pad), 0
    for name, _ in entries:
        width = 22 + font.getlength(name) + 14
        if places and x + width > whole:
            x, row = float(pad), row + 1
        places.append((x, row))
        x += width
    sheet = Image.new("RGB", (whole, picture.height + pad + line * (row + 1)), PAPER)
    sheet.paste(picture, ((whole - picture.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for (name, colour), (left, r) in zip(entries, places, strict=True):
        y = picture.height + pad // 2 + r * line + line / 2
        pen.rectangle((left, y - 8, left + 16, y + 8), fill=colour, outline=INK)
        pen.text((left + 22, y), name, INK, font, anchor="lm")
    return sheet


def _colour(index: int) -> Colour:
    """Class colour; further rounds of the palette are darker, then lighter."""
    red, green, blue = PALETTE[index % len(PALETTE)]
    turn = index // len(PALETTE) % 3
    if turn == 1:
        return red * 6 // 10, green * 6 // 10, blue * 6 // 10
    if turn == 2:
        return (red + 255) // 2, (green + 255) // 2, (blue + 255) // 2
    return red, green, blue


def _text_colours(background: Colour) -> tuple[Colour, Colour]:
    """(text, outline) that can be read on a colour."""
    bright = 0.299 * background[0] + 0.587 * background[1] + 0.114 * background[2] > 140
    return (INK, PAPER) if bright else (PAPER, INK)


def _name(index: int, class_names: Sequence[str]) -> str:
    return printable(class_names[index]) if 0 <= index < len(class_names) else str(index)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> ImageFont.FreeTypeFont:
    """The font, or a smaller one down to 9 px, with which a text is not wider than allowed."""
    size = round(font.size)
    while size > 9 and _font(size).getlength(text) > width:
        size -= 1
    return font if size == round(font.size) else _font(size)


def _text_size(picture: Image.Image) -> int:
    return max(14, round(min(picture.size) / 24))


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has Latin, Greek and Cyrillic letters."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(file, size)
