"""Data as people have them: repaired by a stated rule or refused by one line, before training; see docs/input.md."""

import copy
import json
import re
import shutil
from pathlib import Path

import data_folders as folders
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from input_cases import CASES, Case
from PIL import Image

from hybridzoo.__main__ import main
from hybridzoo.train import check, coco, layouts, outlines
from hybridzoo.train.errors import UserError
from hybridzoo.train.layouts import How

DOCS = Path(__file__).parents[2] / "docs" / "input.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: re.sub(r"\W+", "-", case.what)[:60])
def test_each_case(case: Case, tmp_path):
    case.make(tmp_path)
    if isinstance(case.right, str):
        with pytest.raises(UserError) as caught:
            check.inspect(tmp_path, case.task, How())
        assert case.right in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    report = check.inspect(tmp_path, case.task, How())
    assert len(report.splits[0].images) == case.right
    assert len(report.classes) == len(set(report.classes)) >= 2
    notes = "\n".join(report.notes.lines())
    assert case.said in notes
    assert bool(case.said) == bool(notes), "what needs no repair is not mentioned"


def test_the_table_in_the_docs_agrees_with_the_cases():
    """After a change: PYTHONPATH=tests:tests/train python -c "import test_input; test_input.write()"."""
    table = (
        DOCS.read_text()
        .partition("| data | what happens |\n|---|---|\n")[2]
        .partition("\n\n<!-- end of the list -->")[0]
    )
    assert table.splitlines() == rows()


def rows() -> list[str]:
    return [f"| {case.what} | {case.done} |" for case in CASES]


def write() -> None:
    text = DOCS.read_text()
    begin, end = text.index("| data | what happens |"), text.index("<!-- end of the list -->")
    DOCS.write_text(text[:begin] + "| data | what happens |\n|---|---|\n" + "\n".join(rows()) + "\n\n" + text[end:])


# Right values -----------------------------------------------------------------------------------------------------


def repaired(root: Path, split: str = "train", masks: bool = True):
    file = root / "annotations" / f"{split}.json"
    return coco.repaired(coco.read(file), file, root / "images" / split, classes=["cat", "cup"], masks=masks)


def test_areas_and_boxes_come_from_the_mask(tmp_path):
    triangle = [[10, 10, 40, 10, 10, 30]]
    runs = {
        "size": [80, 96],
        "counts": [10 * 80 + 5, 4, 76, 4, 80 * 96 - 10 * 80 - 5 - 84],
    }  # columns 10, 11; rows 5 to 8

    def change(content):
        for entry, value in zip(content["annotations"], (triangle, runs), strict=False):
            entry.update(segmentation=value, bbox=None, area=None)

    folders.detection(tmp_path, change)
    fixed = repaired(tmp_path)["annotations"]
    assert (fixed[0]["bbox"], fixed[0]["area"]) == ([10, 10, 30, 20], 300)
    assert (fixed[1]["bbox"], fixed[1]["area"]) == ([10, 5, 2, 4], 8)
    assert [entry["id"] for entry in fixed] == list(range(1, 9))


def test_compressed_run_lengths_are_read_as_pycocotools_reads_them():
    mask_api = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    for _ in range(20):
        inside = random.random((17, 23)) < random.random()
        packed = mask_api.encode(np.asfortranarray(inside.astype(np.uint8)))
        outline = {"size": [17, 23], "counts": packed["counts"].decode()}
        assert np.array_equal(outlines.mask(outline, (23, 17)), inside)
        assert outlines.area(outline) == inside.sum()


def test_classes_are_matched_by_name(tmp_path):
    """Labels of validation are those of training, whatever order and ids its file has."""

    def turned(content):
        content["categories"] = [{"id": 9, "name": "cup"}, {"id": 4, "name": "cat"}]
        for entry in content["annotations"]:
            entry["category_id"] = {1: 4, 2: 9}[entry["category_id"]]

    folders.detection(tmp_path, turned, "val")
    fixed = repaired(tmp_path, "val")
    assert [category["name"] for category in fixed["categories"]] == ["cat", "cup"]
    left = {entry["category_id"] for entry in fixed["annotations"] if entry["bbox"][0] == 8}
    assert left == {fixed["categories"][0]["id"]}, "the left object is the cat"


def test_the_users_files_are_not_touched(tmp_path):
    folders.detection(tmp_path, lambda content: [entry.pop("area") for entry in content["annotations"]])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    check.inspect(tmp_path, "detection", How())
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before.keys()


def test_only_the_used_split_is_checked(tmp_path):
    """`test` needs no training pictures, and takes the classes from the model."""
    root = folders.classification(tmp_path / "c")
    (root / "train/chelsea/0.png").write_bytes(b"")
    how = How(splits=("val",), classes=("chelsea", "coffee", "dog"))
    assert layouts.inspect_classification(root, how).splits[0].counts == {"chelsea": 2, "coffee": 2, "dog": 0}
    shutil.rmtree(root / "val/chelsea")
    report = layouts.inspect_classification(root, How(splits=("val",)))
    assert report.classes == ["chelsea", "coffee"], "the labels are those of training"
    folders.classification(root / "whole")
    root = root / "whole"
    with pytest.raises(UserError, match="the model has no class 'chelsea'"):
        layouts.inspect_classification(root, How(splits=("val",), classes=("coffee", "dog")))
    root = folders.detection(tmp_path / "d", lambda content: content.clear())
    report = layouts.inspect_detection(root, How(splits=("val",), classes=("dog", "cup", "cat")), masks=True)
    assert report.splits[0].counts == {"dog": 0, "cup": 2, "cat": 2}
    root = folders.segmentation(tmp_path / "s")
    (root / "masks/train/0.png").unlink()
    assert layouts.inspect_segmentation(root, How(splits=("val",), classes=("background", "cat"))).classes
    report = layouts.inspect_segmentation(root, How(splits=("val",), classes=("dog", "cat", "background")))
    assert report.classes == ["dog", "cat", "background"]
    assert report.layout.stored == [-1, 1, 0], "masks keep their values, which mean the model's classes"
    assert report.splits[0].counts == {"dog": 0, "cat": 2, "background": 2}
    with pytest.raises(UserError, match=r"no class 'background', .* it knows dog, .*; the model has dog, cat"):
        layouts.inspect_segmentation(root, How(splits=("val",), classes=("dog", "cat")))


# The command ------------------------------------------------------------------------------------------------------


def rename(content):
    content["categories"][1]["name"] = "tank [/mk2]"


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_check_prints_a_summary_and_draws_samples(task, tmp_path, capsys):
    if task == "classification":
        folders.classification(tmp_path / "data", ("katze [grau], ü", "tank [mk2]"))
    elif task == "detection":
        folders.detection(tmp_path / "data", rename, None)
    else:
        folders.segmentation(tmp_path / "data")
    assert main(["check", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{task}: " in printed
    assert "96x80 (" in printed
    names = {"classification": ["katze [grau], ü", "tank [mk2]"], "detection": ["cat", "tank [/mk2]"]}
    assert all(name in printed for name in names.get(task, ["background", "cat"]))
    picture = Image.open(tmp_path / "out" / f"{task}.png")
    assert min(picture.size) > 400
    assert np.asarray(picture).std() > 20


def test_check_refuses_with_code_2(tmp_path, capsys):
    folders.segmentation(tmp_path / "data", lambda ids, path: Image.fromarray(ids.T * 1).save(f"{path}.png"))
    for argv in (["check", str(tmp_path / "data")], ["check", str(tmp_path / "none")], ["check", str(tmp_path)]):
        assert main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    root = folders.classification(tmp_path / "c")
    assert main(["check", str(root), "--out", str(root / "train")]) == 2
    assert "is inside the data folder" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_check_accepts_the_published_layouts(task, tmp_path, capsys):
    """A fault there is found as in our own layout, and named by its own file."""
    if task == "detection":
        root = folders.published_coco(tmp_path / "d", lambda content: [e.pop("area") for e in content["annotations"]])
        said, bad = "8 annotations without area", root / "train2017/1.png"
    else:
        pytest.importorskip("mmseg")
        root = folders.published_ade20k(tmp_path / "d")
        said, bad = "never occurs in the masks of train", root / "annotations/training/1.png"
    assert main(["check", str(root), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{task}: ")
    assert said in printed
    assert (tmp_path / "out" / f"{task}.png").exists()
    bad.write_bytes(bad.read_bytes()[:60])
    assert main(["check", str(root), "--out", str(tmp_path / "out")]) == 2
    assert str(bad) in capsys.readouterr().err


# Anything else ----------------------------------------------------------------------------------------------------

VALUES = st.sampled_from(
    [None, True, 0, 1, -1, 2, 0.5, 1e300, float("nan"), float("inf"), "", "1", "x\x1b[0m", [], [[]], [1], [1, 2, 3, 4],
     [[1, 2, 3, 4, 5, 6]], [[1, 2], [3, 4], [9, 1]], {}, {"size": [80, 96], "counts": "0"}, {"counts": [1]}, 10**30]
)  # fmt: skip


def places(node, path=()):
    """Every place in a JSON value."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return folders.detection(tmp_path_factory.mktemp("fuzz") / "d")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_coco_file_gives_one_line_or_usable_annotations(scenes, data):
    """What passes has what mmdet and pycocotools rely on."""
    file = scenes / "annotations" / "train.json"
    original = file.read_text()
    content = json.loads(original)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(content))[1:]))
        node = content
        for key in path[:-1]:
            node = node[key]
        if data.draw(st.booleans()) and isinstance(node, dict):
            del node[path[-1]]
        else:
            node[path[-1]] = copy.deepcopy(data.draw(VALUES))  # what is drawn twice is changed once only
    file.write_text(json.dumps(content))
    try:
        message, masks = "", data.draw(st.booleans())
        try:
            report = layouts.inspect_detection(scenes, masks=masks)
            fixed = repaired_like(scenes, report.classes, masks)
        except UserError as error:
            message = str(error)
        assert "\n" not in message
        assert "\x1b" not in message
        if not message:
            check_usable(fixed, masks)
    finally:
        file.write_text(original)


def repaired_like(root, classes, masks):
    file = root / "annotations" / "train.json"
    return coco.repaired(coco.read(file), file, root / "images" / "train", classes=classes, masks=masks)


def check_usable(fixed, masks):
    images = {entry["id"]: entry for entry in fixed["images"]}
    categories = {entry["id"] for entry in fixed["categories"]}
    assert all(isinstance(number, int) for number in [*images, *categories])
    for entry in fixed["annotations"]:
        x, y, w, h = entry["bbox"]
        assert w >= 1
        assert h >= 1
        assert 0 <= x <= x + w <= images[entry["image_id"]]["width"]
        assert 0 <= y <= y + h <= images[entry["image_id"]]["height"]
        assert entry["category_id"] in categories
        assert 0 < entry["area"] < float("inf")
        assert entry["iscrowd"] in (0, 1)
        if masks:
            assert outlines.mask(entry["segmentation"], (96, 80)).any() or entry["iscrowd"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["L", "P", "1", "I;16", "I", "F", "RGB", "LA"]),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.integers(0, 8),
)
def test_any_mask_gives_one_line_or_its_ids(tmp_path_factory, mode, size, values, orientation):
    root = tmp_path_factory.mktemp("m")
    folders.segmentation(root)
    ids = np.resize(np.array(values), (size[1], size[0]))
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    image = Image.fromarray(ids.astype(kinds.get(mode, np.uint8)))
    image = image if mode in kinds else image.convert(mode)
    suffix = "tif" if mode in ("I", "F") else "png"
    (root / "masks/train/0.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(root / f"masks/train/0.{suffix}", exif=exif)
    message = ""
    try:
        report = layouts.inspect_segmentation(root)
    except UserError as error:
        message = str(error)
        assert "masks/train/0." in message
    assert "\n" not in message
    fits = size == ((80, 96) if orientation >= 5 else (96, 80))
    if not message:
        assert fits
        assert report.splits[0].pixels
