"""Weights are read from every usual container, and load completely or not at all."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from torch import nn

from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import load_matching, read_checkpoint, read_state_dict


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_vit", num_classes=5)


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda s: s, id="plain"),
        pytest.param(lambda s: {"state_dict": s, "arch": "test_vit", "epoch": 3}, id="timm"),
        pytest.param(lambda s: {"model": s, "args": argparse.Namespace(lr=1.0)}, id="DeiT"),
        pytest.param(lambda s: {"state_dict": prefixed(s, "module.")}, id="DDP"),
        pytest.param(lambda s: {"state_dict": prefixed(s, "module._orig_mod.")}, id="DDP and compile"),
        pytest.param(
            lambda s: {
                "state_dict": prefixed(s, "model."),
                "message_hub": {"loss": HistoryBuffer([1.0], [1])},
                "meta": {},
            },
            id="mmengine classifier",
        ),
        pytest.param(
            lambda s: {
                "state_dict": {
                    **prefixed(s, "backbone.model."),
                    "backbone.out_norms.0.weight": torch.ones(2),
                    "neck.weight": torch.ones(2),
                }
            },
            id="mmdet",
        ),
    ],
)
def test_containers(tmp_path: Path, model: nn.Module, wrap: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap(model.state_dict()), path)
    state = read_state_dict(path)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_safetensors(tmp_path: Path, model: nn.Module) -> None:
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert read_state_dict(tmp_path / "w.safetensors").keys() == model.state_dict().keys()


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_unreadable_files(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"missing.pth: no such file"):
        read_checkpoint("missing.pth")
    torch.save(model.state_dict(), "whole.pth")
    whole = Path("whole.pth").read_bytes()
    Path("cut.pth").write_bytes(whole[: len(whole) // 2])
    Path("text.pth").write_text("<html>not found</html>")
    Path("text.safetensors").write_text("<html>not found</html>")
    Path("bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    for name in ("cut.pth", "text.pth", "text.safetensors", "bomb.pth"):
        with pytest.raises(UserError, match=rf"checkpoint {name}: cannot be read") as caught:
            read_state_dict(name)
        assert "\n" not in str(caught.value)
    assert not Path("exploded").exists(), "code inside a checkpoint ran"
    torch.save({"epoch": 1}, "empty.pth")
    with pytest.raises(UserError, match=r"holds no weights \(its keys: epoch\)"):
        read_state_dict("empty.pth")
    torch.save([1], "list.pth")
    with pytest.raises(UserError, match=r"holds a list"):
        read_state_dict("list.pth")


def test_head_of_another_size(model: nn.Module) -> None:
    other = timm.create_model("test_vit", num_classes=7)
    head = other.head.weight.clone()
    with pytest.raises(UserError, match=r"2 of another shape, first 'head.weight': \(5, 64\), the model has \(7, 64\)"):
        load_matching(other, model.state_dict(), allow_head_mismatch=False)
    load_matching(other, model.state_dict(), allow_head_mismatch=True)
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.patch_embed.proj.weight, model.patch_embed.proj.weight)
    headless = timm.create_model("test_vit", num_classes=0)
    load_matching(headless, model.state_dict(), allow_head_mismatch=True)
    assert torch.equal(headless.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_another_model_changes_nothing(model: nn.Module) -> None:
    other = timm.create_model("test_resnet")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(
        UserError, match=r"do not fit test_resnet: .* missing, first 'conv1.*unexpected, first 'cls_token'"
    ):
        load_matching(other, model.state_dict(), allow_head_mismatch=True)
    partial = dict(other.state_dict())
    partial["conv1.0.weight"] = torch.full_like(partial["conv1.0.weight"], 3)
    del partial["bn1.weight"]
    with pytest.raises(UserError, match=r"1 missing, first 'bn1.weight'"):
        load_matching(other, partial, allow_head_mismatch=True)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_detector_heads_may_differ_but_not_its_neck() -> None:
    def detector(classes: int, neck: int) -> nn.Module:
        parts = {"neck": nn.Linear(4, neck), "roi_head": nn.ModuleDict({"fc_cls": nn.Linear(4, classes)})}
        return nn.ModuleDict(parts)

    load_matching(detector(3, 4), detector(80, 4).state_dict(), allow_head_mismatch=True)
    with pytest.raises(UserError, match=r"'neck.weight'"):
        load_matching(detector(3, 4), detector(80, 5).state_dict(), allow_head_mismatch=True)


def test_published_files_load_under_our_names(tmp_path):
    """The authors' training checkpoints: raw weights beside an EMA and the options of their script."""
    import goldens

    import hybridzoo  # noqa: F401  registers the models

    state = {key: value.float() for key, value in goldens.published_state("biformer", "biformer_tiny").items()}
    ema = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save(
        {"model": state, "model_ema": ema, "args": argparse.Namespace(lr=1)}, tmp_path / "biformer_tiny_best.pth"
    )
    model = timm.create_model("biformer_tiny", num_classes=3)
    load_matching(model, read_state_dict(tmp_path / "biformer_tiny_best.pth"), allow_head_mismatch=True)
    torch.testing.assert_close(model.stem.conv1.weight, state["downsample_layers.0.0.weight"])
    torch.testing.assert_close(model.stages[3].blocks[0].mlp.fc2.bias, state["stages.3.0.mlp.3.bias"])


def test_reading_a_checkpoint_with_logs_leaves_logging_as_it_was(tmp_path: Path) -> None:
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": {"a": torch.zeros(1)}, "message_hub": {"loss": buffer}}, tmp_path / "old.pth")
    read_checkpoint(tmp_path / "old.pth")
    assert HistoryBuffer([1.0, 3.0], [1, 1]).statistics("current") == 3.0
