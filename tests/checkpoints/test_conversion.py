"""Conversions between the authors' layout, timm's and ours keep every bit; weights that do not fit are refused."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import goldens
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import hybridzoo
from hybridzoo.checkpoints import convert, convert_file
from hybridzoo.checkpoints.keymaps import publish
from hybridzoo.checkpoints.reading import CheckpointError

# Small ones, as files; `EVERY` has the other families' names and shapes. Agent's projections are split.
PUBLISHED = {
    "agent/agent_pvt_tiny": "agent_pvt_tiny",
    "efficientvit_mit/efficientvit_b0": "efficientvit_mit_b0",
    "efficientvit_msra/efficientvit_m0": "efficientvit_msra_m0",
}
BY_THEMSELVES = ("overlock",)  # families whose own tests go both ways
# Every fixture of a classifier in the authors' own layout; networks that only tests have made are left out
EVERY = [
    f"{family}/{name}"
    for family in sorted(path.name for path in goldens.FOLDER.iterdir() if path.name not in ("ops", *BY_THEMSELVES))
    for name in goldens.names(family, numeric=False)
    if not re.search(r"_(dense|seg|det|timm|dpconv)|\d+x\d+$|damped", name) or name.endswith("11x11")
]
# What published code computes for itself (PATNet's: of its dynamic convolution), and FasterViT's second name of one
# convolution
CONSTANTS = (
    "RoPE.angle",
    "attn_mask",
    "attention_bias_idxs",
    "relative_position_index",
    "relative_coords_table",
    "relative_bias",
    "global_tokenizer.pos_embed.weight",
    "global_tokenizer.pos_embed.bias",
    "spatial_mixing.I",
    "spatial_mixing.one",
    "spatial_mixing.one_channel",
    "spatial_mixing.c_div",
)


def published(fixture: str) -> dict[str, torch.Tensor]:
    """The fixture's names and shapes with values that no two tensors share."""
    names = goldens.manifest(*fixture.split("/"))["state_dict"]
    return {
        key: torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
        for seed, (key, shape, dtype) in enumerate(names)
    }


def empty(model: str, **kwargs: int) -> torch.nn.Module:
    with torch.device("meta"):  # shapes without memory or time
        return timm.create_model(model, **kwargs)


def filled(model: str) -> dict[str, torch.Tensor]:
    """A state dict of the model's names and shapes, quicker than the model's own initialisation."""
    state = empty(model).state_dict()
    return {key: torch.rand(value.shape).to(value.dtype) for key, value in state.items()}


def model_of(fixture: str) -> str:
    family, name = fixture.split("/")
    if family.startswith("efficientvit"):
        return family + "_" + name.split("_")[1]
    for part, ours in (("dat_pp_", "dat_plus_"), ("dat_p_", "dat_plain_")):
        name = name.replace(part, ours)
    return re.sub(r"^faster_vit_(\d)_.*", r"fastervit_\1", name)


@pytest.mark.parametrize("fixture", EVERY)
def test_every_published_layout_has_an_inverse(fixture: str) -> None:
    """Names, shapes and values; the values are counted, so that a permutation would be seen."""
    names = goldens.manifest(*fixture.split("/"))["state_dict"]
    if sum(math.prod(shape) for _, shape, _ in names) > 4e7:  # large ones without values
        state = {key: torch.empty(shape, device="meta") for key, shape, _ in names}
    else:
        state = {key: torch.arange(math.prod(shape)).view(shape) for key, shape, _ in names}
    ours = convert(state, model_of(fixture))
    back = publish(ours, model_of(fixture))
    assert {key for key in state if not key.endswith(CONSTANTS)} <= back.keys() <= state.keys()
    for key, value in back.items():
        assert value.shape == state[key].shape, key
        assert value.is_meta or torch.equal(value, state[key]), key


@pytest.mark.parametrize("fixture", PUBLISHED)
def test_published_to_ours_and_back_is_bit_equal(fixture: str, tmp_path: Path) -> None:
    model, state = PUBLISHED[fixture], published(fixture)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    ours = convert_file(tmp_path / "theirs.pth", model)
    assert ours == tmp_path / "theirs.hybridzoo.safetensors"
    empty(model).load_state_dict(load_file(ours), strict=True, assign=True)
    back = load_file(convert_file(ours, model, to="published", out=tmp_path / "back.safetensors"))
    assert {key for key in state if not key.endswith(CONSTANTS)} <= back.keys() <= state.keys()
    for key, value in back.items():
        assert value.shape == state[key].shape
        if not key.endswith(CONSTANTS):
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ("model", "host"),
    [
        ("maxvit_tiny.tf_384_in1k", "maxvit_tiny_tf_384"),
        ("efficientvit_mit_b0", "efficientvit_b0"),
        ("efficientvit_msra_m0", "efficientvit_m0"),
    ],
)
def test_timms_weights_are_converted_and_back_without_changes(model: str, host: str, tmp_path: Path) -> None:
    theirs = filled(host)
    torch.save(theirs, tmp_path / "timm.bin")
    ours = convert_file(tmp_path / "timm.bin", model)
    empty(model).load_state_dict(load_file(ours), strict=True, assign=True)
    back = load_file(convert_file(ours, model, to="timm"))
    empty(host).load_state_dict(back, strict=True, assign=True)
    assert all(torch.equal(value, theirs[key]) for key, value in back.items())


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return timm.create_model("efficientvit_msra_m0", num_classes=3)


def test_our_training_checkpoints(network: torch.nn.Module, tmp_path: Path) -> None:
    """mmengine's, with an average; the run's config says which of the two `state_dict` is. The raw ones by default."""
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    other = {"steps": torch.tensor(3)} | {f"module.{key}": value + 1 for key, value in state.items()}
    for evaluate in ("ema", "raw"):
        cfg = f"custom_hooks = [dict(type='TimmEMAHook', evaluate='{evaluate}')]"
        content = {"state_dict": state, "ema_state_dict": other, "meta": {"cfg": cfg}, "optimizer": {}}
        torch.save(content, tmp_path / f"{evaluate}.pth")
    weight = network.state_dict()["head.fc.weight"]
    for name, ema, more in (("ema", True, 0), ("ema", False, 1), ("raw", False, 0), ("raw", True, 1)):
        out = convert_file(tmp_path / f"{name}.pth", "efficientvit_msra_m0", ema=ema, force=True)
        found, note = load_file(out), json.loads(Path(f"{out}.json").read_text())
        assert found.keys() == network.state_dict().keys()
        assert note["average"] is ema
        assert note["source"]["weights"] == ("ema_state_dict" if more else "state_dict")
        assert torch.equal(found["head.fc.weight"], weight + more), (name, ema)
    torch.save({"state_dict": state}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"none.pth: holds no moving average \(its keys: state_dict\)"):
        convert_file(tmp_path / "none.pth", "efficientvit_msra_m0", ema=True)


@pytest.mark.parametrize("prefix", ["backbone.model.", "backbone."])
def test_the_backbone_of_a_detector_is_converted(prefix: str, tmp_path: Path) -> None:
    """Ours, and DiNAT's published ones with a norm for every level."""
    state = published("dinat/dinat_mini") if prefix == "backbone." else filled("dinat_mini")
    trunk = {key: value for key, value in state.items() if not key.startswith(("norm.", "head."))}
    norms = "norm0." if prefix == "backbone." else "out_norms.0."
    detector = {prefix + key: value for key, value in trunk.items()}
    detector |= {
        f"backbone.{norms}weight": torch.ones(64),
        "neck.0.weight": torch.ones(1),
        "bbox_head.a": torch.ones(1),
    }
    torch.save({"state_dict": detector, "meta": {}}, tmp_path / "detector.pth")
    out = convert_file(tmp_path / "detector.pth", "dinat_mini")
    missing, unexpected = empty("dinat_mini").load_state_dict(load_file(out), strict=False, assign=True)
    assert not unexpected
    assert all(key.startswith(("norm.", "head.")) for key in missing)
    assert json.loads(Path(f"{out}.json").read_text())["left_out"] == ["bbox_head", "neck", "output norms"]


def test_provenance(tmp_path: Path) -> None:
    state = published("biformer/biformer_tiny")
    torch.save({"model": state, "model_ema": {}, "args": argparse.Namespace()}, tmp_path / "biformer_tiny_best.pth")
    out = convert_file(tmp_path / "biformer_tiny_best.pth", "biformer_tiny.in1k", out=tmp_path / "o.safetensors")
    note = json.loads((tmp_path / "o.safetensors.json").read_text())
    digest = hashlib.sha256((tmp_path / "biformer_tiny_best.pth").read_bytes()).hexdigest()
    assert note["source"] == {"file": "biformer_tiny_best.pth", "sha256": digest, "weights": "model"}
    assert note["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert note["model"] == "biformer_tiny.in1k"
    assert note["average"] is False
    assert note["licence"].startswith("MIT")
    assert note["hybridzoo"] == hybridzoo.__version__
    assert 0 < note["parity"] < 1e-9
    assert note["key_map"] >= 1
    assert note["date"][:2] == "20"
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "biformer_tiny_best.pth",
        "o.safetensors",
        "o.safetensors.json",
    ]


def test_existing_files_are_replaced_only_with_force(network: torch.nn.Module, tmp_path: Path) -> None:
    """The source is never replaced, not even through another name or as the note."""
    source, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save(network.state_dict(), source)
    before = source.read_bytes()

    def converted(**options: object) -> Path:
        return convert_file(source, "efficientvit_msra_m0", **options)

    for path in (out, Path(f"{out}.json")):
        path.write_text("precious")
        with pytest.raises(CheckpointError, match=rf"out {path}: exists already; .* --force"):
            converted(out=out)
        assert path.read_text() == "precious"
        path.unlink()
    out.write_text("old")
    assert converted(out=out, force=True) == out
    assert load_file(out).keys() == network.state_dict().keys()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "note.json").hardlink_to(source)
    for name in ("w.pth", "link", "hard", "note"):
        with pytest.raises(CheckpointError, match="is the source itself"):
            converted(out=tmp_path / name, force=True)
    assert source.read_bytes() == before


def test_a_failed_write_leaves_no_files(
    network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(network.state_dict(), tmp_path / "w.pth")
    (tmp_path / "taken.safetensors.json").mkdir()
    (tmp_path / "folder").mkdir()
    for out, folder in (("taken.safetensors", "taken.safetensors.json"), ("folder", "folder")):
        with pytest.raises(CheckpointError, match=rf"^out .*{folder}: is a folder; name a file$"):
            convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", out=tmp_path / out, force=True)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybridzoo.checkpoints.writing.write_note", full)
    with pytest.raises(CheckpointError, match=r"o.safetensors: cannot be written \(No space left on device\)"):
        convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", out=tmp_path / "o.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken.safetensors.json", "w.pth"]


def test_a_tilde_and_an_empty_path(network: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", out="~/o.st") == tmp_path / "o.st"
    with pytest.raises(CheckpointError, match="out: is empty"):
        convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", out="")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda value: value * torch.nan, r"\d+ not finite: stem.conv1.conv.weight"),
        (lambda value: value.to(torch.complex64), r"\d+ of another kind of numbers: stem.conv1.conv.weight complex64"),
        (lambda value: value.int(), r"\d+ of another kind of numbers: stem.conv1.conv.weight int32"),
    ],
    ids=["nan", "complex", "integers"],
)
@pytest.mark.parametrize("to", ["hybridzoo", "published", "timm"])
def test_invalid_numbers_are_refused(network: torch.nn.Module, tmp_path: Path, change: Any, says: str, to: Any) -> None:
    state = network.state_dict()
    torch.save({k: change(v) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=rf"w.pth: does not fit efficientvit_msra_m0; {says}"):
        convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", to=to)


def test_half_precision_is_kept(network: torch.nn.Module, tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    out = load_file(convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", to="timm"))
    assert {value.dtype for value in out.values()} == {torch.float16, torch.int64}


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_written(network: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    del state["stem.conv1.norm.weight"]
    state["extra.weight"] = torch.ones(1)
    state["stem.conv2.norm.bias"] = torch.ones(7)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(
        CheckpointError,
        match=r"odd.pth: does not fit efficientvit_msra_m0; 1 missing: stem.conv1.norm.weight; "
        r"1 unexpected: extra.weight; 1 of another shape: stem.conv2.norm.bias \(7,\), not \(16,\)$",
    ):
        convert_file(tmp_path / "odd.pth", "efficientvit_msra_m0")
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    with pytest.raises(
        CheckpointError,
        match=r"does not fit efficientvit_msra_m1; \d+ unexpected: .* more; \d+ of another shape: .* more$",
    ):
        convert_file(tmp_path / "whole.pth", "efficientvit_msra_m1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.pth", "whole.pth"]


def test_weights_of_another_tag_name_the_tags(tmp_path: Path) -> None:
    torch.save(filled("maxvit_tiny_tf_384"), tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"does not fit maxvit_tiny; .*other tags: .*maxvit_tiny.tf_384_in1k"):
        convert_file(tmp_path / "w.bin", "maxvit_tiny")


def test_bad_arguments(network: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"to='onnx': choose hybridzoo, published, timm"):
        convert_file(tmp_path / "w.safetensors", "efficientvit_msra_m0", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"model 'dinat_minni': no such model or tag; there are dinat_base"):
        convert_file(tmp_path / "w.safetensors", "dinat_minni")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w.pth: is the source itself"):
        convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", out=tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"cannot be written"):
        convert_file(tmp_path / "w.pth", "efficientvit_msra_m0", out=tmp_path / "nowhere" / "w.safetensors")
    torch.save(filled("patnet_t0"), tmp_path / "p.pth")
    with pytest.raises(CheckpointError, match=r"to='timm': .*timm has no network"):
        convert_file(tmp_path / "p.pth", "patnet_t0", to="timm")
    with pytest.raises(ValueError, match="no weights in a layout of the authors"):
        publish({}, "ascan_tiny")
    assert not list(tmp_path.glob("*.new"))
    assert not list(tmp_path.glob("*.json"))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples in its help, in order; and bad input is one line and exit code 2."""
    from hybridzoo.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.save({"model": published("biformer/biformer_tiny")}, "biformer_tiny_best.pth")
    torch.save({"state_dict": filled("dinat_mini")}, "final.pth")
    assert main(["checkpoints", "convert", "--help"]) == 0
    examples = [
        line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("$ hybridzoo ")
    ]
    written = ["biformer_tiny_best.hybridzoo.safetensors", "final.published.safetensors"]
    for example, file in zip(examples, written, strict=True):
        assert main(shlex.split(example)[2:]) == 0
        assert capsys.readouterr().out.split() == [file, f"{file}.json"]
        assert Path(file).is_file()
    assert "levels.0.blocks.0.attn.rpb" in load_file("final.published.safetensors")
    for argv, reason in (
        (["final.pth", "--model", "efficientvit_msra_m1"], "does not fit efficientvit_msra_m1"),
        (["final.pth", "--model", "efficientvit_m0"], "no such model or tag"),
        (["final.pth", "--model", "dinat_mini", "--ema"], "holds no moving average"),
        (["final.pth", "--model", "efficientvit_msra_m0", "--to", "onnx"], "'onnx' is not one of"),
        (["nowhere.pth", "--model", "efficientvit_msra_m0"], "checkpoint nowhere.pth: no such file"),
        (
            ["final.pth", "--model", "dinat_mini", "--to", "published"],
            "exists already; choose another",
        ),
        (["final.pth", "--model", "dinat_mini", "--out", ""], "out: is empty"),
        (["final.pth"], "--model"),
    ):
        assert main(["checkpoints", "convert", *argv]) == 2
        told = capsys.readouterr()
        assert reason in told.err
        assert len(told.err.splitlines()) == 1
    assert main(["checkpoints", "convert", "final.pth", "--model", "dinat_mini", "--to", "published", "--force"]) == 0
