"""Checkpoints, seeds, the moving average and the progress lines, each by itself."""

import errno
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybridzoo.train import engine
from hybridzoo.train.errors import UserError
from hybridzoo.train.hooks import AtomicBackend, TimmEMA
from hybridzoo.train.seeding import Draw, DrawSampler, RepeatAugSampler, SeededDataset, seed_all, seeded_dataloader
from hybridzoo.train.weights import read_checkpoint, read_state_dict


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, path = AtomicBackend(), tmp_path / "new" / "a.pth"
    backend.put(b"one", path)
    backend.put(b"two", path)
    assert path.read_bytes() == b"two"

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot save checkpoint .*a\.pth: No space left on device; earlier"):
        backend.put(b"three", path)
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


def test_old_checkpoints_go_only_after_the_new_one_is_written(
    run_config: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(
        "train_cfg.max_epochs=3", "default_hooks.checkpoint.max_keep_ckpts=1", "optim_wrapper.optimizer.lr=1e-2"
    )
    seen: list[set[str]] = []
    write = AtomicBackend.put

    def put(self: AtomicBackend, obj: bytes, filepath: str) -> None:
        write(self, obj, filepath)
        seen.append({path.name for path in tmp_path.glob("*.pth")})

    monkeypatch.setattr(AtomicBackend, "put", put)
    engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    for before, after in itertools.pairwise(seen):
        assert any(name.startswith("epoch") for name in before & after), "for a moment there was no checkpoint"
    kept = {path.name for path in tmp_path.glob("*.pth")}
    assert {"epoch_3.pth", "final.pth"} <= kept
    assert len(kept) == 3
    assert sum(name.startswith("best_accuracy_top1") for name in kept) == 1


def test_a_checkpoint_with_nan_is_refused(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    """In distributed training another process may be the one whose loss was NaN."""
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module(force=True)
    class SpoilHook(Hook):
        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            if batch_idx == 3:
                runner.model.model.head.bias.data.fill_(math.inf)

    config = run_config("custom_hooks=[{'type': 'SpoilHook'}]")
    with pytest.raises(UserError, match=r"model.head.bias is not finite .*no checkpoint had been saved yet"):
        engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    assert not list(tmp_path.glob("*.pth"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)


def test_ema_equals_timms() -> None:
    from timm.utils import ModelEmaV3

    for warmup in (False, True):
        net = Net()
        ours, theirs = TimmEMA(net, decay=0.9, use_warmup=warmup), ModelEmaV3(net, decay=0.9, use_warmup=warmup)
        for step in range(1, 21):  # timm counts from 1
            with torch.no_grad():
                net.norm.weight.add_(1.0)
                net.norm.running_mean.add_(2.0)
            ours.update_parameters(net)
            theirs.update(net, step=step)
        for name in ("weight", "running_mean"):
            torch.testing.assert_close(getattr(ours.module.norm, name), getattr(theirs.module.norm, name))
        assert not torch.equal(ours.module.norm.weight, net.norm.weight)


@pytest.mark.parametrize("evaluate", ["ema", "raw"])
def test_ema_or_raw_weights_are_evaluated_and_saved(
    run_config: Any, image_folder: Path, tmp_path: Path, evaluate: str
) -> None:
    config = run_config()
    engine.train(config, work_dir=tmp_path / "plain", data=image_folder, wandb=False)
    plain = read_state_dict(tmp_path / "plain" / "final.pth")
    config.custom_hooks = [{"type": "TimmEMAHook", "decay": 0.99, "evaluate": evaluate}]
    metrics = engine.train(config, work_dir=tmp_path / "ema", data=image_folder, wandb=False)
    saved = read_checkpoint(tmp_path / "ema" / "epoch_2.pth")
    average = {
        name.removeprefix("module.model."): value
        for name, value in saved["ema_state_dict"].items()
        if name.startswith("module.")
    }
    main = read_state_dict(tmp_path / "ema" / "epoch_2.pth")
    raw, mean = (average, main) if evaluate == "ema" else (main, average)
    assert all(torch.equal(value, raw[name]) for name, value in plain.items()), "an EMA changed the training"
    assert not torch.equal(mean["head.weight"], raw["head.weight"])
    again = engine.test(config, tmp_path / "ema" / "final.pth", data=image_folder, work_dir=tmp_path / "test")
    assert again == metrics


def test_seed_all_depends_on_every_part_of_the_key() -> None:
    import random

    import numpy as np

    def draw(*key: int) -> tuple[float, float, float]:
        seed_all(*key)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    for other in ((1, 2, 4), (1, 3, 2), (2, 1, 3), (1, 2)):
        assert all(a != b for a, b in zip(draw(1, 2, 3), draw(*other), strict=True))


class Noise:
    """A dataset of random numbers."""

    metainfo = {"classes": ["a"]}  # noqa: RUF012

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> float:
        return index + float(torch.rand(()))


def test_samples_depend_only_on_seed_epoch_and_position(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    from mmengine.registry import DATASETS

    monkeypatch.setitem(DATASETS._module_dict, "Noise", Noise)
    loader = seeded_dataloader(
        {"dataset": {"type": "Noise"}, "sampler": {"type": "DefaultSampler"}, "batch_size": 1}, 7
    )
    data = SeededDataset(loader["dataset"]["dataset"])
    sampler = DrawSampler(data, {"type": "DefaultSampler", "shuffle": False}, seed=7)
    first = [data[draw] for draw in sampler]
    assert first == [data[pickle.loads(pickle.dumps(draw))] for draw in reversed(list(sampler))][::-1]
    sampler.set_epoch(1)
    assert all(a != b for a, b in zip(first, [data[draw] for draw in sampler], strict=True))
    assert data.metainfo == {"classes": ["a"]}
    data.extra = 3
    assert data._dataset.extra == 3
    assert len(pickle.loads(pickle.dumps(data))) == 10

    # Two processes see what one sees, in turns.
    sampler.set_epoch(0)
    parts = []
    for rank in (0, 1):
        for module in ("hybridzoo.train.seeding", "mmengine.dataset.sampler"):
            monkeypatch.setattr(f"{module}.get_dist_info", lambda rank=rank: (rank, 2))
        parts.append([data[d] for d in DrawSampler(data, {"type": "DefaultSampler", "shuffle": False}, seed=7)])
    assert [x for pair in zip(*parts, strict=True) for x in pair] == first


def test_an_endless_sampler_resumes_at_its_position() -> None:
    def draws(skip: int, count: int) -> list[tuple[int, tuple[int, ...]]]:
        sampler = DrawSampler(Noise(), {"type": "InfiniteSampler"}, seed=3)
        if skip:
            sampler.skip(skip)
        return [(int(d), d.key) for d in itertools.islice(iter(sampler), count)]

    assert draws(0, 30)[13:] == draws(13, 17)
    assert not hasattr(DrawSampler(Noise(), {"type": "DefaultSampler"}, seed=3), "skip")
    assert isinstance(Draw(3, (1,)), int)


def test_repeated_augmentation() -> None:
    sampler = RepeatAugSampler(list(range(600)), seed=5, num_repeats=3)
    sampler.set_epoch(0)
    first = list(sampler)
    assert len(first) == len(sampler)
    assert {first.count(index) for index in set(first)} <= {1, 2, 3}
    assert len(set(first)) < len(first) / 2
    sampler.set_epoch(1)
    assert list(sampler) != first
    other = RepeatAugSampler(list(range(600)), seed=6)
    other.set_epoch(1)
    assert list(other) != list(sampler)
