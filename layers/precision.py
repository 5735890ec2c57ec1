"""Keeps precision under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which matrix products keep their inputs' precision; does nothing if autocast is off, for
    exporters."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
