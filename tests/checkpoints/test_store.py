"""Published files from a server of ours into timm's models, through the cache, under every fault."""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import goldens
import pytest
import timm
import torch
from http_server import Answer, Server
from torch import Tensor, nn

import hybridzoo  # noqa: F401  registers the models
from hybridzoo import checkpoints
from hybridzoo.checkpoints import catalogue, files, pretrained, store, transfer
from hybridzoo.checkpoints.catalogue import Card
from hybridzoo.checkpoints.reading import CheckpointError
from hybridzoo.checkpoints.transfer import DownloadError, Policy

NAME = "efficientvit_msra_m0"
CARD = store.find(NAME)  # its address ends in a name of its own, which timm's cache keeps
HUB_NAME = "fastervit_0"


def published(factor: float = 1.0) -> dict[str, Tensor]:
    """A state dict of the authors' names and shapes."""
    state = goldens.published_state("efficientvit_msra", "efficientvit_m0")
    return {key: (factor * value).float() if value.is_floating_point() else value for key, value in state.items()}


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


STATE, OTHER = published(), published(1.5)
CONTENT = saved({"model": STATE})
FIRST_CONV = "stem.conv1.conv.weight"
PUBLISHED_FIRST_CONV = "patch_embed.0.c.weight"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no memory of other tests; the checkpoints' folder of PyTorch's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
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


def with_card(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Card:
    """The card, changed, in place of the published one."""
    card = dataclasses.replace(CARD, **changes)
    every = tuple(card if other.name == CARD.name else other for other in catalogue._all_cards())
    monkeypatch.setattr(catalogue, "_all_cards", lambda: every)
    return card


def left(home: Path) -> list[str]:
    return sorted(p.name for p in home.iterdir() if p.name != ".locks")


def is_loaded(model: nn.Module, state: dict[str, Tensor] = STATE) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in checkpoints.convert(state, NAME).items())


# Download, record, cache


def test_a_download_is_recorded_and_asked_for_once(server: Server, home: Path) -> None:
    assert store.cached(CARD) is None
    path = checkpoints.download(NAME)
    assert path == home / "efficientvit_m0.pth" == store.cached(CARD)
    assert path.read_bytes() == CONTENT
    assert left(home) == ["efficientvit_m0.pth", "efficientvit_m0.pth.json"]
    record = store.record_of(CARD)
    assert record["sha256"] == files.hash_of(path)
    assert (record["name"], record["url"], record["size"]) == (CARD.name, CARD.url, len(CONTENT))
    assert checkpoints.download(CARD.name) == path
    assert len(server.requests) == 1


def test_another_cache_folder(server: Server, home: Path, tmp_path: Path) -> None:
    assert checkpoints.download(NAME, cache_dir=tmp_path / "other") == tmp_path / "other" / "efficientvit_m0.pth"
    assert not home.exists()
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "other")
    assert len(server.requests) == 1


def test_what_timm_downloaded_is_used_and_the_other_way_round(server: Server, home: Path) -> None:
    home.mkdir(parents=True)
    (home / "efficientvit_m0.pth").write_bytes(CONTENT)
    assert is_loaded(timm.create_model(NAME, pretrained=True))
    assert server.requests == []
    assert store.record_of(CARD)["sha256"] == files.hash_of(home / "efficientvit_m0.pth")


def test_a_file_that_changed_is_refused(server: Server, home: Path) -> None:
    path = checkpoints.download(NAME)
    path.write_bytes(saved({"model": OTHER}))
    with pytest.raises(
        DownloadError, match=r"efficientvit_m0\.pth: has SHA-256 \w+, not \w+ as when it first came, 20"
    ) as caught:
        timm.create_model(NAME, pretrained=True)
    assert f"delete it to download it again; if the change is right, delete {path}.json" in str(caught.value)
    path.unlink()
    assert is_loaded(timm.create_model(NAME, pretrained=True))


def test_a_server_with_another_file_than_the_first_time_is_refused(server: Server, home: Path) -> None:
    checkpoints.download(NAME).unlink()
    server.files = dict.fromkeys(server.files, saved({"model": OTHER}))
    with pytest.raises(DownloadError, match=r"came with SHA-256 .*efficientvit_m0\.pth\.json"):
        checkpoints.download(NAME)
    assert store.cached(CARD) is None


def test_the_cards_hash_is_the_law(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"came with SHA-256 \w+, expected 0{64}; it was thrown away"):
        checkpoints.download(NAME)
    assert left(home) == []
    (home / "efficientvit_m0.pth").write_bytes(CONTENT)
    with pytest.raises(DownloadError, match=r"not 0{64} as its card says; delete it to download it again$"):
        checkpoints.download(NAME)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Answer(status=404), "404 .*nothing is there"),
        (Answer(status=403), "403 .*does not give it"),
        (Answer(status=503), "answers 503"),
        (Answer(status=0), "the connection was cut"),
        (Answer(cut=100), r"cut after 100 of \d"),
        (Answer(body=b"<html>sign in</html>", headers={"Content-Type": "text/html"}), "web page, not to weights"),
    ],
    ids=["404", "403", "503", "no answer", "cut", "page"],
)
def test_what_cannot_be_had_says_what_to_do(server: Server, home: Path, fault: Answer, says: str) -> None:
    server.always = fault
    server.ranges = False
    with pytest.raises(DownloadError, match=says) as caught:
        timm.create_model(NAME, pretrained=True)
    text = str(caught.value)
    assert text.startswith(f"{CARD.name}: ")
    assert "give a file that you have: --weights FILE, or pretrained_cfg_overlay=dict(file=...)" in text
    assert "\n" not in text
    assert store.cached(CARD) is None
    server.always = Answer()
    assert is_loaded(timm.create_model(NAME, pretrained=True))


def test_offline_the_cache_answers(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="is not in the cache, and HF_HUB_OFFLINE forbids"):
        checkpoints.download(NAME)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = checkpoints.download(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checkpoints.download(NAME) == path
    assert len(server.requests) == 1


def test_without_network_the_cache_answers(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.download(NAME)
    monkeypatch.setenv("HYBRIDZOO_MIRROR", "http://127.0.0.1:9")
    assert checkpoints.download(NAME) == path
    path.unlink()
    with pytest.raises(DownloadError, match="no connection"):
        checkpoints.download(NAME)


def test_a_read_only_cache_still_answers(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere: the refusal is injected."""

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    home.mkdir(parents=True)
    (home / "efficientvit_m0.pth").write_bytes(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_note", refuse)
        assert is_loaded(timm.create_model(NAME, pretrained=True))
    assert left(home) == ["efficientvit_m0.pth"]
    (home / "efficientvit_m0.pth").unlink()
    monkeypatch.setattr(files, "write_note", refuse)
    with pytest.raises(DownloadError, match=r"checkpoints: cannot be written \(Permission denied\); set TORCH_HOME"):
        checkpoints.download(NAME)


@pytest.mark.parametrize(("status", "says"), [("none", "published no weights"), ("dead", "the authors' link is dead")])
def test_dead_links_are_not_tried(server: Server, monkeypatch: pytest.MonkeyPatch, status: Any, says: str) -> None:
    with_card(monkeypatch, status=status)
    with pytest.raises(DownloadError, match=f"{says}.*give a file that you have"):
        timm.create_model(NAME, pretrained=True)
    assert server.requests == []


def test_a_doubtful_links_notes_are_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, status="doubtful", notes="Moved in 2024.")
    server.always = Answer(status=404)
    with pytest.raises(DownloadError, match=r"about this link: Moved in 2024\."):
        checkpoints.download(NAME)


def test_models_without_weights_say_so() -> None:
    with pytest.raises(DownloadError, match="patnet_t0: its authors published no weights; give a file"):
        timm.create_model("patnet_t0", pretrained=True)


def test_misspelled_names_get_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"name: no weights are known as 'efficientvit_mrsa_m0'; did you mean efficientvit_msra_m0"
    ):
        checkpoints.download("efficientvit_mrsa_m0")


# Names of files


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://example.com/a/net.pth", "net.pth"),
        ("https://example.com/a/net.pth.tar?download=1#top", "net.pth.tar"),
        ("https://example.com/a/pytorch_model.bin", f"{CARD.name}.bin"),
        ("https://example.com/f/57e090/?dl=1", f"{CARD.name}.pth"),
        ("https://example.com/x/..", f"{CARD.name}.pth"),
        ("https://example.com/x/..%2f..%2f..%2fetc%2fcron.pth", "cron.pth"),
        ("https://example.com/x/..%5C..%5Cnet.pth", "net.pth"),
        ("https://example.com/x/%2e%2e.pth", "pth"),
        ("https://example.com/x/a%00b;rm%20-rf.pth", "a_b_rm_-rf.pth"),
        ("https://example.com/x/" + "n" * 500 + ".pth", "n" * 196 + ".pth"),
        ("https://example.com/?file=../../net.pth", f"{CARD.name}.pth"),
    ],
)
def test_names_stay_in_the_folder(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, url: str, name: str
) -> None:
    card = with_card(monkeypatch, url=url)
    assert store.file_name(card) == name
    server.always = Answer(body=CONTENT)
    path = checkpoints.download(NAME)
    assert path.parent == home
    assert left(home) == sorted([name, f"{name}.json"])


def test_no_two_cards_share_a_file() -> None:
    names = [store.file_name(card) for card in checkpoints.cards(task=None) if card.url]
    assert len(set(map(str.lower, names))) == len(names)


def test_a_link_in_the_cache_is_read_but_never_written_through(server: Server, home: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared.pth"
    shared.write_bytes(CONTENT)
    home.mkdir(parents=True)
    (home / "efficientvit_m0.pth").symlink_to(shared)
    assert is_loaded(timm.create_model(NAME, pretrained=True))
    shared.unlink()  # now the link leads nowhere
    checkpoints.download(NAME)
    assert not shared.exists()
    assert (home / "efficientvit_m0.pth").read_bytes() == CONTENT


# timm's ways


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE},
        {"model": STATE, "model_ema": OTHER, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        {"state_dict_ema": OTHER, "model": {f"module.{key}": value for key, value in STATE.items()}},
    ],
    ids=["plain", "options and a moving average", "data parallel"],
)
def test_pretrained_takes_what_the_card_names(server: Server, home: Path, content: Any) -> None:
    """timm alone would take the moving average, to which the published score does not belong."""
    server.always = Answer(body=saved(content))
    assert is_loaded(timm.create_model(NAME, pretrained=True))
    assert is_loaded(timm.create_model(CARD.name, pretrained=True))


def test_a_malicious_file_is_refused(server: Server, home: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    server.always = Answer(body=pickle.dumps({"model": STATE, "args": Bomb()}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        timm.create_model(NAME, pretrained=True)
    assert not (tmp_path / "exploded").exists()


def test_other_classes(server: Server) -> None:
    model = timm.create_model(NAME, pretrained=True, num_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert torch.equal(model.state_dict()[FIRST_CONV], STATE[PUBLISHED_FIRST_CONV])
    headless = timm.create_model(NAME, pretrained=True, num_classes=0)
    assert torch.equal(headless.state_dict()[FIRST_CONV], STATE[PUBLISHED_FIRST_CONV])


def test_other_channels(server: Server) -> None:
    grey = timm.create_model(NAME, pretrained=True, in_chans=1).state_dict()[FIRST_CONV]
    torch.testing.assert_close(grey, STATE[PUBLISHED_FIRST_CONV].sum(1, keepdim=True))
    assert timm.create_model(NAME, pretrained=True, in_chans=5).state_dict()[FIRST_CONV].shape[1] == 5


def test_feature_maps(server: Server) -> None:
    features = timm.create_model(NAME, pretrained=True, features_only=True, out_indices=(0, 2)).eval()
    plain = timm.create_model(NAME, pretrained=True).eval()
    x = torch.randn(1, 3, 96, 64)
    expected = plain.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for got, want in zip(features(x), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert "state_dict" not in features.pretrained_cfg


def test_the_configuration_stays_as_it_was(server: Server) -> None:
    cfg = timm.create_model(NAME).pretrained_cfg
    assert timm.create_model(NAME, pretrained=True).pretrained_cfg == cfg


def test_a_local_file_instead(server: Server, tmp_path: Path) -> None:
    """A published one, with what timm itself would refuse or take wrongly; then one of our own."""
    file = tmp_path / "mine.pth"
    content = {"model": STATE, "model_ema": OTHER, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, file)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert is_loaded(model)
    ours = tmp_path / "ours.pth"
    torch.save({"state_dict": model.state_dict()}, ours)
    assert is_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(ours))))
    torch.save(model.state_dict(), ours)
    assert is_loaded(timm.create_model(NAME, checkpoint_path=str(ours)))
    assert is_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(state_dict=STATE)))
    assert server.requests == []
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file="nowhere.pth"))


def test_a_local_file_with_its_own_classes(tmp_path: Path) -> None:
    torch.save(timm.create_model(NAME, num_classes=5).state_dict(), tmp_path / "five.pth")
    overlay = dict(file=str(tmp_path / "five.pth"), num_classes=5)
    assert timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).num_classes == 5


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"features_only": True}, {"num_classes": 0}], ids=str)
def test_another_networks_file_is_never_half_loaded(server: Server, arguments: dict[str, Any]) -> None:
    """timm forgives missing and unexpected tensors where the classifier differs."""
    lacking = {key: value for key, value in STATE.items() if not key.startswith("blocks3.3.")}
    server.always = Answer(body=saved({"model": {**lacking, "strange": torch.zeros(1)}}))
    with pytest.raises(
        CheckpointError,
        match=r"does not fit efficientvit_msra_m0; \d+ missing, first stages\.2\..*1 unexpected, first strange",
    ):
        timm.create_model(NAME, pretrained=True, **arguments)


@pytest.mark.parametrize(
    ("model", "arguments", "resized"),
    [
        ("agent_deit_tiny", {"img_size": 320}, 1 + 12 * 4),
        ("agent_pvt_tiny", {"img_size": 256}, 4 + 8 * 4),
        ("inline_deit_tiny", {"img_size": 320}, 1),
        ("maxvit_tiny", {"img_size": 384}, 22),
        ("agent_swin_tiny", {"img_size": 384}, 4 * 10 + 2),
        ("nat_mini", {"kernel_size": 11}, 18),
        (NAME, {"windows": (8, 8, 8)}, 6),
    ],
    ids=str,
)
def test_tables_of_another_size_are_resized(
    tmp_path: Path, model: str, arguments: dict[str, Any], resized: int
) -> None:
    before = timm.create_model(model).state_dict()
    ramp = {key: torch.arange(float(value.numel())).reshape(value.shape) for key, value in before.items()}
    torch.save(
        {key: ramp[key] if "pos_embed" in key or "bias" in key else before[key] for key in before}, tmp_path / "w.pth"
    )
    overlay = dict(file=str(tmp_path / "w.pth"))
    after = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).state_dict()
    changed = [key for key, value in after.items() if value.shape != before[key].shape]
    assert len(changed) == resized
    for key in changed:
        if key.endswith("h_bias"):  # rows of a ramp stay a ramp, but at the ends, which are held
            old, new = ramp[key], after[key]
            centre = (torch.arange(new.shape[-1]) + 0.5) * old.shape[-1] / new.shape[-1] - 0.5
            torch.testing.assert_close(new, old[..., :1] + centre.clamp(0, old.shape[-1] - 1))
        if key.endswith("attn.bias.table") and model.startswith("agent_swin"):  # bicubic, as published for 384 px
            shape = after[key].shape[-2:]
            expected = torch.nn.functional.interpolate(ramp[key][None], shape, mode="bicubic")[0]
            torch.testing.assert_close(after[key], expected)
        if key == "stem.pos_embed" and model == "agent_deit_tiny":
            assert torch.equal(after[key][:, 0], ramp[key][:, 0]), "the class token's stays"
            torch.testing.assert_close(after[key][:, 1:].mean(), ramp[key][:, 1:].mean())


@pytest.mark.parametrize(
    ("model", "licence", "says"),
    [
        ("fastervit_0", None, "non-commercial use only"),
        ("agent_deit_tiny", None, "state no licence"),
        (NAME, None, ""),
        (NAME, "CC-BY-NC-SA-4.0", "non-commercial"),
        (NAME, "", "state no licence"),
    ],
)
def test_licences_that_bind(model: str, licence: str | None, says: str) -> None:
    card = store.find(model)
    notice = store.licence_notice(card if licence is None else dataclasses.replace(card, licence=licence))
    assert (says in notice) if says else not notice


def test_a_licence_is_mentioned_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_card(monkeypatch, licence="NON-COMMERCIAL")
    caplog.set_level(logging.INFO)
    for _ in range(2):
        timm.create_model(NAME, pretrained=True)
    assert sum("non-commercial use only" in record.message for record in caplog.records) == 1


# The Hugging Face hub


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Speaks as the hub does; has a file under `CARD`'s address there."""
    with Server().running() as running:
        running.hub = True
        running.files["/timm/test/resolve/main/pytorch_model.bin"] = CONTENT
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HYBRIDZOO_MIRROR", raising=False)
        with_card(monkeypatch, url="https://huggingface.co/timm/test/resolve/main/pytorch_model.bin")
        yield running


def test_files_of_the_hub_come_through_its_cache(hub: Server, home: Path, tmp_path: Path) -> None:
    path = checkpoints.download(NAME, progress=False)
    assert path.is_relative_to(tmp_path / "hub" / "models--timm--test")
    assert path.read_bytes() == CONTENT
    assert left(home) == [f"{CARD.name}.bin.json"]
    asked = len(hub.requests)
    assert checkpoints.download(NAME) == path
    assert len(hub.requests) == asked, "what is here is not asked for"
    assert checkpoints.verify(path).ok


def test_the_hub_offline(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.download(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert checkpoints.download(NAME) == path


def test_the_hubs_faults_are_one_line(hub: Server) -> None:
    hub.files.clear()
    with pytest.raises(DownloadError, match=r"huggingface\.co/timm/test.*404.*give a file that you have") as caught:
        checkpoints.download(NAME)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_hub_that_is_not_what_its_name_says(hub: Server) -> None:
    path = checkpoints.download(NAME)
    path.resolve().write_bytes(b"something else")
    store._record(store.find(NAME), None).unlink()
    with pytest.raises(DownloadError, match="has SHA-256"):
        checkpoints.download(NAME)


def test_a_mirror_of_everything_has_the_hubs_files_too(
    hub: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.hub = False
    monkeypatch.setenv("HYBRIDZOO_MIRROR", f"{hub.url}/zoo/")
    hub.files["/zoo/timm/test/resolve/main/pytorch_model.bin"] = CONTENT
    assert checkpoints.download(NAME) == home / f"{CARD.name}.bin"


# Verification


def test_a_good_file_is_good(server: Server) -> None:
    path = checkpoints.download(NAME)
    found = checkpoints.verify(path)
    assert found.ok
    assert (found.name, found.known, found.size) == (CARD.name, "record", len(CONTENT))
    model = timm.create_model(NAME)
    assert found.values == sum(value.numel() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "head.l.bias"}, "1 missing"),
        (lambda s: {**s, "strange": torch.zeros(1)}, "1 unexpected: strange"),
        (lambda s: {**s, PUBLISHED_FIRST_CONV: torch.zeros(8, 3, 5, 5)}, "1 of another shape"),
        (
            lambda s: {**s, PUBLISHED_FIRST_CONV: torch.full_like(s[PUBLISHED_FIRST_CONV], torch.nan)},
            "1 tensors are not finite",
        ),
    ],
    ids=["missing", "unexpected", "shape", "nan"],
)
def test_every_defect_is_found(tmp_path: Path, change: Any, says: str) -> None:
    torch.save({"model": change(STATE)}, tmp_path / "w.pth")
    found = checkpoints.verify(tmp_path / "w.pth", NAME)
    assert not found.ok
    assert len(found.problems) == 1
    assert says in found.problems[0]


def test_a_changed_and_a_cut_file(server: Server) -> None:
    path = checkpoints.download(NAME)
    path.write_bytes(CONTENT[:-1000])
    problems = checkpoints.verify(path).problems
    assert len(problems) == 2
    assert "SHA-256" in problems[0]
    assert "cut short" in problems[1]


def test_a_file_of_no_name(tmp_path: Path, home: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="say what it should be"):
        checkpoints.verify(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoints.verify(tmp_path / "nowhere.pth", NAME)
    (tmp_path / "w.pth").rename(tmp_path / "efficientvit_m0.pth")
    assert checkpoints.verify(tmp_path / "efficientvit_m0.pth").name == CARD.name


def test_a_converted_file_is_verified_by_its_note(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, sha256="0" * 64)
    torch.save({"model": STATE}, tmp_path / "w.pth")
    converted = checkpoints.convert_file(tmp_path / "w.pth", NAME)
    assert checkpoints.verify(converted).ok
    converted.write_bytes(converted.read_bytes() + b" ")
    assert not checkpoints.verify(converted).ok
