"""Run folders: one run at a time, no mixture of runs, and the choice of the newest checkpoint."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from hybridzoo.train import cli, engine, interruptions, resuming, run_folder
from hybridzoo.train.errors import Terminated, UserError
from hybridzoo.train.run_folder import RunFolder

ONE = ("train_cfg.max_epochs=1", "train_dataloader.batch_size=12")


def checkpoint(path: Path, iterations: int, run: str = "", **more: Any) -> None:
    content = {"meta": {"iter": iterations, "epoch": iterations // 3, "run": run}, "optimizer": {}, **more}
    torch.save(content, path)


def test_the_checkpoint_with_the_most_iterations_is_the_newest(tmp_path: Path) -> None:
    """Independent of file names, times and files of other runs."""
    assert engine.latest_checkpoint(tmp_path) is None
    (tmp_path / run_folder.NAME).write_text('{"run": "mine"}')
    for name, iterations, run in (("epoch_2", 6, "mine"), ("epoch_1", 3, "mine"), ("epoch_30", 90, "older")):
        checkpoint(tmp_path / f"{name}.pth", iterations, run)
    checkpoint(tmp_path / "final.pth", 99, "mine")
    torch.save({"meta": {"iter": 99, "epoch": 9, "run": "mine"}}, tmp_path / "epoch_9.pth")  # weights alone
    os.utime(tmp_path / "epoch_1.pth", (2e9, 2e9))  # copied later, or by a clock that is wrong
    assert engine.latest_checkpoint(tmp_path) == tmp_path / "epoch_2.pth"
    checkpoint(tmp_path / "iter_7.pth", 7, "mine")
    assert engine.latest_checkpoint(tmp_path) == tmp_path / "iter_7.pth"


def test_checkpoints_of_several_runs_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "epoch_1.pth", 3, "a")
    assert engine.latest_checkpoint(tmp_path) == tmp_path / "epoch_1.pth", "copied without the folder's note"
    checkpoint(tmp_path / "epoch_2.pth", 6, "b")
    with pytest.raises(UserError, match=r"holds checkpoints of 2 runs \(epoch_1.pth, epoch_2.pth\)"):
        engine.latest_checkpoint(tmp_path)
    (tmp_path / run_folder.NAME).write_text("{")  # says nothing
    with pytest.raises(UserError, match="of 2 runs"):
        engine.latest_checkpoint(tmp_path)
    (tmp_path / run_folder.NAME).write_text('{"run": "a"}')
    assert engine.latest_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    assert "epoch_2.pth: is of another run" in capsys.readouterr().out


def test_a_run_that_cannot_be_resumed_is_not_restarted(tmp_path: Path) -> None:
    (tmp_path / "epoch_1.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"none of its checkpoints can be resumed; the first: .*epoch_1.pth"):
        resuming.find(tmp_path)
    (tmp_path / "epoch_1.pth").unlink()
    assert resuming.find(tmp_path) is None
    (tmp_path / "final.pth").touch()
    with pytest.raises(UserError, match=r"holds a run's final.pth, but no checkpoint to resume from"):
        resuming.find(tmp_path)


def test_a_new_run_needs_a_new_folder(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path / "epoch_1.pth", 3, "a")
    before = (tmp_path / "epoch_1.pth").read_bytes()
    with pytest.raises(UserError, match=r"holds a run's epoch_1.pth; add --resume .*or choose another --work-dir"):
        engine.train(run_config(*ONE), work_dir=tmp_path, data=image_folder, wandb=False)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1.pth"]
    assert (tmp_path / "epoch_1.pth").read_bytes() == before


# One at a time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["alone", "fork"])
@pytest.mark.forks
def test_a_second_run_in_a_folder_is_refused_while_the_first_is_alive(
    run_config: Any, image_folder: Path, tmp_path: Path, how: str
) -> None:
    """Also if the first run was killed, but one of its workers is still alive."""
    work, log = tmp_path / "work", tmp_path / "log"
    work.mkdir()
    half = work / ".epoch_1.pth.1.tmp"
    half.touch()

    def hold() -> None:
        with RunFolder(work) as place:
            place.claim()
            place.begin("theirs")
            if how == "fork" and os.fork() == 0:
                time.sleep(60)  # as a data loader's worker would
            print("held")
            time.sleep(60)

    process = Fork(hold, log)
    try:
        while not process.printed():
            assert process.poll() is None
            time.sleep(0.02)
        for resume in (False, True):
            with pytest.raises(UserError, match=r"work_dir .*: another run is training in it"):
                engine.train(run_config(*ONE), work_dir=work, data=image_folder, wandb=False, resume=resume)
        assert sorted(path.name for path in work.iterdir()) == [half.name, run_folder.NAME]
        assert run_folder.run_of(work) == "theirs"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with RunFolder(work) as place:
            place.claim()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_process_cannot_start_two_runs_in_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as place:
        place.claim()
        place.claim()
        with pytest.raises(UserError, match="another run is training"), RunFolder(tmp_path / "run") as second:
            second.claim()
        with pytest.raises(UserError, match="another run is training"), RunFolder(tmp_path / "run") as third:
            third.claim()
        place.begin("a")
    assert run_folder.run_of(tmp_path / "run") == "a"
    with RunFolder(tmp_path / "run") as again:
        again.claim()
        again.begin("b")
    assert run_folder.run_of(tmp_path / "run") == "b"


def test_a_refused_run_leaves_no_file(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as place:
        place.claim()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written(
    run_config: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Not tested through permissions, because root may write everywhere."""
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"work_dir .*: cannot be written \({os.strerror(code)}\); choose another"):
        engine.train(run_config(*ONE), work_dir=tmp_path, data=image_folder, wandb=False)
    assert not list(tmp_path.iterdir())


# Ways to stop ---------------------------------------------------------------------------------------------------------


def test_sigterm_ends_a_run_cleanly(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    @HOOKS.register_module(force=True)
    class EndHook(Hook):
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if runner.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    config = run_config("train_dataloader.batch_size=12", "custom_hooks=[{'type': 'EndHook'}]")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match=r"terminated; the checkpoints in .* are intact: use --resume") as caught:
        engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert engine.latest_checkpoint(tmp_path) == tmp_path / "epoch_1.pth"
    assert not list(tmp_path.glob(".*"))
    config.custom_hooks = []
    engine.train(config, work_dir=tmp_path, data=image_folder, wandb=False, resume=True)  # the lock is free
    assert (tmp_path / "final.pth").exists()


def test_the_command_line_ends_with_143(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def end(*args: Any, **options: Any) -> None:
        raise Terminated("terminated; use --resume")

    monkeypatch.setattr(engine, "train", end)
    assert cli.run(["train", "biformer_tiny_digits"]) == 143
    assert capsys.readouterr().err == "terminated; use --resume\n"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "/dev/shm"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "is killed by signal: Killed"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; the checkpoints there are intact"),
        (
            UserError("Caught UserError in DataLoader worker process 0.\nOriginal\nx.UserError: a.png: gone"),
            "^a.png: gone",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"), "No such file or directory: 'a.png'"),
        (
            FileNotFoundError("Caught it in DataLoader worker process 0.\nFileNotFoundError: [Errno 2] a.png"),
            r"^\[Errno 2\] a.png; the checkpoints there are intact",
        ),
    ],
)
def test_what_stops_a_run_is_one_line(tmp_path: Path, error: Exception, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught, interruptions.running(tmp_path):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mat1"), interruptions.running(tmp_path):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(Terminated), interruptions.running(tmp_path):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_file_is_reported(run_config: Any, image_folder: Path, tmp_path: Path, split: str) -> None:
    """timm would take the next one instead, also in validation."""
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    gone = data / split / "green" / "2.png"

    @HOOKS.register_module(force=True)
    class VanishHook(Hook):
        def before_train(self, runner: Any) -> None:
            gone.unlink()

    config = run_config(*ONE, "custom_hooks=[{'type': 'VanishHook'}]")
    with pytest.raises(UserError, match=r"green/2\.png") as caught:
        engine.train(config, work_dir=tmp_path / "run", data=data, wandb=False)
    assert "\n" not in str(caught.value)
