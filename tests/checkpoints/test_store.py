"""Published files from a server of ours into the cache, under every fault, and checked ever after."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from http_server import Answer, Server
from published_files import CARD, CONTENT, NAME, OTHER, STATE, is_loaded, left, saved, with_card

from hybridzoo import checkpoints
from hybridzoo.checkpoints import files, store
from hybridzoo.checkpoints.transfer import DownloadError


def test_a_file_is_downloaded_and_recorded_once(server: Server, home: Path) -> None:
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
        DownloadError, match=r"efficientvit_m0\.pth: has SHA-256 \w+, not \w+ as at its first download, 20"
    ) as caught:
        timm.create_model(NAME, pretrained=True)
    assert f"delete it to download it again; if the change is intended, delete {path}.json" in str(caught.value)
    path.unlink()
    assert is_loaded(timm.create_model(NAME, pretrained=True))


def test_a_server_with_another_file_than_the_first_time_is_refused(server: Server, home: Path) -> None:
    checkpoints.download(NAME).unlink()
    server.files = dict.fromkeys(server.files, saved({"model": OTHER}))
    with pytest.raises(DownloadError, match=r"has SHA-256 .*efficientvit_m0\.pth\.json"):
        checkpoints.download(NAME)
    assert store.cached(CARD) is None


def test_a_file_must_have_the_hash_of_its_card(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, sha256="0" * 64)
    with pytest.raises(DownloadError, match=r"has SHA-256 \w+, expected 0{64}; it was discarded"):
        checkpoints.download(NAME)
    assert left(home) == []
    (home / "efficientvit_m0.pth").write_bytes(CONTENT)
    with pytest.raises(DownloadError, match=r"not 0{64} as on its card; delete it to download it again$"):
        checkpoints.download(NAME)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Answer(status=404), "404 .*there is no such file"),
        (Answer(status=403), "403 .*access is forbidden"),
        (Answer(status=503), "answers 503"),
        (Answer(status=0), "the connection was cut"),
        (Answer(cut=100), r"cut after 100 of \d"),
        (Answer(body=b"<html>sign in</html>", headers={"Content-Type": "text/html"}), "web page, not to weights"),
    ],
    ids=["404", "403", "503", "no answer", "cut", "page"],
)
def test_failed_downloads_say_what_to_do(server: Server, home: Path, fault: Answer, says: str) -> None:
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


LEGACY = io.BytesIO()
torch.save({"model": STATE}, LEGACY, _use_new_zipfile_serialization=False)
PACKED = gzip.compress(CONTENT, compresslevel=0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer(body=b'{"error": "denied"}'), "it is JSON, not weights: '{"),
        (Answer(body=b"Rate limit exceeded"), "it is text, not weights: 'Rate limit exceeded'"),
        (Answer(body=b"<!-- saved --><html><body>log in"), "web page"),
        (Answer(body=b"\xef\xbb\xbf<!DOCTYPE html><html>"), "web page"),
        (Answer(body=PACKED, headers={"Content-Encoding": "gzip"}), "is sent with encoding gzip"),
        (Answer(body=PACKED), "it is compressed with gzip"),
        (Answer(cut=len(CONTENT) // 2, headers={"Content-Length": ""}), "cut short"),
        (Answer(headers={"Content-Length": str(len(CONTENT) - 100)}), "cut short"),
        (
            Answer(body=LEGACY.getvalue()[:-9000], headers={"Content-Length": ""}),
            "discarded: .*(?:EOF|byte)",
        ),
    ],
    ids=["JSON", "text", "comment", "mark", "packed", "gzip", "cut", "short length", "old pickle cut"],
)
def test_files_that_are_not_weights_are_not_kept(server: Server, home: Path, answer: Answer, says: str) -> None:
    server.always = answer
    with pytest.raises(DownloadError, match=says) as caught:
        timm.create_model(NAME, pretrained=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert left(home) == []
    server.always = Answer()
    assert is_loaded(timm.create_model(NAME, pretrained=True))


def test_an_old_pickle_is_downloaded_and_kept(server: Server, home: Path) -> None:
    server.always = Answer(body=LEGACY.getvalue())
    assert is_loaded(timm.create_model(NAME, pretrained=True))


def test_a_cached_file_that_is_not_weights_is_not_recorded(server: Server, home: Path) -> None:
    home.mkdir(parents=True)
    (home / "efficientvit_m0.pth").write_bytes(CONTENT[:-1000])
    with pytest.raises(DownloadError, match=r"is not a complete file of weights \(it is cut short.*delete it"):
        checkpoints.download(NAME)
    assert left(home) == ["efficientvit_m0.pth"]


RECORDS = ['{"sha256": "abc', "", "[]", '{"name": "x"}', '{"sha256": null}', '{"sha256": "XYZ"}', None]


@pytest.mark.parametrize("record", RECORDS)
def test_an_unreadable_record_is_not_replaced(server: Server, home: Path, record: str | None) -> None:
    path = checkpoints.download(NAME)
    path.write_bytes(saved({"model": OTHER}))
    place = path.with_name(f"{path.name}.json")
    place.unlink()
    if record is None:
        place.mkdir()
    else:
        place.write_text(record)
    with pytest.raises(DownloadError, match=r"efficientvit_m0\.pth\.json: is not a readable record of a file's hash"):
        checkpoints.download(NAME)
    path.unlink()
    with pytest.raises(DownloadError, match=r"is not a readable record"):  # nor is another one downloaded
        checkpoints.download(NAME)
    assert len(server.requests) == 1


def test_a_tilde_and_an_empty_folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    assert checkpoints.download(NAME, cache_dir="~/zoo").parent == tmp_path / "me" / "zoo"
    assert not Path("~").exists()
    with pytest.raises(ValueError, match="cache_dir: is empty"):
        checkpoints.download(NAME, cache_dir="")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(
        DownloadError, match=r"taken: cannot be written .*; choose another folder by TORCH_HOME or cache_dir; give"
    ):
        checkpoints.download(NAME, cache_dir=tmp_path / "taken")


@pytest.mark.parametrize("mirror", ["file:///tmp", "127.0.0.1:80", "http://", "http://[::1", "http://exa mple/x"])
def test_an_invalid_mirror_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, mirror: str) -> None:
    monkeypatch.setenv("HYBRIDZOO_MIRROR", mirror)
    with pytest.raises(DownloadError, match=r"HYBRIDZOO_MIRROR is '.*', which is not an http or https address"):
        checkpoints.download(NAME)


def test_the_cache_works_offline(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="is not in the cache, and HF_HUB_OFFLINE forbids"):
        checkpoints.download(NAME)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = checkpoints.download(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checkpoints.download(NAME) == path
    assert len(server.requests) == 1


def test_the_cache_works_without_a_network(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.download(NAME)
    monkeypatch.setenv("HYBRIDZOO_MIRROR", "http://127.0.0.1:9")
    assert checkpoints.download(NAME) == path
    path.unlink()
    with pytest.raises(DownloadError, match="no connection"):
        checkpoints.download(NAME)


def test_a_read_only_cache_works(server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(
        DownloadError, match=r"checkpoints: cannot be written \(Permission denied\); choose another folder"
    ):
        checkpoints.download(NAME)


@pytest.mark.parametrize(("status", "says"), [("none", "published no weights"), ("dead", "the authors' link is dead")])
def test_dead_links_are_not_tried(server: Server, monkeypatch: pytest.MonkeyPatch, status: Any, says: str) -> None:
    with_card(monkeypatch, status=status)
    with pytest.raises(DownloadError, match=f"{says}.*give a file that you have"):
        timm.create_model(NAME, pretrained=True)
    assert server.requests == []


def test_a_failed_download_reports_a_doubtful_link(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with_card(monkeypatch, status="doubtful", notes="long " * 100)
    server.always = Answer(status=404)
    with pytest.raises(DownloadError, match=r"the link on its card has never been tested successfully$") as caught:
        checkpoints.download(NAME)
    assert "long" not in str(caught.value)
    server.always = Answer(status=503)
    with pytest.raises(DownloadError, match=r"pretrained_cfg_overlay=dict\(file=...\)$"):
        checkpoints.download(NAME)


def test_models_without_weights_say_so() -> None:
    with pytest.raises(DownloadError, match="patnet_t0: its authors published no weights; give a file"):
        timm.create_model("patnet_t0", pretrained=True)


def test_misspelled_names_suggest_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"name: no weights are known as 'efficientvit_mrsa_m0'; did you mean efficientvit_msra_m0"
    ):
        checkpoints.download("efficientvit_mrsa_m0")
    for nothing in ("", None):
        with pytest.raises(ValueError, match=r"name: .* is not a name of weights"):
            checkpoints.download(nothing)


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


def test_a_link_in_the_cache_is_read_but_never_written(server: Server, home: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared.pth"
    shared.write_bytes(CONTENT)
    home.mkdir(parents=True)
    (home / "efficientvit_m0.pth").symlink_to(shared)
    assert is_loaded(timm.create_model(NAME, pretrained=True))
    shared.unlink()  # now the link leads nowhere
    checkpoints.download(NAME)
    assert not shared.exists()
    assert (home / "efficientvit_m0.pth").read_bytes() == CONTENT
