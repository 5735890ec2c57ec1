"""What batches do to a network: statistics of its first ones, and what is said of a bad one."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridzoo.train import engine
from hybridzoo.train.bad_batch import describe, number_of_classes
from hybridzoo.train.batchnorm import BatchNormWarmUpHook
from hybridzoo.train.classification import ImageClassifier
from hybridzoo.train.classified import FolderDataset
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import read_checkpoint


def warmed(model: nn.Module, batches: list[Tensor], iteration: int = 0) -> None:
    """Feed batches to a model in training as a run with the hook does."""
    hook, runner = BatchNormWarmUpHook(), SimpleNamespace(model=model.train(), cfg={}, iter=iteration)
    hook.before_train(runner)
    for runner.iter, batch in enumerate(batches, iteration):
        hook.before_train_iter(runner, 0)
        model(batch)
    hook.after_train(runner)


@pytest.mark.parametrize("variance", [1.0, 1e-9])
def test_statistics_are_the_mean_of_the_first_batches_and_then_move(variance: float) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(64, 4) * variance**0.5 + index for index in range(15)]
    norm = nn.BatchNorm1d(4, momentum=0.1)
    warmed(norm, batches[:6])
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches[:6]]).mean(0))
    torch.testing.assert_close(
        norm.running_var, torch.stack([b.var(0) for b in batches[:6]]).mean(0), rtol=1e-3, atol=0
    )
    assert norm.momentum == 0.1
    expected = torch.stack([b.mean(0) for b in batches[:10]]).mean(0)
    for batch in batches[10:]:
        expected = 0.9 * expected + 0.1 * batch.mean(0)
    warmed(norm, batches[6:], iteration=6)
    torch.testing.assert_close(norm.running_mean, expected)


def test_statistics_loaded_with_weights_are_kept() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 4) for _ in range(3)]
    ours, plain = nn.BatchNorm1d(4), nn.BatchNorm1d(4).train()
    for norm in (ours, plain):
        norm.running_mean.fill_(2.0)
    warmed(ours, batches)
    for batch in batches:
        plain(batch)
    assert torch.equal(ours.running_mean, plain.running_mean)
    frozen = nn.BatchNorm1d(4).eval()
    frozen.train = lambda mode=True: frozen  # type: ignore[method-assign]
    warmed(nn.Sequential(frozen), batches)
    assert torch.equal(frozen.running_var, torch.ones(4))


def _small(run_config: Any, *options: str) -> Any:
    config = run_config("train_dataloader.batch_size=9", *options)
    config.model.pop("img_size")
    return config


def test_a_new_network_with_tiny_variances_can_be_validated(
    run_config: Any, image_folder: Path, tmp_path: Path
) -> None:
    """EfficientViT's published initialisation gives its BatchNorms variances of 1e-9: three colours, 24 iterations."""
    config = _small(run_config, "model.name=efficientvit_mit_b0", "train_cfg.max_epochs=6", "param_scheduler=[]")
    metrics = engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    assert metrics["accuracy/top1"] > 60


def test_a_run_resumed_in_its_first_batches_gives_the_same_result(
    run_config: Any, image_folder: Path, tmp_path: Path
) -> None:
    options = ("model.name=test_resnet", "param_scheduler=[]")  # four iterations an epoch
    engine.train(_small(run_config, *options), work_dir=tmp_path / "whole", data=image_folder, wandb=False)
    for epochs in (1, 2):
        config = _small(run_config, *options, f"train_cfg.max_epochs={epochs}")
        engine.train(config, work_dir=tmp_path / "parts", data=image_folder, wandb=False, resume=epochs == 2)
    whole, parts = (read_checkpoint(tmp_path / name / "epoch_2.pth")["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert any("running_var" in name for name in whole)


class Instances(SimpleNamespace):
    pass


def scene(path: str, boxes: list[list[float]], labels: list[int]) -> Any:
    return Instances(
        img_path=path, gt_instances=Instances(bboxes=torch.tensor(boxes), labels=torch.tensor(labels, dtype=torch.long))
    )


NAN = float("nan")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.ones(2, 3, 4, 4), torch.tensor([0, 1])), []),
        ((torch.tensor([[1.0], [NAN]]), torch.tensor([0, 1])), ["pixels", "b.png"]),
        ((torch.ones(2, 3, 4, 4), torch.tensor([0, 7])), ["label 7", "0 to 2", "b.png"]),
        ((torch.ones(2, 3, 4, 4), torch.tensor([[0.1, NAN], [0.5, 0.5]])), ["targets", "a.png"]),
        ({"inputs": [torch.ones(3, 4, 4)], "data_samples": [scene("s.png", [[0, 0, 4, 4]], [2])]}, []),
        (
            {"inputs": [torch.ones(3, 4, 4)], "data_samples": [scene("s.png", [[0, 0, NAN, 4]], [2])]},
            ["boxes", "s.png"],
        ),
        (
            {"inputs": [torch.ones(3, 4, 4)], "data_samples": [scene("s.png", [[5, 0, 4, 4]], [2])]},
            ["right < left", "s.png"],
        ),
        (
            {"inputs": [torch.ones(3, 4, 4)], "data_samples": [scene("s.png", [[0, 0, 4, 4]], [3])]},
            ["label 3", "s.png"],
        ),
        (
            {
                "inputs": [torch.ones(3, 4, 4)],
                "data_samples": [Instances(img_path="m.png", gt_sem_seg=Instances(data=torch.tensor([[0, 255, 9]])))],
            },
            ["label 9", "m.png"],
        ),
    ],
)
def test_a_bad_batch_is_described(batch: Any, words: list[str]) -> None:
    said = describe(batch, ["a.png", "b.png"], classes=3)
    assert bool(said) is bool(words)
    for word in words:
        assert word in said
    assert "a.png" not in said or "a.png" in words


def test_a_nan_names_its_file(
    run_config: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FolderDataset.__getitem__
    bad = next(iter(sorted((image_folder / "train" / "red").glob("*.png"))))

    def spoilt(self: FolderDataset, index: int) -> Any:
        image, label = read(self, index)
        return (image * NAN if self.samples[index][0] == bad else image), label

    monkeypatch.setattr(FolderDataset, "__getitem__", spoilt)
    with pytest.raises(UserError, match=rf"loss is nan.*the data has pixels that are not finite: {bad}$"):
        engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False)


def test_the_classes_of_a_classifier() -> None:
    assert number_of_classes(ImageClassifier("test_resnet", num_classes=3)) == 3
    assert number_of_classes(nn.Linear(1, 1)) is None
    assert list(itertools.islice(describe((torch.ones(0, 3), torch.ones(0))), 1)) == []
