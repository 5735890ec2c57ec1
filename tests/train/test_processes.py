"""Runs of several processes: on two machines, under Slurm, with divided weights."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork, free_port, together

from hybridzoo.train import engine, sharding
from hybridzoo.train.errors import UserError
from hybridzoo.train.launching import first_node, from_slurm
from hybridzoo.train.weights import read_checkpoint


@pytest.mark.exhaustive  # two processes by torchrun are in test_engine, and by Slurm's variables here
def test_two_machines(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    """Two of torchrun's agents, a process each, that meet on the loopback interface."""
    run_config("train_cfg.max_epochs=1").dump(tmp_path / "config.py")
    meet = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    words = ["-m", "hybridzoo", "train", "config.py", "--data", str(image_folder), "--no-wandb", "--work-dir", "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet]
    agents = [[*torchrun, f"--node-rank={rank}", *words, "--launcher", "pytorch"] for rank in (0, 1)]
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    first, second = together(
        *(
            Fork(lambda agent=agent: os.execv(agent[0], agent), log, cwd=tmp_path)
            for agent, log in zip(agents, logs, strict=True)
        )
    )
    assert ", 2 processes, float32" in first
    assert re.search(r"^run: 1 epoch of \d+ iterations, 8 images each and process, 16 in all$", first, re.MULTILINE)
    assert re.search(r"^epoch 1/1  loss ", first, re.MULTILINE)
    assert "epoch" not in second
    assert (tmp_path / "run" / "final.pth").is_file()


@pytest.mark.forks
def test_divided_weights_under_slurm(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    """Two processes that srun seems to have started, and resumes: the same as one process with twice the batch."""
    options = ("optim_wrapper.optimizer.eps=1e-3", "optim_wrapper.clip_grad={'max_norm': 1.0}")
    one = run_config("train_dataloader.batch_size=12", *options)
    two = run_config("train_dataloader.batch_size=6", *options)

    def run() -> None:
        sharding.SMALLEST = 10_000  # the network is small
        same = dict(data=image_folder, launcher="slurm", fsdp=True, wandb=False)
        two.train_cfg.max_epochs = 1
        engine.train(two, work_dir="two", **same)
        two.train_cfg.max_epochs = 2
        metrics = engine.train(two, work_dir="two", resume=True, **same)
        print("metrics", metrics["accuracy/top1"])

    slurm = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7"}
    slurm["MASTER_PORT"] = str(free_port())
    ranks = [{**slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
    printed = together(*(Fork(run, tmp_path / f"log{i}", cwd=tmp_path, **rank) for i, rank in enumerate(ranks)))
    assert "resuming from two/epoch_1.pth" in printed[0]

    metrics = engine.train(one, work_dir=tmp_path / "one", data=image_folder, wandb=False)
    expected, found = (read_checkpoint(tmp_path / name / "epoch_2.pth") for name in ("one", "two"))
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    for index, values in expected["optimizer"]["state"].items():
        for key, value in values.items():
            assert found["optimizer"]["state"][index][key].shape == value.shape
    assert engine.test(one, tmp_path / "two/final.pth", data=image_folder, work_dir=tmp_path / "test") == metrics
    assert float(printed[0].split("metrics ")[1].split()[0]) == metrics["accuracy/top1"]
    one.train_cfg.max_epochs = 3
    engine.train(one, work_dir=tmp_path / "two", data=image_folder, wandb=False, resume=True)
    assert (tmp_path / "two/epoch_3.pth").is_file(), "a run of one process goes on from divided weights"


def test_fsdp_needs_several_processes(run_config: Any, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--fsdp: there is only one process"):
        engine.train(run_config(), work_dir=tmp_path, data=image_folder, wandb=False, fsdp=True)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("a-1,b-2", "a-1"),
        ("rack1-[7,9-11]-ib", "rack1-7-ib"),
        ("", ""),
    ],
)
def test_the_first_node_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_slurms_variables_become_torchruns() -> None:
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_NODELIST": "n[2-3]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    assert from_slurm(slurm) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n2",
        "MASTER_PORT": "34567",
    }
    set_by_hand = from_slurm({**slurm, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert (set_by_hand["MASTER_ADDR"], set_by_hand["MASTER_PORT"]) == ("10.0.0.1", "99")
    with pytest.raises(UserError, match=r"launcher='slurm': SLURM_PROCID is not set; start it by srun"):
        from_slurm({})
