"""Whole runs: the artefacts, resuming after a kill, two processes, and every way to stop."""

import copy
import hashlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork, free_port, together
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from hybridzoo.layers.inference import Fusible
from hybridzoo.train import engine, testing
from hybridzoo.train.classification import eval_transform
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import read_checkpoint, read_state_dict

# Everything random at once: augmentation, mixup and cutmix, drop path, dropout; BatchNorm; EMA; gradients of two
# batches in an epoch of five, so that epochs end on half an accumulation.
RANDOM = (
    "model.name=test_resnet",
    "model.drop_path_rate=0.3",
    "model.drop_rate=0.2",
    "model.mixup={'mixup_alpha': 0.8, 'cutmix_alpha': 1.0}",
    "train_dataloader.batch_size=6",
    "train_dataloader.dataset.transform.auto_augment=rand-m9-mstd0.5",
    "train_dataloader.dataset.transform.re_prob=0.25",
    "optim_wrapper.accumulative_counts=4",
    "custom_hooks=[{'type': 'TimmEMAHook', 'decay': 0.9}]",
    "train_cfg.max_epochs=4",
)


def state_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(state_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(state_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_run_writes_the_files_that_inference_and_tests_need(
    run_config: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config("train_cfg.max_epochs=6")
    metrics = engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    assert metrics.keys() == {"accuracy/top1", "accuracy/top5"}
    assert metrics["accuracy/top1"] > 60, "it does not learn three colours"
    assert metrics["accuracy/top5"] == 100
    assert config.model.num_classes == 1000, "train changed the caller's config"

    opening, _, lines = capsys.readouterr().out.partition("epoch 1/6")
    said = "data: 36 training images, 15 validation images; 3 classes: blue, green, red\nnetwork: test_vit, 0."
    assert opening.startswith(said)
    assert "\nweights: from scratch\n" in opening
    assert "\nrun: 6 epochs of 4 iterations, 8 images each" in opening
    lines = f"epoch 1/6{lines}".splitlines()
    assert len(lines) == 13, lines  # two an epoch, and where the weights are
    assert lines[0].startswith("epoch 1/6  loss ")
    assert lines[-2].split() == ["validation", "top1", f"{metrics['accuracy/top1']:.4g}", "top5", "100"]
    assert "Epoch(train)" in next(tmp_path.glob("*/*.log")).read_text()
    assert any("accuracy/top1" in json.loads(line) for line in next(tmp_path.glob("*/vis_data/scalars.json")).open())

    kept = {path.name for path in tmp_path.glob("*.pth")}
    assert {"epoch_5.pth", "epoch_6.pth", "final.pth"} <= kept
    assert len(kept) == 4, kept
    assert not list(tmp_path.glob(".*")), "temporary files stayed"
    final = torch.load(tmp_path / "final.pth", weights_only=True)  # plain types only
    assert "optimizer" not in final
    assert final["meta"]["class_names"] == ["blue", "green", "red"]
    assert final["meta"]["task"] == "classification"
    assert final["meta"]["hybridzoo_version"]
    assert "test_vit" in final["meta"]["cfg"]

    dumped = load_config(tmp_path / "classification_digits.py")
    assert dumped.model.num_classes == 3
    other = tmp_path / "elsewhere"
    assert engine.test(config, tmp_path / "final.pth", data=image_folder, work_dir=other) == metrics
    assert not list(other.glob("*.py")), "a test wrote a training config"

    model = engine.build_for_inference(config, tmp_path / "final.pth", device="cpu")
    assert model.dataset_meta["classes"] == ("blue", "green", "red")
    assert not model.training
    from PIL import Image

    seen = [Image.open(path) for path in sorted(image_folder.glob("val/*/*.png"))]
    with torch.no_grad():
        scores = torch.stack(
            [p["scores"] for p in model(torch.stack([eval_transform(config)(i) for i in seen]), mode="predict")]
        )
    right = (scores.argmax(1) == torch.arange(3).repeat_interleave(5)).float().mean()
    assert math.isclose(100 * right, metrics["accuracy/top1"], rel_tol=1e-5)


def test_runs_in_one_process_do_not_share_state(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    first = engine.train(run_config(), work_dir=tmp_path / "a", data=image_folder, wandb=False)
    again = engine.train(run_config(), work_dir=tmp_path / "b", data=image_folder, wandb=False)
    assert first == again
    a, b = (read_checkpoint(tmp_path / name / "epoch_2.pth") for name in "ab")
    assert state_equal(a["state_dict"], b["state_dict"])
    other = engine.train(run_config(), work_dir=tmp_path / "c", data=image_folder, wandb=False, seed=1)
    c = read_checkpoint(tmp_path / "c" / "epoch_2.pth")
    assert not state_equal(a["state_dict"], c["state_dict"]), "the seed changes nothing"
    assert c["meta"]["seed"] == 1
    assert other


@pytest.mark.slow
@pytest.mark.forks
def test_a_killed_run_resumes_to_the_same_weights(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = _resnet(run_config, RANDOM)
    # The uninterrupted run has no loader workers, the other one has: their number must not matter either.
    engine.train(config, work_dir=whole, data=image_folder, wandb=False, seed=3)

    config.train_dataloader.update(num_workers=2, persistent_workers=True)

    def slow() -> None:
        """Stopped after two epochs, so that the kill falls inside the third."""

        @HOOKS.register_module()
        class SlowHook(Hook):
            def after_train_iter(
                self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
            ) -> None:
                if runner.epoch == 2 and batch_idx == 3:
                    (tmp_path / "slow").touch()
                    time.sleep(300)

        config.custom_hooks.append(dict(type="SlowHook"))
        engine.train(config, work_dir=killed, data=image_folder, wandb=False, seed=3)

    process = Fork(slow, tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "slow").exists():
            assert process.poll() is None, process.printed()
            assert time.monotonic() < deadline, process.printed()
            time.sleep(0.05)
    finally:
        process.kill()
    assert not (killed / "epoch_3.pth").exists()

    # What a crash may leave behind must not be picked: a cut checkpoint, a stale pointer, a half-written file.
    good = (killed / "epoch_2.pth").read_bytes()
    (killed / "epoch_3.pth").write_bytes(good[: len(good) // 3])
    (killed / "last_checkpoint").write_text(str(killed / "epoch_3.pth"))
    (killed / ".epoch_3.pth.123.tmp").write_bytes(good[:100])

    def resume() -> None:
        engine.train(config, work_dir=killed, data=image_folder, wandb=False, resume=True)

    (said,) = together(Fork(resume, tmp_path / "log"))
    assert f"resuming from {killed / 'epoch_2.pth'}" in said
    assert "epoch 3/4" in said
    assert "epoch 2/4" not in said
    assert not list(killed.glob(".*.tmp"))

    ours, theirs = read_checkpoint(killed / "epoch_4.pth"), read_checkpoint(whole / "epoch_4.pth")
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert state_equal(ours[part], theirs[part]), part
    assert state_equal(read_state_dict(killed / "final.pth"), read_state_dict(whole / "final.pth"))
    assert not state_equal(ours["state_dict"], read_checkpoint(whole / "epoch_3.pth")["state_dict"])


def _resnet(run_config: Any, options: tuple[str, ...]) -> Any:
    config = run_config(*options)
    config.model.pop("img_size")
    return config


def test_epochs_differ_in_their_augmentation(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    """mmengine's own worker seeds repeat the same augmentations every epoch."""
    seen: list[torch.Tensor] = []

    @HOOKS.register_module(force=True)
    class RecordHook(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            seen.append(data_batch[0].clone())

    config = run_config("train_dataloader.sampler.shuffle=False", "custom_hooks=[{'type': 'RecordHook'}]")
    config.train_dataloader.update(num_workers=1, batch_size=36)
    engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_resuming_a_finished_run_only_measures(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    metrics = engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False)
    before = (tmp_path / "epoch_2.pth").stat().st_mtime_ns
    assert engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False, resume=True) == metrics
    assert (tmp_path / "epoch_2.pth").stat().st_mtime_ns == before


def test_resume_without_a_checkpoint_starts_a_new_run(
    run_config: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config("train_cfg.max_epochs=1")
    engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False, resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    assert (tmp_path / "epoch_1.pth").exists()


@pytest.mark.slow
@pytest.mark.forks
def test_two_processes_agree_with_one(
    run_config: Any, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same images, same augmentations, same weights as one process with twice the batch; and the odd 15 of val."""
    # eps: where a gradient is rounding noise, plain AdamW makes a whole step of it.
    config = run_config("train_dataloader.batch_size=12", "optim_wrapper.optimizer.eps=1e-3")
    one = engine.train(config, work_dir=tmp_path / "one", data=image_folder, wandb=False)
    said = [line.rsplit("  ", 1)[0] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    config.train_dataloader.batch_size = 6
    noisy = _resnet(run_config, RANDOM)  # BatchNorm's statistics have to agree as well

    def run() -> None:
        @HOOKS.register_module()
        class SaveHook(Hook):
            def after_train(self, runner: Any) -> None:
                torch.save(runner.model.module.state_dict(), runner.work_dir + "/rank" + os.environ["RANK"])

        config.custom_hooks = [dict(type="SaveHook")]
        same = dict(data=image_folder, launcher="pytorch")
        metrics = engine.train(config, work_dir=tmp_path / "two", wandb=False, **same)
        noisy.custom_hooks.append(dict(type="SaveHook"))
        engine.train(noisy, work_dir=tmp_path / "noisy", wandb=False, **same)
        again = engine.test(config, tmp_path / "two/final.pth", work_dir=tmp_path / "test", **same)
        print(json.dumps([metrics, again]))

    torchruns = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    first, second = together(
        *(Fork(run, tmp_path / f"log{i}", cwd=tmp_path, RANK=i, LOCAL_RANK=i, **torchruns) for i in ("0", "1"))
    )
    lines = first.splitlines()
    assert "epoch" not in second
    seen = [line.rsplit("  ", 1)[0] for line in lines if line.startswith("epoch") and "/2 " in line]
    assert seen == said, "one line an epoch from both processes, with the mean of their losses"
    assert 0 < one["accuracy/top1"] < 100, "the comparison has to see a wrong count"
    metrics, again = json.loads(lines[-1])
    assert metrics == again == one
    for run in ("noisy", "two"):
        ranks = [torch.load(tmp_path / run / f"rank{rank}") for rank in (0, 1)]
        assert state_equal(*ranks), run
    single = read_state_dict(tmp_path / "one" / "final.pth", strip=False)
    start = read_state_dict(tmp_path / "one" / "epoch_1.pth", strip=False)
    for name, value in single.items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-6)
    assert not state_equal(single, start)
    assert not (tmp_path / ".dist_test").exists()


def test_accumulated_gradients_equal_a_larger_batch(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    still = "train_dataloader.sampler.shuffle=False"
    whole = run_config(still, "train_dataloader.batch_size=12", "optim_wrapper.optimizer.eps=1e-3")
    parts = run_config(
        still,
        "train_dataloader.batch_size=4",
        "optim_wrapper.optimizer.eps=1e-3",
        "optim_wrapper.accumulative_counts=3",
    )
    for config in (whole, parts):
        config.param_scheduler = [{"type": "ConstantLR", "factor": 1.0, "by_epoch": True}]
    engine.train(whole, work_dir=tmp_path / "whole", data=image_folder, wandb=False)
    engine.train(parts, work_dir=tmp_path / "parts", data=image_folder, wandb=False)
    a, b = (read_state_dict(tmp_path / name / "final.pth") for name in ("whole", "parts"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5)


def test_mixed_precision_on_a_cpu(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    config = run_config("train_cfg.max_epochs=1")
    engine.train(config, work_dir=tmp_path / "amp", data=image_folder, wandb=False, amp=True)
    engine.train(config, work_dir=tmp_path / "full", data=image_folder, wandb=False)
    amp, full = (read_state_dict(tmp_path / name / "final.pth") for name in ("amp", "full"))
    assert all(value.dtype == torch.float32 for value in amp.values())
    assert not state_equal(amp, full), "amp changes nothing"
    assert all(torch.isfinite(value).all() for value in amp.values())
    config.amp_dtype = "float16"
    with pytest.raises(UserError, match=r"float16"):
        engine.train(config, work_dir=tmp_path / "half", data=image_folder, wandb=False, amp=True)


def test_starts_from_weights(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    import timm

    published = timm.create_model("test_vit", num_classes=7, img_size=32)
    torch.save({"state_dict": published.state_dict()}, tmp_path / "published.pth")
    config = run_config("train_cfg.max_epochs=1", "optim_wrapper.optimizer.lr=0.0")
    engine.train(config, work_dir=tmp_path / "a", data=image_folder, wandb=False, weights=tmp_path / "published.pth")
    trained = read_state_dict(tmp_path / "a" / "final.pth")
    assert torch.equal(trained["blocks.0.attn.qkv.weight"], published.state_dict()["blocks.0.attn.qkv.weight"])
    assert trained["head.weight"].shape == (3, 64)
    config.model.depth = 2
    with pytest.raises(UserError, match=r"do not fit test_vit: .*unexpected, first 'blocks.2"):
        engine.train(
            config, work_dir=tmp_path / "b", data=image_folder, wandb=False, weights=tmp_path / "published.pth"
        )
    with pytest.raises(UserError, match=r"'head.weight'"):
        engine.test(run_config(), tmp_path / "published.pth", work_dir=tmp_path / "c", data=image_folder)


def test_a_loss_that_is_not_finite_stops_the_run(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    @HOOKS.register_module(force=True)
    class PoisonHook(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if runner.iter == 5:  # four iterations an epoch
                data_batch[0].fill_(float("nan"))

    config = run_config("custom_hooks=[{'type': 'PoisonHook'}]")
    with pytest.raises(UserError) as caught:
        engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    assert "loss is nan at iteration 6 (epoch 2): training stopped" in str(caught.value)
    assert f"the last good checkpoint is {tmp_path / 'epoch_1.pth'}" in str(caught.value)
    assert not (tmp_path / "epoch_2.pth").exists()
    assert all(torch.isfinite(value).all() for value in read_state_dict(tmp_path / "epoch_1.pth").values())


@pytest.mark.forks
def test_a_full_disk_keeps_the_old_checkpoint(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    config = run_config("default_hooks.checkpoint.max_keep_ckpts=1", "default_hooks.checkpoint.save_best=None")
    work = tmp_path / "run"
    config.train_cfg.max_epochs = 1
    engine.train(config, work_dir=work, data=image_folder, wandb=False)
    old = (work / "epoch_1.pth").read_bytes()

    def run() -> None:
        """The kernel refuses to let a file grow beyond half a checkpoint: write() fails as on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, len(old) // 2))
        config.train_cfg.max_epochs = 2
        try:
            engine.train(config, work_dir=work, data=image_folder, wandb=False, resume=True)
        except UserError as error:
            print("error:", error)
            sys.exit(2)

    done = Fork(run, tmp_path / "log")
    assert done.wait() == 2, done.printed()
    (line,) = [line for line in done.printed().splitlines() if line.startswith("error:")]
    assert f"cannot save checkpoint {work / 'epoch_2.pth'}: File too large" in line
    assert "--resume" in line
    assert "Traceback" not in done.printed()
    assert [path.name for path in work.glob("*epoch*")] == ["epoch_1.pth"]
    assert not list(work.glob(".*")), "the temporary file stayed"
    assert hashlib.sha256((work / "epoch_1.pth").read_bytes()).digest() == hashlib.sha256(old).digest()


@pytest.mark.forks
def test_wandb_offline(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = run_config("train_cfg.max_epochs=1")
    environment: dict[str, str | None] = {key: None for key in os.environ if key.startswith("WANDB")}
    environment["NETRC"] = str(tmp_path / "none")  # no API key: must neither ask nor wait

    def run() -> None:
        engine.train(config, work_dir=tmp_path / "run", data=image_folder)

    together(Fork(run, tmp_path / "log", cwd=tmp_path, **environment))
    (run,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert b"accuracy/top1" in log.read_bytes()
    assert not (run / "files" / "code").exists()


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("train_dataloader.batch_size=64", "train_dataloader.batch_size=64: larger than the training set"),
        ("model.name=biformer_tinny", "unknown model 'biformer_tinny': did you mean biformer_tiny"),
        ("custom_hooks=[{'type': 'TimmEMAHook', 'evaluate': 'best'}]", "choose 'ema' or 'raw'"),
    ],
)
def test_bad_input(run_config: Any, image_folder: Path, tmp_path: Path, option: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        engine.train(run_config(option), work_dir=tmp_path, data=image_folder, wandb=False)
    assert not list(tmp_path.glob("*.pth"))


def test_bad_places(run_config: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"work_dir .*file/run: cannot be created"):
        engine.train(run_config(), work_dir=tmp_path / "file" / "run", data=image_folder, wandb=False)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"torchrun"):
        engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False, launcher="pytorch")
    with pytest.raises(UserError, match=r"no such file"):
        engine.test(run_config(), tmp_path / "nothing.pth", work_dir=tmp_path, data=image_folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_counted_in_iterations_resumes_to_the_same_weights(
    run_config: Any, image_folder: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As segmentation trains: an endless sampler, checkpoints and validation between two epochs."""
    config = _resnet(run_config, RANDOM)
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 9, "val_interval": 4}
    config.train_dataloader.update(num_workers=workers, sampler={"type": "InfiniteSampler"})
    config.param_scheduler = [{"type": "PolyLR", "eta_min": 0.0, "begin": 0, "end": 9, "by_epoch": False}]
    config.default_hooks.checkpoint.update(by_epoch=False, interval=4, max_keep_ckpts=9, save_best=None)
    config.default_hooks.logger.update(log_metric_by_epoch=False)
    config.log_processor.by_epoch = False
    config.train_dataloader.batch_size = 8  # four and a half batches an epoch
    engine.train(config, work_dir=tmp_path / "whole", data=image_folder, wandb=False)
    titles = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert titles == ["iteration 4/9", "iteration 8/9", "iteration 9/9"]
    part = tmp_path / "part"
    part.mkdir()
    (part / "iter_4.pth").write_bytes((tmp_path / "whole" / "iter_4.pth").read_bytes())
    engine.train(config, work_dir=part, data=image_folder, wandb=False, resume=True)
    ours, theirs = (read_checkpoint(folder / "iter_9.pth") for folder in (part, tmp_path / "whole"))
    for name in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert state_equal(ours[name], theirs[name]), name
    config.default_hooks.checkpoint.interval = 3
    with pytest.raises(UserError, match=r"interval=3: choose a multiple of accumulative_counts=4"):
        engine.train(config, work_dir=part, data=image_folder, wandb=False)


def test_a_test_fuses_the_network_and_finds_the_same(run_config, image_folder, tmp_path, monkeypatch):
    config = run_config("model.name=biformer_tiny", "model.depths=(1,1,1,1)", "train_cfg.max_epochs=1")
    engine.train(copy.deepcopy(config), work_dir=tmp_path / "run", data=image_folder, wandb=False, device="cpu")
    scores, fused, fuse = [], [], testing.fuse

    def recorded(model, images):
        fuse(model, images)
        fused.extend(module.fused for module in model.modules() if isinstance(module, Fusible))

    monkeypatch.setattr(testing, "fuse", recorded)
    for worth in (1, 1000):
        monkeypatch.setattr(testing, "WORTH_FUSING", worth)
        weights, out = tmp_path / "run" / "final.pth", tmp_path / str(worth)
        scores.append(engine.test(config, weights, work_dir=out, data=image_folder, device="cpu"))
    assert fused == [True, False]
    assert scores[0] == scores[1]
