"""The tiny data sets that other tests train on: what they say of their pictures is true, at any size."""

from __future__ import annotations

import json

import photographs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@given(st.integers(1, 400), st.integers(2, 800), st.integers(1, 400), st.integers(1, 16))
def test_tiles_are_inside_their_picture_and_splits_share_no_pixel(height, width, side, count):
    if side > min(height, width // 2):
        with pytest.raises(ValueError, match=f"side={side}: a picture of {width} x {height}"):
            photographs._tiles(height, width, side, count)
        return
    corners = photographs._tiles(height, width, side, count)
    assert {split: len(of) for split, of in corners.items()} == {"train": count, "val": count}
    assert all(0 <= y <= height - side and 0 <= x <= width - side for of in corners.values() for y, x in of)
    assert max(x for _, x in corners["train"]) + side <= min(x for _, x in corners["val"])


@pytest.mark.parametrize("side", [96, 128, 160, 192])
def test_annotations_of_scenes_are_as_large_as_their_pictures(tmp_path, side):
    photographs.scenes(tmp_path, side=side, count=4)
    for split in ("train", "val"):
        coco = json.loads((tmp_path / "annotations" / f"{split}.json").read_text())
        assert coco["annotations"]
        for image in coco["images"]:
            assert (image["width"], image["height"]) == (side, side)
            for kind in ("images", "masks"):
                with Image.open(tmp_path / kind / split / image["file_name"]) as picture:
                    assert picture.size == (side, side)
        for found in coco["annotations"]:
            left, top, width, height = found["bbox"]
            assert found["segmentation"]["size"] == [side, side]
            assert left + width <= side
            assert top + height <= side


def test_a_side_larger_than_a_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tiles of 192 at most"):
        photographs.scenes(tmp_path, side=193)
