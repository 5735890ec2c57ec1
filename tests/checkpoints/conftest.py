"""Empty caches, and servers that have the file of `published_files`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import Server
from published_files import CARD, CONTENT, with_card

from hybridzoo.checkpoints import pretrained, transfer
from hybridzoo.checkpoints.transfer import Policy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no memory of other tests; the checkpoints' folder of PyTorch's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HYBRIDZOO_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "POLICY", Policy(attempts=2, sleep=lambda seconds: None))
    monkeypatch.setattr(pretrained, "_told", set())
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Mirrors every address; has the file of `CARD`."""
    with Server().running() as running:
        running.files[CARD.url.removeprefix("https://github.com")] = CONTENT
        monkeypatch.setenv("HYBRIDZOO_MIRROR", running.url)
        yield running


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with the hub's API, which has a file at the address of `CARD`."""
    with Server().running() as running:
        running.hub = True
        running.files["/timm/test/resolve/main/pytorch_model.bin"] = CONTENT
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with_card(monkeypatch, url="https://huggingface.co/timm/test/resolve/main/pytorch_model.bin")
        yield running
