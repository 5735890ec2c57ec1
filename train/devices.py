"""Checks the requested device."""

from __future__ import annotations

import torch

from hybridzoo.train.errors import UserError


def check_device(device: str) -> str:
    """Raise a UserError unless this machine has the device; make a numbered GPU the current one."""
    try:
        wanted = torch.device(device)
        if wanted.type == "meta":
            raise RuntimeError("holds no numbers")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        have = f"cpu and {gpus} GPU{'s' * (gpus > 1)}" if gpus else "cpu alone"
        raise UserError(f"--device {device}: this machine has {have}") from error
    if wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    return device
