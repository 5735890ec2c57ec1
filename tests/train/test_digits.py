"""The embedded data: same bytes everywhere, whole or absent, and annotations that agree with the pixels."""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridzoo.train import digits
from hybridzoo.train.digits import digits_root
from hybridzoo.train.errors import UserError

FORK = multiprocessing.get_context("fork")
# A process called `hybridzoo` imports neither torch nor timm.
GENERATE = (
    "import sys; sys.argv[0] = 'hybridzoo'; from hybridzoo.train.digits import digits_root; from pathlib import Path; "
)
SMALL = "print(digits_root('scenes', root=Path(sys.argv[1]), train=5, val=3))"


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return digits_root("scenes", root=tmp_path_factory.mktemp("data"), train=24, val=12)


def test_the_same_bytes_from_every_process_also_in_parallel(tmp_path):
    here = fingerprint(digits_root("scenes", root=tmp_path / "here", train=5, val=3))
    command = [sys.executable, "-c", GENERATE + SMALL, str(tmp_path / "there")]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    assert fingerprint(Path(said)) == here
    shutil.rmtree(said)
    wanted = dict(root=tmp_path / "there", train=5, val=3)
    processes = [FORK.Process(target=digits_root, args=("scenes",), kwargs=wanted) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [str(path) for path in (tmp_path / "there").iterdir()] == [said]  # nobody left a partial folder
    assert fingerprint(Path(said)) == here
    assert len(here) == 2 * 8 + 2 + 1  # images, maps, annotations, classes


def test_seed_and_counts_name_and_change_the_scenes(tmp_path, scenes):
    other = digits_root("scenes", root=tmp_path, seed=1, train=2, val=1)
    assert other != scenes
    first = [np.asarray(Image.open(folder / "images/train/00000.png")) for folder in (scenes, other)]
    assert first[0].shape != first[1].shape or (first[0] != first[1]).any()


def test_a_second_call_reads_the_files_of_the_first(tmp_path):
    folder = digits_root("scenes", root=tmp_path, train=1, val=1)
    (folder / "mark").touch()
    assert digits_root("scenes", root=tmp_path, train=1, val=1) == folder
    assert (folder / "mark").exists()


def test_the_environment_sets_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDZOO_DATA", str(tmp_path / "env"))
    assert digits_root("scenes", train=1, val=1).parent == tmp_path / "env"
    monkeypatch.delenv("HYBRIDZOO_DATA")
    monkeypatch.chdir(tmp_path)
    assert digits_root("scenes", train=1, val=1).parent == tmp_path / "data"


def test_a_killed_process_leaves_no_data_that_look_complete(tmp_path, monkeypatch):
    wanted = dict(root=tmp_path, train=5000, val=3)
    process = FORK.Process(target=digits_root, args=("scenes",), kwargs=wanted)
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/images/train/*.png")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.join()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".")
    # the next call with the same arguments clears it away once it is surely nobody's
    os.utime(leftover, (0, 0))
    monkeypatch.setattr(digits, "_write_scenes", _stop)
    with pytest.raises(RuntimeError, match="far enough"):
        digits_root("scenes", **wanted)
    assert not list(tmp_path.iterdir())


def _stop(*_):
    raise RuntimeError("far enough")


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # bytes; a scene has more
    try:
        with pytest.raises(UserError, match=r"digits: cannot write .*: File too large; set HYBRIDZOO_DATA"):
            digits_root("scenes", root=tmp_path, train=2, val=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("boxes", {}, "kind is 'boxes'; use 'classification' or 'scenes'"),
        ("scenes", {"seed": -1}, "seed is -1"),
        ("scenes", {"train": 0}, "train is 0"),
        ("scenes", {"val": 1.5}, "val is 1.5"),
    ],
)
def test_bad_arguments(tmp_path, kind, options, message):
    with pytest.raises(UserError, match=message):
        digits_root(kind, root=tmp_path, **options)


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        digits_root("scenes", root=tmp_path / "file", train=1, val=1)


def test_the_split_separates_writers():
    train, val = digits.load_strokes("train"), digits.load_strokes("val")
    assert (len(train[0]), len(val[0])) == (1415, 382)
    # every writer copied the same page: it opens with 0..9 three times over, and the page before has come to its end
    assert val[1][:30].tolist() == train[1][:30].tolist() == [*range(10)] * 3
    assert val[1][:60].tolist() == train[1][:60].tolist()
    assert train[1][-20:].tolist() == [int(digit) for digit in "75447282257954884908"]
    assert train[0].min() == 0
    assert train[0].max() == 1


def test_the_classification_folder_has_every_image_under_its_digit(data_home):
    """Of the few that the tests take."""
    (strokes_folder,) = data_home.iterdir()
    for split in ("train", "val"):
        strokes, labels = (part[:: len(part) // 60] for part in digits.load_strokes(split))
        assert sorted(path.name for path in (strokes_folder / split).iterdir()) == list(digits.CLASSES)
        drawings = {"train": 6, "val": 3}[split]
        files = {path.stem: path for path in (strokes_folder / split).glob("*/*.png")}
        assert sorted(files) == [f"{index:04d}-{n}" for index in range(len(labels)) for n in range(drawings)]
        alike: list[list[float]] = []  # each drawing to its own stroke, and to another
        for index in range(0, len(labels), 4):
            pictures = []
            for n in range(drawings):
                file = files[f"{index:04d}-{n}"]
                assert file.parent.name == str(labels[index])
                pictures.append(np.asarray(Image.open(file)))
                assert pictures[-1].shape == (32, 32, 3)
                ink = pictures[-1] @ (0.299, 0.587, 0.114) < 145  # darker than any paper
                alike.append([np.corrcoef(_shape(ink), _shape(strokes[i] > 0.4))[0, 1] for i in (index, index - 1)])
            assert len({picture.tobytes() for picture in pictures}) == drawings
        own, other = np.mean(alike, axis=0)
        assert own > {"train": 0.55, "val": 0.65}[split] > 0.4 > other  # those for training are bent


def _shape(ink: np.ndarray) -> np.ndarray:
    """What lies within the bounding box, at 12 x 12, flat."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    box = Image.fromarray(255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8))
    return np.asarray(box.resize((12, 12)), float).ravel()


def test_annotations_agree_with_pixels(scenes):
    coco_api = pytest.importorskip("pycocotools.coco")
    names = (scenes / "classes.txt").read_text().split()
    assert names == ["background", *"0123456789"]
    for split, count in (("train", 24), ("val", 12)):
        coco = coco_api.COCO(scenes / "annotations" / f"{split}.json")
        assert len(coco.imgs) == count
        assert {cat["id"]: cat["name"] for cat in coco.dataset["categories"]} == dict(enumerate(names[1:], 1))
        for entry in coco.imgs.values():
            classes = np.asarray(Image.open(scenes / "masks" / split / entry["file_name"]))
            image = Image.open(scenes / "images" / split / entry["file_name"])
            assert image.mode == "RGB"
            assert image.size == (entry["width"], entry["height"]) == classes.shape[::-1]
            assert 2 <= len(coco.imgToAnns[entry["id"]]) <= 6
            drawn = np.zeros_like(classes)
            for annotation in coco.imgToAnns[entry["id"]]:
                mask = coco.annToMask(annotation).astype(bool)
                assert not drawn[mask].any()  # a pixel belongs to one digit: the one on top
                drawn[mask] = annotation["category_id"]
                y, x = np.nonzero(mask)
                assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
                assert annotation["area"] == mask.sum() > 80
                assert annotation["iscrowd"] == 0
            assert (drawn == classes).all()


def test_digits_differ_from_the_background_in_brightness(scenes):
    # what makes the task learnable, and readable with any colour vision
    for file in (scenes / "images/train").iterdir():
        bright = np.asarray(Image.open(file).convert("L"), float)
        inside = np.asarray(Image.open(scenes / "masks/train" / file.name)) > 0
        assert abs(bright[inside].mean() - bright[~inside].mean()) > 50, file.name


def test_scenes_vary():
    strokes, labels = digits.load_strokes("train")
    made = [digits.compose_scene(np.random.default_rng(i), strokes, labels) for i in range(150)]
    assert {scene.image.shape[:2] for scene in made} == {(h, w) for w, h in digits.SIZES}
    assert {len(scene.digits) for scene in made} == {3, 4, 5}
    assert {digit for scene in made for digit in scene.digits} == set(range(10))
    heights = [np.ptp(np.nonzero(scene.instances == 1)[0]) for scene in made]
    assert min(heights) < 25 < 32 < max(heights)
    for scene in made:
        assert sorted(np.unique(scene.instances)) == list(range(len(scene.digits) + 1))


def test_writers_differ():
    strokes, _ = digits.load_strokes("train")
    alike = {}
    for other_hand in (False, True):
        covers = [digits._draw(np.random.default_rng(i), strokes[8], 34, 28, 28, other_hand=other_hand) for i in (1, 2)]
        alike[other_hand] = np.corrcoef(*(_shape(cover > 0.5) for cover in covers))[0, 1]
        assert all(max(cover.shape) <= 28 for cover in covers)
    assert alike[True] < alike[False] - 0.1


def test_no_digit_is_mostly_hidden(monkeypatch):
    """Paint the same scenes in flat colours and count what is left of each digit."""
    covers: list[np.ndarray] = []
    paint = digits._paint

    def watch(image, cover, x, y, colour):
        whole = np.zeros(image.shape[:2], bool)
        whole[y : y + cover.shape[0], x : x + cover.shape[1]] = cover > 0.5
        covers.append(whole)
        paint(image, cover, x, y, colour)

    monkeypatch.setattr(digits, "_paint", watch)
    strokes, labels = digits.load_strokes("train")
    overlapping = 0
    for i in range(60):
        covers.clear()
        scene = digits.compose_scene(np.random.default_rng(i), strokes, labels)
        assert len(covers) == len(scene.digits)  # whatever is painted is annotated
        for index, whole in enumerate(covers, 1):
            left = (scene.instances == index).sum() / whole.sum()
            assert left >= digits.MIN_VISIBLE
            overlapping += left < 1
    assert overlapping > 20  # overlap is part of the task


def test_each_split_has_its_own_digits(tmp_path, monkeypatch):
    real = digits.load_strokes

    def low_for_train(split):
        strokes, labels = real(split)
        keep = labels < 5 if split == "train" else labels >= 5
        return strokes[keep], labels[keep]

    monkeypatch.setattr(digits, "load_strokes", low_for_train)
    folder = digits_root("scenes", root=tmp_path, train=8, val=8)
    for split, allowed in (("train", {1, 2, 3, 4, 5}), ("val", {6, 7, 8, 9, 10})):
        coco = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert {annotation["category_id"] for annotation in coco["annotations"]} <= allowed


def test_mmdet_reads_boxes_and_masks(scenes):
    pytest.importorskip("mmdet")
    from hybridzoo.train import mmcv_ops

    mmcv_ops.install()
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    data = CocoDataset(
        ann_file="annotations/val.json",
        data_prefix={"img": "images/val/"},
        data_root=str(scenes),
        metainfo={"classes": digits.CLASSES},
        pipeline=[],
        test_mode=True,
    )
    assert len(data) == 12
    load_image, load_truth = LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)
    for index in range(12):
        read = load_truth(load_image(data.get_data_info(index)))
        classes = np.asarray(Image.open(scenes / "masks/val" / Path(read["img_path"]).name))
        assert len(read["gt_masks"]) == len(read["gt_bboxes"]) == len(read["gt_bboxes_labels"]) > 1
        assert not read["gt_ignore_flags"].any()
        for mask, label in zip(read["gt_masks"].masks, read["gt_bboxes_labels"], strict=True):
            assert set(classes[mask.astype(bool)]) == {label + 1}
