"""`hybridzoo checkpoints …` as a person meets it."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import goldens
import pytest
import timm
import torch
from http_server import Answer, Server
from typer.main import get_command

from hybridzoo.__main__ import main
from hybridzoo.checkpoints import catalogue, store, transfer
from hybridzoo.train import checkpoint_verbs

CARD = store.find("efficientvit_msra_m0")
VERBS = sorted(get_command(checkpoint_verbs.app).commands)  # type: ignore[attr-defined]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `hybridzoo checkpoints` with these words -> (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(["checkpoints", *argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def content() -> bytes:
    state = goldens.published_state("efficientvit_msra", "efficientvit_m0")
    file = io.BytesIO()
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": half}, file)
    return file.getvalue()


@pytest.fixture
def server(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Empty caches, an empty working directory, and every address led to a server that has one file under all names."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(transfer, "POLICY", transfer.Policy(attempts=2, sleep=lambda seconds: None))
    with Server().running() as running:
        running.always = Answer(body=content)
        monkeypatch.setenv("HYBRIDZOO_MIRROR", running.url)
        yield running


def test_list_shows_links_licences_and_cached_files(call: Call, server: Server) -> None:
    code, out, err = call("list", "efficientvit_msra")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert {f"efficientvit_msra_m{size}.r224_in1k" for size in range(6)} <= lines.keys()
    assert lines[CARD.name] == [CARD.name, "doubtful", "-", "-", "MIT"]
    store.download(CARD.name)
    size = store.cached(CARD).stat().st_size / 1e6
    code, out, err = call("list", "efficientvit_msra_m?.*")
    lines = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert lines[CARD.name] == [CARD.name, "doubtful", f"{size:.1f}", "MB", "yes", "MIT"]
    assert lines["efficientvit_msra_m1.r224_in1k"][3] == "-"


def test_list_has_every_card(call: Call, server: Server) -> None:
    _, out, _ = call("list")
    assert [line.split()[0] for line in out.splitlines()[2:]] == [card.name for card in catalogue.cards(task=None)]


def test_download_prints_the_path_and_the_licence(call: Call, server: Server) -> None:
    code, out, err = call("download", CARD.name, "agent_deit_tiny")
    assert code == 0
    first, second = map(Path, out.split())
    assert first == store.cached(CARD)
    assert second.is_file()
    assert err.startswith("note: agent_deit_tiny.in1k: the authors state no licence for these weights")
    assert err.count("\n") == 1


def test_verify_by_name_and_by_file(call: Call, server: Server, tmp_path: Path) -> None:
    store.download(CARD.name)
    code, out, err = call("verify", "efficientvit_msra_m0")
    assert (code, err) == (0, "")
    facts = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines() if line.strip())
    assert facts["weights"] == CARD.name
    assert facts["verdict"] == "good"
    assert facts["known"] == "as at its first download"
    copy = tmp_path / "copy.pth"
    copy.write_bytes(store.cached(CARD).read_bytes())
    assert call("verify", str(copy), "--model", CARD.name)[0] == 0
    code, out, err = call("verify", str(copy), "--model", "efficientvit_msra_m1")
    assert code == 2
    assert "verdict" in out
    assert re.fullmatch(r"error: .*copy\.pth: .*does not fit efficientvit_msra_m1.*\n", err)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["list", "efficientvit_mrsa"], ["efficientvit_mrsa", "did you mean"]),
        (["download"], ["NAME", "hybridzoo checkpoints download --help"]),
        (["download", "efficientvit_msra_m9"], ["efficientvit_msra_m9", "efficientvit_msra_m5"]),
        (["download", "patnet_t0"], ["patnet_t0", "published no weights", "--weights FILE"]),
        (["verify", "efficientvit_msra_m0"], ["is not here", "hybridzoo checkpoints download efficientvit_msra_m0"]),
        (["verify", "nowhere.pth"], ["nowhere.pth", "no such file"]),
        (["verify", "nowhere/efficientvit_msra_m0"], ["no such file"]),
        (["verify", "efficientvit_mrsa_m0"], ["did you mean"]),
        (["convert", "nowhere.pth", "--model", "dinat_mini"], ["nowhere.pth", "no such file"]),
        (["convert", "nowhere.pth"], ["--model", "hybridzoo checkpoints convert --help"]),
        (["dwonload", "biformer_tiny"], ["dwonload", "download"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_code_2(call: Call, server: Server, argv: list[str], parts: list[str]) -> None:
    code, out, err = call(*argv)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    for part in parts:
        assert part in err
    assert not list(Path().iterdir()), "nothing may be left behind"
    assert server.requests == []


def test_a_failed_download_is_one_line(call: Call, server: Server) -> None:
    server.always = Answer(status=404)
    code, out, err = call("download", CARD.name)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: efficientvit_msra_m0\.r224_in1k: .*404.*--weights FILE.*\n", err)


def _examples(call: Call, verb: str) -> list[str]:
    code, out, _ = call(verb, "--help")
    assert code == 0
    return [line.strip().removeprefix("$ ") for line in out.splitlines() if line.strip().startswith("$ hybridzoo ")]


def test_the_examples_of_every_verb_run(call: Call, server: Server) -> None:
    """`download` comes before `verify`, which looks at what it brought; the files to convert are put here."""
    torch.save({"model": timm.create_model("biformer_tiny").state_dict()}, "biformer_tiny_best.pth")
    torch.save({"state_dict": timm.create_model("dinat_mini").state_dict()}, "final.pth")
    assert set(VERBS) == {"list", "download", "verify", "convert"}
    for verb in ["list", "download", "verify", "convert"]:
        examples = _examples(call, verb)
        assert examples, f"{verb} --help has no example"
        for example in examples:
            argv = shlex.split(example)[1:]
            assert argv[:2] == ["checkpoints", verb]
            code, out, err = call(*argv[1:])
            assert code == 0, f"{example}: {err}"
            assert out.strip()
    written = {path.name for path in Path().glob("*.safetensors")}
    assert written == {"biformer_tiny_best.hybridzoo.safetensors", "final.published.safetensors"}


def test_help_fits_eighty_columns(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for verb in VERBS:
        _, out, _ = call(verb, "--help")
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out
    assert call()[1].strip() == call("--help")[1].strip(), "without a verb the help is shown"


def test_a_changed_file_is_reported(call: Call, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store.download(CARD.name)
    card = dataclasses.replace(CARD, sha256="0" * 64)
    every = tuple(card if other.name == card.name else other for other in catalogue._all_cards())
    monkeypatch.setattr(catalogue, "_all_cards", lambda: every)
    code, out, err = call("verify", CARD.name)
    assert code == 2
    assert "as the card says" not in err
    assert "1 wrong" in out
    assert re.fullmatch(r"error: .*SHA-256 is \w+, its card says 0{64}\n", err)
