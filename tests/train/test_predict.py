"""Prediction: same numbers as the test loop, no file is overwritten, tables and pictures agree."""

import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image
from rich.console import Console

from hybridzoo.__main__ import main
from hybridzoo.train import engine, tables
from hybridzoo.train.config import load_config
from hybridzoo.train.digits import digits_root
from hybridzoo.train.errors import UserError
from hybridzoo.train.predict import Prediction, find_images, predict, read_image

CLASSIFIER = [
    "model.name=test_vit",
    "model.regions=none",
    "model.drop_path_rate=0.0",
    "model.img_size=32",
    "train_cfg.max_epochs=1",
]
DENSE = {
    "mask-rcnn_biformer_tiny_digits": [str(digit) for digit in range(10)],
    "segformer_biformer_tiny_digits": ["background", *(str(digit) for digit in range(10))],
}


@pytest.fixture(scope="session")
def classifier(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Config and checkpoint of a classifier trained for a moment on red, green and blue noise."""
    config = load_config("biformer_tiny_digits", [*CLASSIFIER, "train_dataloader.batch_size=12"])
    folder = tmp_path_factory.mktemp("classifier")
    engine.train(config, work_dir=folder, data=image_folder, wandb=False)
    return config, folder / "final.pth"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_root("scenes", root=tmp_path_factory.mktemp("scenes"), train=2, val=4)


@pytest.fixture(scope="session", params=DENSE)
def dense(
    request: pytest.FixtureRequest, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path]:
    """Config and checkpoint, weights random, of a detector and of a segmentor."""
    config = load_config(request.param)
    task = engine.prepare(config)
    task.configure(config, scenes)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    model.init_weights()
    file = tmp_path_factory.mktemp("dense") / "weights.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {"class_names": DENSE[request.param]}}, file)
    return load_config(request.param), file


def test_a_classifiers_predictions_give_the_accuracy_of_the_test_loop(classifier, image_folder, tmp_path):
    config, checkpoint = classifier
    found = predict(config, checkpoint, image_folder / "val", tmp_path / "out")
    right = sum(p.labels[0] == p.image.parent.name for p in found)
    measured = engine.test(config, checkpoint, data=image_folder, work_dir=tmp_path / "log")
    assert 100 * right / 15 == pytest.approx(measured["accuracy/top1"])
    assert 15 > right > 5, "all right or mere chance would show little"
    for p in found:
        assert sorted(p.labels) == ["blue", "green", "red"]
        assert sum(p.scores) == pytest.approx(1)
        assert p.scores == sorted(p.scores, reverse=True)


def test_dense_predictions_are_those_of_the_test_loop(dense, scenes, tmp_path):
    config, checkpoint = dense
    found = predict(config, checkpoint, scenes / "images/val", tmp_path, score=0.0, device="cpu")
    assert len(found) == 4

    model = engine.build_for_inference(config, checkpoint, "cpu")
    engine.prepare(config).configure(config, scenes)
    config.test_dataloader.batch_size = 1  # no padding to the largest of a batch
    with DefaultScope.overwrite_default_scope(config.default_scope):
        loader = Runner.build_dataloader(config.test_dataloader)
    looped = {}
    for batch in loader:
        with torch.no_grad():
            looped.update({Path(sample.img_path).name: sample for sample in model.test_step(batch)})
    for p in found:
        sample = looped[p.image.name]
        if config.task == "segmentation":
            ids, counts = sample.pred_sem_seg.data.unique(return_counts=True)
            shares = {
                model.dataset_meta["classes"][i]: n.item() / counts.sum().item()
                for i, n in zip(ids, counts, strict=True)
            }
            assert dict(zip(p.labels, p.scores, strict=True)) == pytest.approx(shares, abs=2e-3)
            assert p.boxes is None
            assert p.areas is None
        else:
            objects = sample.pred_instances
            order = objects.scores.argsort(descending=True, stable=True)
            assert len(order) > 3
            torch.testing.assert_close(torch.tensor(p.scores), objects.scores[order], atol=1e-4, rtol=1e-4)
            top = range(3)
            torch.testing.assert_close(p.boxes[top], objects.bboxes[order][top], atol=0.5, rtol=1e-3)
            assert p.labels[:3] == [str(i) for i in objects.labels[order][:3].tolist()]
            assert len(p.areas) == len(order)


def test_pictures_are_written_one_for_each_image(dense, scenes, tmp_path):
    config, checkpoint = dense
    source = scenes / "images" / "val"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    found = predict(config, checkpoint, source, tmp_path / "out")
    assert [p.drawn.relative_to(tmp_path / "out") for p in found] == [p.image.relative_to(source) for p in found]
    for p in found:
        drawn, image = read_image(p.drawn), read_image(p.image)
        assert min(drawn.size) >= 256 > max(image.size), "small images are enlarged, or nobody could read the names"
        assert np.asarray(drawn).std() > 5
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_high_threshold_leaves_no_objects(dense, scenes, tmp_path):
    config, checkpoint = dense
    if config.task != "detection":
        pytest.skip("only detectors have a threshold")
    found = predict(config, checkpoint, scenes / "images/val", tmp_path, score=1.0)
    assert all(p.labels == [] and len(p.boxes) == 0 for p in found)
    console = Console(width=100, record=True, file=StringIO())
    console.print(tables.predictions(found, scenes / "images/val"))
    assert console.export_text().count("nothing found") == len(found)


@pytest.fixture
def messy(image_folder: Path, tmp_path: Path) -> Path:
    """A folder with two good images, five unreadable ones, and things that are no images."""
    folder = tmp_path / "messy"
    (folder / "inner").mkdir(parents=True)
    good = image_folder / "val/red/0.png"
    shutil.copy(good, folder / "b.png")
    Image.open(good).save(folder / "inner" / "b.JPG", quality=95)
    (folder / "cut.png").write_bytes(good.read_bytes()[:-900])
    (folder / "cut.jpg").write_bytes((folder / "inner" / "b.JPG").read_bytes()[:700])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "notes.txt").write_text("not an image either")
    shutil.copy(good, folder / ".hidden.png")
    return folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_images_are_named_and_skipped(classifier, messy, tmp_path, capsys):
    config, checkpoint = classifier
    found = predict(config, checkpoint, messy, tmp_path / "out")
    assert [str(p.image.relative_to(messy)) for p in found] == ["b.png", "inner/b.JPG"]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == [
        "b.png",
        "inner/b.png",
    ]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert [Path(line.split(": ")[1]).name for line in lines] == [
        "bomb.png",
        "cut.jpg",
        "cut.png",
        "empty.png",
        "text.png",
    ]


def test_the_command_counts_skipped_images_and_fails_only_without_any(classifier, messy, tmp_path, capsys, monkeypatch):
    _, checkpoint = classifier
    monkeypatch.chdir(tmp_path)
    base = ["predict", "biformer_tiny_digits", str(checkpoint)]
    options = ["--cfg-options", *CLASSIFIER]
    assert main([*base, str(messy), *options]) == 1  # the rest is done; a script learns that not all is
    printed = capsys.readouterr()
    assert "2 pictures drawn in predictions, 5 images skipped" in printed.out
    assert "inner/b.JPG" in printed.out
    assert "%" in printed.out

    (messy / "b.png").unlink()
    shutil.rmtree(messy / "inner")
    assert main([*base, str(messy), "--out", "none", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert "5 images" in printed.err
    assert not Path("none").exists()

    assert main([*base, str(messy / "cut.png"), "--out", "none", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "cut.png" in printed.err
    assert "truncated" in printed.err
    assert not Path("none").exists()


def test_a_checkpoint_of_another_model_names_what_does_not_fit(classifier, image_folder, tmp_path, capsys):
    _, checkpoint = classifier
    image = str(image_folder / "val/red/0.png")
    out = tmp_path / "out"
    code = main(["predict", "biformer_tiny_digits", str(checkpoint), image, "--out", str(out)])
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert "was trained with model.name='test_vit', the config says 'biformer_tiny'; leave the config out" in err
    assert not out.exists()

    content = torch.load(checkpoint, weights_only=True)
    del content["meta"]["setup"]  # as weights of others
    torch.save(content, tmp_path / "bare.pth")
    assert main(["predict", "biformer_tiny_digits", str(tmp_path / "bare.pth"), image, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "do not fit biformer_tiny" in err
    assert "'stem." in err
    assert not out.exists()


def test_an_input_is_never_overwritten(classifier, image_folder, tmp_path):
    config, checkpoint = classifier
    mine = tmp_path / "mine"
    shutil.copytree(image_folder / "val", mine)
    before = {path: path.read_bytes() for path in mine.rglob("*.png")}
    link = tmp_path / "link"
    link.symlink_to(mine / "red")
    for source, out in [
        (mine, mine),
        (mine, mine / "drawn"),
        (mine / "red/0.png", mine / "red"),
        (mine / "red/0.png", link),
        (mine, tmp_path / "mine" / ".." / "mine"),
    ]:
        with pytest.raises(UserError, match="--out"):
            predict(config, checkpoint, source, out)
    assert {path: path.read_bytes() for path in mine.rglob("*.png")} == before


def test_two_images_with_one_name_get_two_pictures(classifier, image_folder, tmp_path):
    config, checkpoint = classifier
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.png", "a.bmp", "a.jpg"):
        Image.open(image_folder / "val/red/0.png").save(source / name)
    found = predict(config, checkpoint, source, tmp_path / "out")
    assert len({p.drawn for p in found}) == 3
    assert all(p.drawn.is_file() for p in found)


def test_a_folder_that_cannot_be_written_is_one_clear_error(classifier, image_folder, tmp_path):
    config, checkpoint = classifier
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: cannot write .*file"):
        predict(config, checkpoint, image_folder / "val/red/0.png", tmp_path / "file")


def test_images_come_in_the_order_of_their_paths(tmp_path):
    for name in ("b/1.png", "a/2.png", "10.png", "9.png", "c.gif", "a/.x.png", ".d/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == ["10.png", "9.png", "a/2.png", "b/1.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image below"):
        find_images(tmp_path / "empty")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_of_every_format_are_read_as_rgb(mode, tmp_path):
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1)))
    ramp.convert(mode).save(file)
    image = read_image(file)
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    pixels = np.asarray(image).astype(int)
    assert pixels[:, :4].mean() < 64
    assert pixels[:, -4:].mean() > 192


def test_phone_photos_are_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (30, 40)


def test_the_table_fits_eighty_columns_without_cutting_names():
    found = [
        Prediction(
            *(Path("in/holidays/a_rather_long_name_0001.jpg"), Path("out.png"), "detection"),
            *(["traffic light", "person"], [0.98, 0.5], torch.tensor([[1.0, 2, 3, 4], [1000, 1000, 1200, 1300]])),
            areas=[1234, 123456],
        )
    ]
    console = Console(width=80, record=True, file=StringIO())
    console.print(tables.predictions(found, Path("in")))
    text = console.export_text()
    assert "…" not in text
    for word in ("traffic light", "0.98", "1000", "1300", "123456"):
        assert word in text
