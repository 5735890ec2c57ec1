"""Classifier, dataset and metric by themselves, and what the data does to the config."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, METRICS, MODELS
from PIL import Image

import hybridzoo.train.engine  # noqa: F401 - registers
from hybridzoo.train.classification import ImageClassifier, TopK, configure
from hybridzoo.train.classified import TimmDataset
from hybridzoo.train.errors import UserError

PLAIN = {"input_size": 32, "is_training": False, "crop_pct": 1.0}


def test_losses() -> None:
    images, targets = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def loss(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        model = ImageClassifier("test_vit", num_classes=3, img_size=32, **options)
        return model(images.clone(), targets, mode="loss")["loss"], model(images)

    value, logits = loss()
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, targets))
    value, _ = loss(label_smoothing=0.2)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2))
    # A mix of 1 to 0 leaves the images, so that only the smoothed targets stay.
    value, _ = loss(label_smoothing=0.2, mixup={"mixup_alpha": 1.0, "prob": 0.0})
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.2))
    value, _ = loss(mixup={"mixup_alpha": 1.0})
    assert not torch.isclose(value, torch.nn.functional.cross_entropy(logits, targets))
    value, _ = loss(binary=True)
    hot = torch.nn.functional.one_hot(targets, 3).float()
    torch.testing.assert_close(value, torch.nn.functional.binary_cross_entropy_with_logits(logits, hot))


def test_predictions() -> None:
    model = ImageClassifier("test_vit", num_classes=3, img_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    with_targets = model(images, torch.tensor([2, 0]), mode="predict")
    assert [sample["target"] for sample in with_targets] == [2, 0]
    torch.testing.assert_close(with_targets[0]["scores"].sum(), torch.tensor(1.0))
    assert model(images, mode="predict")[1]["target"] is None


def topk(scores: torch.Tensor, targets: list[int], size: int | None = None) -> dict[str, float]:
    metric = TopK(topk=(1, 2))
    metric.process(None, [{"scores": s, "target": t} for s, t in zip(scores, targets, strict=True)])
    return metric.evaluate(size or len(targets))


def test_topk_against_timms() -> None:
    from timm.utils import accuracy

    scores, targets = torch.rand(50, 7), torch.randint(0, 7, (50,))
    top1, top2 = accuracy(scores, targets, topk=(1, 2))
    assert topk(scores, targets.tolist()) == pytest.approx({"accuracy/top1": top1.item(), "accuracy/top2": top2.item()})


def test_topk_is_zero_for_constant_or_invalid_scores() -> None:
    for scores in (torch.zeros(4, 4), torch.full((4, 4), torch.nan)):
        assert topk(scores, [0, 1, 2, 3]) == {"accuracy/top1": 25, "accuracy/top2": 50}


def test_topk_leaves_padding_out() -> None:
    scores = torch.eye(3)
    assert topk(scores, [0, 0, 2], size=2) == {"accuracy/top1": 50, "accuracy/top2": 100}


def test_dataset(image_folder: Path, tmp_path: Path) -> None:
    data = TimmDataset(PLAIN, root=str(image_folder), split="val", classes=["blue", "green", "red"])
    assert len(data) == 15
    assert data.metainfo["classes"] == ["blue", "green", "red"]
    image, target = data[14]
    assert image.shape == (3, 32, 32)
    assert target == 2
    # Indices are those of the classes, whichever of them a split holds.
    turned = TimmDataset(PLAIN, root=str(image_folder), split="val", classes=["red", "green", "blue"])
    assert {target for _, target in turned} == {0, 1, 2}
    assert turned[14][1] == 0
    gone = str(image_folder / "val" / "red" / "0.png")
    fewer = TimmDataset(PLAIN, root=str(image_folder), split="val", classes=["blue", "green", "red"], exclude=[gone])
    assert len(fewer) == 14
    assert gone not in fewer.filenames(absolute=True)
    with pytest.raises(UserError, match=r"data .*split train"):
        TimmDataset(PLAIN, root=str(tmp_path))


def test_names_are_registered() -> None:
    for registry, name in ((MODELS, "ImageClassifier"), (DATASETS, "TimmDataset"), (METRICS, "TopK")):
        assert registry.get(name) is not None


def test_the_folder_sets_classes_and_places(run_config: Any, image_folder: Path) -> None:
    config = run_config()
    configure(config, image_folder)
    assert config.model.num_classes == 3
    for loader in (config.train_dataloader, config.val_dataloader):
        assert loader.dataset.root == str(image_folder)
        assert loader.dataset.classes == ["blue", "green", "red"]


def test_the_embedded_digits_are_the_default(run_config: Any, data_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDZOO_DATA", str(data_home))
    config = run_config()
    configure(config, None)
    assert config.model.num_classes == 10
    assert Path(config.train_dataloader.dataset.root).is_relative_to(data_home)


def test_bad_images_stop_or_are_left_out(run_config: Any, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(3):
                noise = np.random.default_rng(index).integers(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(noise).save(tmp_path / split / name / f"{index}.png")
    cut = tmp_path / "train" / "a" / "1.png"
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(UserError, match=r"train/a/1\.png"):
        configure(run_config(), tmp_path)
    config = run_config("on_bad=skip")
    configure(config, tmp_path)
    assert config.train_dataloader.dataset.exclude == [str(cut)]
    assert len(DATASETS.build(config.train_dataloader.dataset)) == 5


def test_bad_data(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere"):
        configure(run_config(), tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no folder train/"):
        configure(run_config(), image_folder / "val")
    with pytest.raises(UserError, match=r"no data: give an image folder"):
        configure(run_config("digits=None"), None)
