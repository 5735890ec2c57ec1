"""Who starts the processes of a run: torchrun, on one machine or several, or Slurm."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from hybridzoo.train.errors import UserError

_NEEDED = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


def settle_environment(launcher: str) -> None:
    """Give this process the variables that torchrun would have given it.

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
    """torchrun's variables of one of srun's processes.

    Args:
        environment: its variables. `MASTER_ADDR` and `MASTER_PORT`, where they are set, stay; else the first
            node is the meeting place, at a port that follows from the job's number.

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
