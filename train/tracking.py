"""Trackers: Weights & Biases, which never stops or delays a training, and optional TensorBoard."""

from __future__ import annotations

import importlib.util
import netrc
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mmengine import Config
from mmengine.dist import is_main_process
from mmengine.registry import VISBACKENDS
from mmengine.visualization import WandbVisBackend

from hybridzoo.train.errors import UserError

_HOST_TIMEOUT = 2.0  # seconds


@VISBACKENDS.register_module()
class WandbBackend(WandbVisBackend):
    """mmengine's backend, without copying every source file below the working directory."""

    def add_config(self, config: Config, **kwargs: Any) -> None:
        self.experiment.config.update(config.to_dict(), allow_val_change=True)

    def close(self) -> None:
        if hasattr(self, "_wandb"):
            self._wandb.finish()


def add_wandb(config: Config, work_dir: Path, *, on: bool) -> None:
    """Add wandb to the config's visualizer backends, in place, or remove it.

    Args:
        config: its ``visualizer``, whatever the type, gains the backend.
        work_dir: gets the folder ``wandb``; what was logged offline goes to the server by ``wandb sync`` on it.
        on: False, and a missing wandb package, leave only the local log.
    """
    if not config.get("visualizer"):
        config.visualizer = {"type": "Visualizer"}
    backends = [b for b in config.visualizer.get("vis_backends", []) if not str(b["type"]).startswith("Wandb")]
    if not any(b["type"] == "LocalVisBackend" for b in backends):
        backends.insert(0, {"type": "LocalVisBackend"})
    if on and importlib.util.find_spec("wandb") is not None and is_main_process():
        init = {"project": "hybridzoo", "name": work_dir.name, "dir": str(work_dir), "mode": wandb_mode()}
        os.environ.setdefault("WANDB_SILENT", "true")
        backends.append({"type": "WandbBackend", "init_kwargs": init})
    config.visualizer.vis_backends = backends


def add_tensorboard(config: Config, *, on: bool) -> None:
    """Add TensorBoard to the visualizer backends of a config, in place, or remove it; call `add_wandb` first.

    Its files are with the other logs, in `<work_dir>/<timestamp>/vis_data`.

    Raises:
        UserError: it is requested, but the package is missing.
    """
    backends = [b for b in config.visualizer.get("vis_backends", []) if not str(b["type"]).startswith("Tensorboard")]
    if on:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs tensorboard: pip install 'hybridzoo[tensorboard]'")
        backends.append({"type": "TensorboardVisBackend"})
    config.visualizer.vis_backends = backends


def wandb_mode() -> str:
    """``WANDB_MODE`` if set; else ``"online"`` only with an API key and a server that answers, else ``"offline"``."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    server = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host = server.hostname or "api.wandb.ai"
    if not (os.environ.get("WANDB_API_KEY") or _in_netrc(host)):
        return "offline"
    try:
        port = server.port or (80 if server.scheme == "http" else 443)
        with socket.create_connection((host, port), timeout=_HOST_TIMEOUT):
            return "online"
    except OSError:
        return "offline"


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
