"""The output of a run, its trackers, and early stopping."""

import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, METRICS

from hybridzoo.train import engine, progress
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError

# Early stopping -------------------------------------------------------------------------------------------------------


@METRICS.register_module()
class Rehearsed(BaseMetric):
    """Gives the scores of a list, by epoch."""

    def __init__(self, scores: list[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scores = scores

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        epoch = MessageHub.get_current_instance().get_info("epoch")
        return {"accuracy/top1": self.scores[epoch]}  # the epoch that was trained, from 0


SCORES = [10.0, 30.0, 20.0, 30.0, 31.0, 31.0, 31.0, 25.0, 50.0]


def _rehearsal(run_config: Any) -> Any:
    config = run_config("train_cfg.max_epochs=9", f"val_evaluator={{'type': 'Rehearsed', 'scores': {SCORES}}}")
    config.default_hooks.early_stop = {"type": "EarlyStopHook", "patience": 3}
    return config


def test_a_run_stops_if_validation_does_not_improve(
    run_config: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.train(_rehearsal(run_config), work_dir=tmp_path, data=image_folder, wandb=False)
    printed = capsys.readouterr().out
    assert "stopped early: accuracy/top1 has not become better than 31 of epoch 5 for 3 epochs" in printed
    assert (tmp_path / "epoch_8.pth").is_file()
    assert not (tmp_path / "epoch_9.pth").exists()


@pytest.mark.parametrize("validated", [True, False], ids=["after validation", "before validation"])
def test_a_killed_run_continues_its_count(
    run_config: Any, image_folder: Path, tmp_path: Path, validated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is older than its epoch's validation: the count is that of a run that was never interrupted."""

    class Killed(Exception):
        pass

    hook: Any = HOOKS.get("EarlyStopHook")  # which the engine alone makes known
    count = hook.after_val_epoch

    def kill(self: Any, runner: Any, metrics: Any = None) -> None:
        if validated or runner.epoch != 6:
            count(self, runner, metrics)
        if runner.epoch == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hook, "after_val_epoch", kill)
        with pytest.raises(Killed):
            engine.train(_rehearsal(run_config), work_dir=tmp_path, data=image_folder, wandb=False)
    assert (tmp_path / "epoch_6.pth").is_file()
    engine.train(_rehearsal(run_config), work_dir=tmp_path, data=image_folder, wandb=False, resume=True)
    assert (tmp_path / "epoch_8.pth").is_file()
    assert not (tmp_path / "epoch_9.pth").exists()
    assert list(json.loads((tmp_path / "validations.json").read_text())["scores"].values()) == SCORES[:8]


def test_early_stop_needs_a_validation(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    config = _rehearsal(run_config)
    config.default_hooks.checkpoint.save_best = None
    with pytest.raises(UserError, match=r"--early-stop: this config has no validation, or no .*save_best"):
        engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    with pytest.raises(UserError, match="--early-stop 0: give a number of epochs"):
        load_config("biformer_tiny_digits", early_stop=0)


# What is shown --------------------------------------------------------------------------------------------------------


def test_a_log_is_never_quiet_for_long(
    run_config: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each iteration takes ten seconds by a clock of ours: some line comes every half a minute, in validation too."""
    now: list[float] = [0.0]
    shown: list[tuple[float, str]] = []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    show, tell = progress.ProgressHook._print, progress.tell

    def note(line: str) -> None:
        shown.append((now[0], line))

    monkeypatch.setattr(progress.ProgressHook, "_print", lambda self, line: (note(line), show(self, line)))
    monkeypatch.setattr(progress, "tell", lambda line: (note(line), tell(line)))

    @HOOKS.register_module(force=True)
    class Slow(Hook):
        priority = "VERY_HIGH"

        def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
            now[0] += 10

        after_val_iter = after_train_iter

    options = ("train_dataloader.batch_size=4", "val_dataloader.batch_size=2", "custom_hooks=[{'type': 'Slow'}]")
    engine.train(run_config(*options), work_dir=tmp_path, data=image_folder, wandb=False)
    gaps = [after - before for (before, _), (after, _) in itertools.pairwise(shown)]
    assert max(gaps) <= 30
    text = "\n".join(line for _, line in shown)
    assert "epoch 1/2  3/9  loss " in text
    assert "10.00 s each" in text
    assert "  validation  3/8  10.00 s each" in text
    assert re.search(r"^epoch 1/2  loss \S+  lr \S+  90\.0 s, \S+ \S+ left$", text, re.MULTILINE)
    assert re.search(r"^epoch 2/2  loss \S+  lr \S+  90\.0 s$", text, re.MULTILINE)
    left = re.search(r"epoch 2/2  3/9.*each, (.+) left", text)
    assert left is not None
    assert left[1] == "2 min"  # six iterations and a validation of eight: 140 s


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7.4, "7 s"), (89.4, "89 s"), (90, "2 min"), (5370, "1 h 30 min"), (6000, "1 h 40 min"), (200_000, "2 d 7 h")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert progress.in_words(seconds) == words


def test_tensorboard_gets_losses_and_scores(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False, tensorboard=True)
    (file,) = tmp_path.glob("*/vis_data/events.out.tfevents*")
    found = accumulator.EventAccumulator(str(file))
    found.Reload()
    assert {"loss", "accuracy/top1"} <= set(found.Tags()["scalars"])


def test_a_missing_tensorboard_is_one_line(
    run_config: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    with pytest.raises(UserError, match=r"--tensorboard needs tensorboard: pip install 'hybridzoo\[tensorboard\]'"):
        engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False, tensorboard=True)
