"""Files of the Hugging Face hub come as all others do; what timm brought into its cache is used from there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from http_server import Answer, Server
from published_files import CARD, CONTENT, NAME, OTHER, STATE, is_loaded, left, saved
from safetensors.torch import save

import hybridzoo
from hybridzoo import checkpoints
from hybridzoo.checkpoints import files, store
from hybridzoo.checkpoints.transfer import DownloadError

FILE = "/timm/test/resolve/main/pytorch_model.bin"
OVERLAY = dict(url=f"https://huggingface.co{FILE}")  # timm has registered the card as it was before the test
SHA = hashlib.sha256(CONTENT).hexdigest()


def bring_as_timm_does(hub: Server, name: str = "pytorch_model.bin") -> Path:
    """What huggingface_hub has put into its cache, which is empty here for each test."""
    cache = huggingface_hub.constants.HF_HUB_CACHE
    return Path(huggingface_hub.hf_hub_download("timm/test", name, endpoint=hub.url, cache_dir=cache))


def test_a_file_is_downloaded_once_with_the_login(hub: Server, home: Path) -> None:
    path = checkpoints.download(NAME, progress=False)
    assert path == home / f"{CARD.name}.bin"
    assert path.read_bytes() == CONTENT
    assert left(home) == [f"{CARD.name}.bin", f"{CARD.name}.bin.json"]
    assert checkpoints.download(NAME) == path
    assert [(request.path, request.headers["Authorization"]) for request in hub.requests] == [
        (FILE, "Bearer hf_secret")
    ]
    assert checkpoints.verify(path).ok


def test_files_that_timm_downloaded_are_used_and_recorded(
    hub: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought = bring_as_timm_does(hub)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert is_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=OVERLAY))
    assert checkpoints.download(NAME) == brought
    assert store.record_of(store.find(NAME))["sha256"] == SHA
    assert left(home) == [f"{CARD.name}.bin.json"]


def test_either_of_timms_two_files_is_used(hub: Server, home: Path) -> None:
    """Each has a record of its own, and neither is measured by the other's."""
    ours = {key: value.contiguous() for key, value in checkpoints.convert(STATE, NAME).items()}
    hub.files["/timm/test/resolve/main/model.safetensors"] = save(ours)
    brought = bring_as_timm_does(hub, "model.safetensors")
    assert is_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=OVERLAY))
    assert checkpoints.download(NAME) == brought
    assert left(home) == [f"{CARD.name}.bin.safetensors.json"]
    brought.unlink()
    assert checkpoints.download(NAME) == home / f"{CARD.name}.bin"
    assert is_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=OVERLAY))


@pytest.mark.parametrize("name", ["maxvit_tiny", "efficientvit_mit_b0", "efficientvit_msra_m0"])
def test_weights_of_timm_are_requested_from_the_hub_like_timm_does(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By default; the file has timm's names."""
    card = store.find(name)
    host = card.url.split("/")[4].partition(".")[0]
    assert card.url.startswith("https://huggingface.co/timm/")
    assert timm.is_model(host)
    with torch.device("meta"):
        empty = timm.create_model(host).state_dict()
    theirs = {key: torch.rand(value.shape).to(value.dtype) for key, value in empty.items()}
    with Server().running() as running:
        running.files[card.url.removeprefix("https://huggingface.co")] = save(theirs)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        own = timm.create_model(name, pretrained=True).state_dict()
    assert all(torch.equal(own[key], value) for key, value in checkpoints.convert(theirs, name).items())


def test_cards_of_timms_files_agree_with_timm() -> None:
    """By timm's own list of what it hosts."""
    hosted = [card for card in checkpoints.cards() if card.url.startswith("https://huggingface.co/timm/")]
    assert len(hosted) == 21 + 19 + 6
    for card in hosted:
        repository, file = card.url.split("/")[4], card.url.rpartition("/")[2]
        cfg = timm.get_pretrained_cfg(repository, allow_unregistered=False)
        assert cfg is not None
        assert cfg.hf_hub_id == f"timm/{repository}"
        assert (cfg.input_size, cfg.mean, cfg.std, cfg.num_classes) == (
            card.input_size,
            card.mean,
            card.std,
            card.num_classes,
        )
        assert cfg.crop_pct == card.crop_pct or f"timm's configuration of the file crops {cfg.crop_pct}" in card.notes
        assert file == "model.safetensors"


def test_a_busy_hub_is_retried_and_a_cut_download_resumed(hub: Server) -> None:
    hub.script = [Answer(status=500, body=b""), Answer(cut=300_000)]
    assert checkpoints.download(NAME).read_bytes() == CONTENT
    assert [request.headers.get("Range") for request in hub.requests] == [None, None, "bytes=300000-"]
    assert hub.sent() == len(CONTENT)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(status=404, body=b"\x80\xff"), "404 .*there is no such file"),
        (Answer(status=403), "403 .*access is forbidden"),
        (Answer(status=401), "401 .*a login is needed"),
        (Answer(body=b"<html>" + bytes(len(CONTENT) - 6)), "a web page"),
        (Answer(body=saved({"model": OTHER}), headers={"X-Linked-Etag": SHA}), "has SHA-256 .*, expected"),
    ],
    ids=["404", "403", "401", "a page of the file's length", "another file"],
)
def test_faults_are_one_line_and_leave_nothing(hub: Server, home: Path, answer: Answer, says: str) -> None:
    hub.always = answer
    with pytest.raises(DownloadError, match=rf"{FILE}: .*{says}.*give a file that you have") as caught:
        checkpoints.download(NAME)
    assert "\n" not in str(caught.value)
    assert left(home) == []


def test_offline(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="is not in the cache, and HF_HUB_OFFLINE forbids"):
        checkpoints.download(NAME)
    assert hub.requests == []


def test_a_file_with_another_hash_than_its_name_in_the_cache(hub: Server, home: Path, tmp_path: Path) -> None:
    """Without a record, and by any path that leads there."""
    brought = bring_as_timm_does(hub)
    blob = brought.resolve()
    assert blob.name == SHA
    assert checkpoints.verify(brought, NAME).known == "hub"
    blob.write_bytes(saved({"model": OTHER}))
    with pytest.raises(DownloadError, match=rf"has SHA-256 \w+, not {SHA} as in the hub's cache"):
        checkpoints.download(NAME)
    (tmp_path / "link").symlink_to(brought)
    for path in (brought, blob, tmp_path / "link"):
        (problem,) = checkpoints.verify(path, NAME).problems
        assert problem == f"SHA-256 is {files.hash_of(blob)}, its hub says {SHA}"


def test_a_recorded_file_is_found_by_any_path(
    hub: Server, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    brought = bring_as_timm_does(hub)
    checkpoints.download(NAME)
    monkeypatch.chdir(brought.parent)
    assert checkpoints.verify(brought.name, NAME).known == "record"
    brought.resolve().write_bytes(saved({"model": OTHER}))
    (problem,) = checkpoints.verify(brought.name, NAME).problems
    assert "its record says" in problem


def test_the_mirror_is_used_for_the_hub_too(hub: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the hub, and is not told the login."""
    monkeypatch.setenv("HYBRIDZOO_MIRROR", f"{hub.url}/zoo/")
    hub.files[f"/zoo{FILE}"] = CONTENT
    assert checkpoints.download(NAME) == home / f"{CARD.name}.bin"
    assert "Authorization" not in hub.requests[0].headers
    assert hybridzoo.__version__ in hub.requests[0].headers["User-Agent"]
