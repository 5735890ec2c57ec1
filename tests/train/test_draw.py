"""Pictures show what they were given, where it is."""

import numpy as np
import pytest
import torch
from PIL import Image

from hybridzoo.train import draw

GREY = Image.new("RGB", (128, 96), (128, 128, 128))
SCALE = 4  # 96 px are enlarged to 384


def pixels(picture) -> np.ndarray:
    return np.asarray(picture).astype(int)


def near(colour, other, distance=40) -> bool:
    return np.abs(np.asarray(colour, int) - np.asarray(other, int)).max() <= distance


def test_a_box_is_drawn_at_its_pixels_in_its_class_colour():
    picture = draw.draw_boxes(GREY, [[20, 30, 60, 70]], [2], None, None, "abc")
    assert picture.size == (128 * SCALE, 96 * SCALE)
    shown = pixels(picture)
    colour = draw.PALETTE[2]
    for y, x in ((50, 20), (50, 59.75), (30, 40), (69.75, 40)):  # left, right, top, bottom
        assert near(shown[int(y * SCALE), int(x * SCALE)], colour, 0)
    changed = np.abs(shown - 128).max(-1) > 0
    rows, columns = np.nonzero(changed)
    assert columns.min() == 20 * SCALE
    assert columns.max() == 60 * SCALE - 1
    assert rows.max() == 70 * SCALE - 1
    assert rows.min() < 30 * SCALE  # its name stands above it
    assert not changed[35 * SCALE : 65 * SCALE, 25 * SCALE : 55 * SCALE].any()


def test_mask_colours_its_pixels_and_no_others():
    mask = np.zeros((1, 96, 128), bool)
    mask[0, 40:60, 30:50] = True
    boxes = np.array([[30, 40, 50, 60]])
    with_mask = pixels(draw.draw_boxes(GREY, boxes, [0], None, mask, "a"))
    without = pixels(draw.draw_boxes(GREY, boxes, [0], None, None, "a"))
    different = np.abs(with_mask - without).max(-1) > 0
    assert different[44 * SCALE : 56 * SCALE, 34 * SCALE : 46 * SCALE].all()
    different[39 * SCALE : 61 * SCALE, 29 * SCALE : 51 * SCALE] = False
    assert not different.any()


def test_names_and_scores_change_the_picture():
    def drawn(label, score):
        return pixels(draw.draw_boxes(GREY, [[20, 30, 60, 70]], [label], score, None, ["cat", "cow"] * 5 + ["cat"]))

    assert (drawn(0, [0.9]) != drawn(0, [0.8])).any()
    assert (drawn(0, None) != drawn(0, [0.8])).any()
    assert (drawn(0, None) != drawn(1, None)).any()


def test_tensors_arrays_and_lists_are_the_same():
    boxes, masks = [[5, 5, 40, 50], [30, 20, 90, 80]], np.zeros((2, 96, 128), np.uint8)
    masks[0, 5:50, 5:40] = masks[1, 20:80, 30:90] = 1
    lists = draw.draw_boxes(GREY, boxes, [0, 1], [0.3, 0.9], masks.tolist(), "ab")
    arrays = draw.draw_boxes(np.asarray(GREY), np.array(boxes), np.array([0, 1]), np.array([0.3, 0.9]), masks, "ab")
    tensors = draw.draw_boxes(
        GREY,
        torch.tensor(boxes, dtype=torch.float32, requires_grad=True),
        torch.tensor([0, 1]),
        torch.tensor([0.3, 0.9]),
        torch.from_numpy(masks).bool(),
        "ab",
    )
    assert lists.tobytes() == arrays.tobytes() == tensors.tobytes()


def test_objects_with_higher_scores_are_on_top():
    boxes = [[20, 20, 80, 80], [20, 20, 80, 80]]
    for scores, winner in (([0.9, 0.1], 0), ([0.1, 0.9], 1)):
        shown = pixels(draw.draw_boxes(GREY, boxes, [0, 1], scores, None, "ab"))
        assert near(shown[79 * SCALE, 20 * SCALE], draw.PALETTE[winner], 0)


def test_an_image_without_objects_is_not_changed():
    picture = draw.draw_boxes(GREY, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0, 96, 128), "a")
    assert (pixels(picture) == 128).all()


def test_labels_stay_inside_and_do_not_overlap(monkeypatch):
    spots = []
    tag = draw._tag

    def watch(*arguments):
        tag(*arguments)
        spots[:] = arguments[-1]

    monkeypatch.setattr(draw, "_tag", watch)
    boxes = [[0, 0, 30, 30], [98, 66, 128, 96], [2, 1, 33, 31], [40, 40, 60, 60], [41, 39, 61, 59]]
    draw.draw_boxes(GREY, boxes, range(5), [0.5] * 5, None, "abcde")
    assert len(spots) == 5
    for i, spot in enumerate(spots):
        assert min(spot) >= 0
        assert spot[2] <= 128 * SCALE
        assert spot[3] <= 96 * SCALE
        assert all(draw._shared(spot, other) == 0 for other in spots[:i])


def test_boxes_outside_the_image_are_drawn_without_error():
    draw.draw_boxes(GREY, [[-20, -5, 300, 200], [50, 50, 50, 50], [60, 60, 40, 40]], [0, 1, 2], [1.0, 0.5, 0.2])


def test_segmentation_colours_classes_but_not_background_and_ignored_pixels():
    classes = np.zeros((96, 128), np.uint8)
    classes[10:40, 10:60] = 1
    classes[50:90, 70:120] = 12
    classes[50:90, 10:60] = 255
    names = ["background", *(f"class {i}" for i in range(1, 13))]
    shown = pixels(draw.draw_segmentation(GREY, torch.from_numpy(classes), names))
    assert shown.shape[0] > 96 * SCALE  # the legend
    for y, x, index in ((12, 12, 0), (52, 72, 11)):
        wanted = 0.7 * np.array(draw._colour(index)) + 0.3 * 128
        assert near(shown[y * SCALE, x * SCALE], wanted, 3)
    assert (shown[52 * SCALE : 88 * SCALE, 12 * SCALE : 58 * SCALE] == 128).all()
    assert (shown[5 * SCALE, : 128 * SCALE] == 128).all()


def test_segmentation_without_background_colours_class_zero():
    shown = pixels(draw.draw_segmentation(GREY, np.zeros((96, 128), int), ["wall", "floor"]))
    assert near(shown[10, 10], 0.7 * np.array(draw.PALETTE[0]) + 0.3 * 128, 3)


def test_name_of_a_ring_is_written_on_the_ring():
    y, x = np.mgrid[:96, :128]
    radius = np.hypot(y - 48, x - 64)
    ring = ((radius > 25) & (radius < 40)).astype(np.uint8)
    shown = pixels(draw.draw_segmentation(GREY, ring, ["background", "0"]))[: 96 * SCALE]
    large = np.hypot(*(np.mgrid[: 96 * SCALE, : 128 * SCALE] - np.array([48, 64])[:, None, None] * SCALE)) / SCALE
    assert (shown[large < 23] == 128).all()  # nothing in the hole
    assert (np.abs(shown[large < 40] - draw._text_colours(draw.PALETTE[0])[0]).max(-1) < 10).any()


@pytest.mark.parametrize(("truth", "colour"), [(None, draw.PALETTE[1]), ("cat", draw.RIGHT), ("cow", draw.WRONG)])
def test_bars_show_probability_and_whether_it_is_right(truth, colour):
    picture = draw.draw_classification(GREY, [("cat", 0.75), ("cow", 0.25)], truth)
    bars = pixels(picture)[-2 * 24 - 8 :]

    def length(bar_colour):
        return ((bars == bar_colour).all(-1).sum(0) >= 10).sum()  # not the grey edges of letters

    second = draw.RIGHT if truth == "cow" else draw.QUIET
    assert length(colour) == pytest.approx(3 * length(second), abs=4)
    wrong_note = (pixels(picture)[:40] == draw.WRONG).all(-1).any()
    assert wrong_note == (truth == "cow")


def test_long_names_do_not_reach_the_bars():
    best = [("a name that goes on and on and on", 1.0), ("b", 0.0)]
    picture = draw.draw_classification(Image.new("L", (8, 8)), best)
    assert picture.width < 400
    line = pixels(picture)[-2 * 24 - 8 : -24 - 8]
    bar = np.nonzero((line == draw.PALETTE[1]).all(-1).any(0))[0]
    text = np.nonzero((line.max(-1) < 100).any(0))[0]
    assert text[text < bar.min()].max() < bar.min() - 4


def test_large_images_are_not_enlarged_and_grey_ones_become_rgb():
    large = Image.new("L", (1000, 600), 7)
    assert draw.draw_boxes(large, [[1, 1, 9, 9]], [0]).size == (1000, 600)
    assert max(draw.draw_classification(large, [("a", 1.0)]).size) <= 640
    assert draw.draw_segmentation(large, np.zeros((600, 1000)), ["background"]).mode == "RGB"


def test_text_scales_with_the_picture():
    assert draw._text_size(Image.new("L", (2000, 1500))) > 2 * draw._text_size(Image.new("L", (400, 400)))


def test_grid_places_pictures_under_their_titles():
    red, green, blue = (Image.new("RGB", (60, 40), colour) for colour in ("#ff0000", "#00ff00", "#0000ff"))
    sheet = draw.grid([[red, green], [blue]], ("one", "two"))
    shown = pixels(sheet)
    places = {}
    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        rows, columns = np.nonzero((shown == colour).all(-1))
        assert len(rows) == 60 * 40  # whole, unscaled
        places[name] = (rows.min(), columns.min())
    assert places["red"][0] == places["green"][0] < places["blue"][0]
    assert places["red"][1] == places["blue"][1] < places["green"][1]
    for x in (places["red"][1], places["green"][1]):
        assert (shown[: places["red"][0], x : x + 60] < 100).any()  # a title above each
    assert (pixels(draw.grid([[red]]))[:16] == 255).all()


def test_empty_grid_is_refused():
    with pytest.raises(ValueError, match="rows is empty"):
        draw.grid([[]])


def test_side_by_side_has_both_at_full_size():
    left, right = Image.new("RGB", (70, 50), "#ff0000"), Image.new("RGB", (70, 50), "#0000ff")
    shown = pixels(draw.side_by_side(left, right))
    assert (shown == (255, 0, 0)).all(-1).sum() == (shown == (0, 0, 255)).all(-1).sum() == 70 * 50
    assert np.nonzero((shown == (255, 0, 0)).all(-1))[1].max() < np.nonzero((shown == (0, 0, 255)).all(-1))[1].min()


def test_colours_of_many_classes_differ():
    assert len({draw._colour(i) for i in range(30)}) == 30


def test_the_font_has_more_than_latin_letters():
    font = draw._font(20)
    shapes = {font.getmask(letter).getbbox() and bytes(font.getmask(letter)) for letter in "жλéß"}
    assert len(shapes) == 4  # unknown letters would share one box


def test_long_names_are_whole():
    """Pictures grow where a name needs it; letters shrink where a box's name must stay inside."""
    name = "a rather long name of a class, with [brackets], ü and more than sixty letters"
    image = Image.new("RGB", (64, 48), "grey")
    font = draw._font(15)
    bars = draw.draw_classification(image, [(name, 0.5), ("short", 0.5)])
    assert bars.width > font.getlength(name) + 100
    legend = draw.draw_segmentation(image, np.ones((48, 64), int), ["background", name])
    assert legend.width > draw._font(16).getlength(name)
    small = draw._fitting(name, draw._font(24), 500)
    assert 9 <= small.size < 24
    assert small.getlength(name) <= 500
    assert draw.captioned(image, name).height == 48 * 4 + 24
    draw.draw_boxes(image, [[1, 1, 9, 9]], [0], [0.5], None, [name * 20])
