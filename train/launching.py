"""Processes of a run: started by torchrun, on one or several machines, or by Slurm; and their communication."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from mmengine.dist import broadcast_object_list, get_world_size, is_main_process

from hybridzoo.train.errors import UserError

T = TypeVar("T")

_NEEDED = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


def settle_environment(launcher: str) -> None:
    """Set the environment variables that torchrun sets.

    Args:
        launcher: "none", "pytorch" (torchrun has set them) or "slurm".

    Raises:
        UserError: the process was not started by that launcher.
    """
    if launcher == "slurm":
        os.environ.update(from_slurm(os.environ))
    elif launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError("launcher='pytorch': start it by torchrun --nproc-per-node 2 -m hybridzoo train ...")


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's environment variables for one of srun's processes.

    Args:
        environment: the process's variables. `MASTER_ADDR` and `MASTER_PORT` are kept if they are set; otherwise the
            first node is used, with a port computed from the job's number.

    Raises:
        UserError: srun did not start the process.
    """
    missing = [name for name in _NEEDED if not environment.get(name)]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    address = environment.get("MASTER_ADDR") or first_node(nodes)
    if missing or not address:
        raise UserError(
            f"launcher='slurm': {(missing or ['SLURM_STEP_NODELIST'])[0]} is not set; start it by "
            "srun --ntasks-per-node 8 hybridzoo train ... --launcher slurm"
        )
    job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or 0)
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE") or environment["SLURM_NTASKS"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": per_node[0] if per_node else "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20_000 + job % 20_000),
    }


def first_node(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `gpu[003-005,9],login1` begins with gpu003."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,]*))?", nodes.strip())
    return "".join(part or "" for part in found.groups()) if found else ""


@contextlib.contextmanager
def process_group(launcher: str) -> Iterator[None]:
    """Join the run's process group. mmengine would require a GPU even with gloo."""
    if launcher != "none" and not torch.distributed.is_initialized():
        settle_environment(launcher)
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
        # Only once per process: a second group on torchrun's store may find the first one's addresses.
        atexit.register(torch.distributed.destroy_process_group)
    try:
        yield
    except BaseException:
        atexit.unregister(
            torch.distributed.destroy_process_group
        )  # it would wait for processes that wait for this process
        raise


def first_decides(decide: Callable[[], T]) -> T:
    """The result of `decide` in the first process, for all processes: files may change between two checks."""
    answer: list[Any] = [None, None]
    if is_main_process():
        try:
            answer = [decide(), None]
        except UserError as error:
            answer = [None, error]
    if get_world_size() > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
