"""Published files, through timm's own ways, into networks: complete, adapted as asked, or refused."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from http_server import Answer, Server
from published_files import CARD, FIRST_CONV, NAME, OTHER, PUBLISHED_FIRST_CONV, STATE, is_loaded, saved, with_card

from hybridzoo import checkpoints
from hybridzoo.checkpoints import store
from hybridzoo.checkpoints.reading import CheckpointError


@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE},
        {"model": STATE, "model_ema": OTHER, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        {"state_dict_ema": OTHER, "model": {f"module.{key}": value for key, value in STATE.items()}},
    ],
    ids=["plain", "options and a moving average", "data parallel"],
)
def test_pretrained_loads_the_weights_of_the_card(server: Server, home: Path, content: Any) -> None:
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


def test_the_configuration_is_not_changed(server: Server) -> None:
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


def given(path: Path) -> dict[str, Any]:
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_a_local_file_with_its_own_classes(tmp_path: Path) -> None:
    """Its classifier is kept where the network has as many, or nobody said how many, and never lost in silence."""
    file = tmp_path / "five.pth"
    five = timm.create_model(NAME, num_classes=5).state_dict()
    torch.save(five, file)
    for model in (
        timm.create_model(NAME, num_classes=5, **given(file)),
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=5)),
    ):
        assert all(torch.equal(value, five[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"five.pth: its classifier has 5 classes, not 1000: set num_classes=5"):
        timm.create_model(NAME, **given(file))
    fresh = timm.create_model(NAME, num_classes=7, **given(file)).state_dict()
    assert fresh["head.fc.weight"].shape[0] == 7
    assert torch.equal(fresh["head.after.weight"], five["head.after.weight"])
    for arguments in ({"num_classes": 0}, {"features_only": True}):
        timm.create_model(NAME, **arguments, **given(file))


@pytest.mark.parametrize("model", [NAME, "efficientvit_mit_b0", "maxvit_tiny", "patnet_t0", "agent_deit_tiny"])
def test_features_without_pooling_or_classes(tmp_path: Path, model: str) -> None:
    state = timm.create_model(model).state_dict()
    torch.save(state, tmp_path / "w.pth")
    for arguments in (dict(num_classes=0, global_pool=""), dict(num_classes=0), dict(features_only=True)):
        network = timm.create_model(model, **arguments, **given(tmp_path / "w.pth"))
        own = {key.removeprefix("model."): value for key, value in network.state_dict().items()}
        assert all(torch.equal(value.flatten(), state[key].flatten()) for key, value in own.items())


@pytest.mark.parametrize("converted", [False, True])
def test_the_backbone_of_a_detector_loads_without_a_head(tmp_path: Path, converted: bool) -> None:
    file = tmp_path / "detector.pth"
    trunk = {f"backbone.{key}": value for key, value in STATE.items() if not key.startswith("head.")}
    torch.save({"state_dict": {**trunk, "bbox_head.a": torch.zeros(1)}}, file)
    if converted:
        file = checkpoints.convert_file(file, NAME)
        assert checkpoints.verify(file).ok
    for arguments in ({"features_only": True}, {"num_classes": 0}):
        state = timm.create_model(NAME, **arguments, **given(file)).state_dict()
        key = FIRST_CONV if FIRST_CONV in state else f"model.{FIRST_CONV}"
        assert torch.equal(state[key], STATE[PUBLISHED_FIRST_CONV])
    with pytest.raises(CheckpointError, match=r"does not fit efficientvit_msra_m0; \d+ missing, first head\."):
        timm.create_model(NAME, num_classes=5, **given(file))


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"features_only": True}, {"in_chans": 1}], ids=str)
def test_a_wrong_shape_is_one_line(tmp_path: Path, arguments: dict[str, Any]) -> None:
    torch.save({**STATE, "patch_embed.2.c.weight": torch.zeros(7, 8, 3, 3)}, tmp_path / "odd.pth")
    line = r"odd.pth: does not fit efficientvit_msra_m0; 1 of another shape, first stem.conv2.conv.weight"
    with pytest.raises(CheckpointError, match=rf"{line} \(7, 8, 3, 3\), not \(16, 8, 3, 3\)$"):
        timm.create_model(NAME, **arguments, **given(tmp_path / "odd.pth"))
    torch.save({**STATE, PUBLISHED_FIRST_CONV: torch.zeros(8, 4, 3, 3)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"first stem.conv1.conv.weight \(8, 4, 3, 3\), not"):
        timm.create_model(NAME, **arguments, **given(tmp_path / "odd.pth"))


CONTAINERS = {
    "published": lambda ours: {"model": STATE, "args": argparse.Namespace(lr=0.1)},
    "timm's": lambda ours: timm_state(),
    "ours": lambda ours: ours,
    "our training": lambda ours: {
        "state_dict": {f"model.{key}": value for key, value in ours.items()},
        "meta": {"epoch": 1},
        "message_hub": {"log_scalars": {}},
    },
    "compiled": lambda ours: {"state_dict": {f"_orig_mod.module.{key}": value for key, value in ours.items()}},
}


def timm_state() -> dict[str, Any]:
    """The published values under timm's names."""
    with torch.device("meta"):
        example = timm.create_model("efficientvit_m0").state_dict()
    ours = {id(tensor): key for key, tensor in checkpoints.convert(example, NAME).items()}
    own = checkpoints.convert(STATE, NAME)
    return {key: own[ours[id(tensor)]] for key, tensor in example.items() if id(tensor) in ours}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_timms_checkpoint_path(tmp_path: Path, kind: str) -> None:
    ours = checkpoints.convert(STATE, NAME)
    torch.save(CONTAINERS[kind](ours), tmp_path / "w.pth")
    assert is_loaded(timm.create_model(NAME, checkpoint_path=str(tmp_path / "w.pth")))
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.fc"):
        timm.create_model(NAME, num_classes=7, checkpoint_path=str(tmp_path / "w.pth"))


def test_a_state_dict_of_another_kind_loads_by_pytorchs_own_method() -> None:
    model = timm.create_model(NAME)
    assert model.load_state_dict(STATE) == model.load_state_dict(model.state_dict())
    assert is_loaded(model)
    missing, unexpected = model.load_state_dict({"strange": torch.zeros(1)}, strict=False)
    assert unexpected == ["strange"]
    assert FIRST_CONV in missing


def test_an_address_that_is_not_on_a_card(home: Path) -> None:
    """timm downloads and opens it; then its wrapper and names are understood."""
    with Server(**{"mine.pth": saved({"model": STATE})}).running() as running:
        overlay = dict(url=f"{running.url}/mine.pth")
        assert is_loaded(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay))


@pytest.mark.parametrize("model", ["biformer_tiny", "dinat_mini", "vitrpb_small", "fastervit_0", "patnet_t0", NAME])
def test_timms_image_size_is_accepted_if_it_has_no_effect(model: str) -> None:
    with torch.device("meta"):
        larger, default = timm.create_model(model, img_size=256), timm.create_model(model)
    assert larger.state_dict().keys() == default.state_dict().keys()


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 7}, {"features_only": True}, {"num_classes": 0}], ids=str)
def test_the_file_of_another_network_is_refused(server: Server, arguments: dict[str, Any]) -> None:
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
def test_restrictive_licences_are_reported(model: str, licence: str | None, says: str) -> None:
    card = store.find(model)
    notice = store.licence_notice(card if licence is None else dataclasses.replace(card, licence=licence))
    assert (says in notice) if says else not notice


def test_a_licence_is_reported_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_card(monkeypatch, licence="NON-COMMERCIAL")
    caplog.set_level(logging.INFO)
    for _ in range(2):
        timm.create_model(NAME, pretrained=True)
    assert sum("non-commercial use only" in record.message for record in caplog.records) == 1
