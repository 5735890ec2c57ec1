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
from hybridzoo.train.weights import find_weights, load_matching, read_checkpoint, read_state_dict


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


# Starting points of training ----------------------------------------------------------------------------------------

SMALL = {  # a name and what makes its network small
    "dinat_mini": dict(depths=(1, 2, 1, 1), dims=(32, 32, 64, 64)),
    "biformer_tiny": dict(depths=(1, 1, 1, 1)),
    "efficientvit_mit_b0": dict(depths=(1, 1, 2, 2)),
    "agent_swin_tiny": dict(depths=(1, 1, 1, 1)),
}


def small(name: str, **kwargs: Any) -> nn.Module:
    import hybridzoo  # noqa: F401  registers the models

    return timm.create_model(name, **{**SMALL[name], **kwargs})


def randomised(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.rand(value.shape).to(value.dtype) for name, value in state.items()}


def test_published_names_are_downloaded_and_files_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridzoo.checkpoints import store
    from hybridzoo.checkpoints.transfer import DownloadError

    (tmp_path / "w.pth").touch()
    asked = []
    monkeypatch.setattr(store, "download", lambda name: asked.append(name) or tmp_path / "w.pth")
    assert find_weights(str(tmp_path / "w.pth")) == tmp_path / "w.pth"
    assert not asked
    for name in ("dinat_mini.in1k", "dinat_mini", "dinat_mini.upernet_160k_ade20k"):
        assert find_weights(name) == tmp_path / "w.pth"
        assert asked.pop() == name
    with pytest.raises(UserError, match=r"weights dinat_mini.ink1: no such file, .* did you mean dinat_mini.in1k"):
        find_weights("dinat_mini.ink1")
    with pytest.raises(UserError, match=r"weights nowhere.pth: no such file"):
        find_weights("nowhere.pth")
    with pytest.raises(UserError, match=r"weights patnet_t0: no such file, and no published"):
        find_weights("patnet_t0")
    with pytest.raises(UserError, match="weights: is empty"):
        find_weights("")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_weights(tmp_path)
    assert not asked

    def fails(name: str) -> Path:
        raise DownloadError(f"{name}: nothing is there")

    monkeypatch.setattr(store, "download", fails)
    with pytest.raises(UserError, match=r"nat_mini.in1k: nothing is there"):
        find_weights("nat_mini.in1k")


def test_another_networks_published_weights_are_refused_before_they_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And what binds the user of the right ones is said."""
    from hybridzoo.checkpoints import store

    asked = []
    monkeypatch.setattr(store, "download", lambda name: asked.append(name) or tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"weights dinat_mini.in1k: are not of biformer_tiny, which .*; choose biformer_tiny.in1k"
    ):
        find_weights("dinat_mini.in1k", "biformer_tiny")
    with pytest.raises(UserError, match=r"dinat_mini: are not of patnet_t0, which .*; none are published of it"):
        find_weights("dinat_mini", "patnet_t0")
    assert not asked
    find_weights("fastervit_0", "fastervit_0")
    assert asked == ["fastervit_0"]
    assert capsys.readouterr().err.startswith("note: fastervit_0.in1k: these weights are for non-commercial use only")


def test_the_command_line_names_bad_weights_before_it_makes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from hybridzoo.__main__ import main

    monkeypatch.chdir(tmp_path)
    Path("text.pth").write_text("not weights")
    for given, says in (("text.pth", "it is text"), ("", "is empty"), ("dinat_mini.in1k", "are not of biformer_tiny")):
        argv = ["train", "biformer_tiny_digits", "--weights", given, "--work-dir", "run", "--no-wandb"]
        assert main(argv) == 2
        told = capsys.readouterr().err
        assert says in told
        assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.pth"]


def test_weights_that_do_not_fit_name_the_file(model: nn.Module, tmp_path: Path) -> None:
    from hybridzoo.train.backbone import PyramidBackbone

    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"weights .*other.pth: do not fit test_resnet: "):
        PyramidBackbone("test_resnet", out_indices=(1, 2)).load(tmp_path / "other.pth")


def test_tables_of_another_kernel_are_resized_by_the_layer_and_the_report_says_so() -> None:
    seven, eleven = small("dinat_mini"), small("dinat_mini", kernel_size=11)
    state = randomised(seven.state_dict())
    report = load_matching(eleven, state, allow_head_mismatch=False)
    tables = [name for name in state if name.endswith(".rpb")]
    assert f"{len(state)} of {len(state)} tensors" in report
    assert f"{len(tables)} tables of positions resized" in report
    assert "(1, 13, 13) to (1, 21, 21)" in report
    corner = eleven.get_parameter(tables[0])[:, 10, 10]  # the centre stays where it is
    torch.testing.assert_close(corner, state[tables[0]][:, 6, 6])
    assert "resized" not in load_matching(seven, state, allow_head_mismatch=False)
    state[tables[0]] = torch.rand(2, 13, 13)  # another number of heads is no resizing
    for network in (seven, eleven):
        with pytest.raises(UserError, match=r"1 of another shape, first 'stages.0.*rpb'"):
            load_matching(network, state, allow_head_mismatch=False)


def test_the_report_names_what_is_newly_initialised(model: nn.Module) -> None:
    other = timm.create_model("test_vit", num_classes=7)
    count = len(model.state_dict())
    report = load_matching(other, model.state_dict(), allow_head_mismatch=True)
    assert report == f"{count - 2} of {count} tensors; newly initialised: head"


def published_dense(name: str, norms: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A published detector's state dict, with a norm for each level; and our names for its backbone."""
    from hybridzoo.checkpoints.keymaps import publish

    network = small(name)
    ours = {k: v for k, v in randomised(network.state_dict()).items() if not k.startswith(("norm.", "head."))}
    state = {f"backbone.{k}": v for k, v in publish(ours, name).items()}
    for level, info in enumerate(network.feature_info):
        for part in ("weight", "bias"):
            state[f"backbone.{norms.format(level)}.{part}"] = torch.rand(info["num_chs"])
    return {**state, "neck.conv.weight": torch.rand(1), "bbox_head.fc.weight": torch.rand(1)}, ours


@pytest.mark.parametrize(
    ("name", "norms"),
    [("dinat_mini", "norm{}"), ("biformer_tiny", "extra_norms.{}"), ("agent_swin_tiny", "norm{}")],
)
def test_the_backbone_of_a_published_detector_starts_ours(name: str, norms: str, tmp_path: Path, capsys: Any) -> None:
    from hybridzoo.train.backbone import PyramidBackbone

    state, ours = published_dense(name, norms)
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    backbone = PyramidBackbone(name, out_norm="LN", weights=tmp_path / "detector.pth", **SMALL[name])
    backbone.init_weights()
    loaded = backbone.model.state_dict()
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.items())
    torch.testing.assert_close(backbone.out_norms[2].bias, state[f"backbone.{norms.format(2)}.bias"])
    count = len(ours)
    line = f"backbone: {count} of {count} tensors; output norms: 8 tensors; left out: bbox_head, neck"
    assert line in capsys.readouterr().out
    plain = PyramidBackbone(name, out_norm="BN", **SMALL[name])  # without the means of another norm
    plain.load(tmp_path / "detector.pth")
    assert "left out: bbox_head, neck, output norms" in capsys.readouterr().out
    assert torch.equal(plain.out_norms[0].weight, torch.ones_like(plain.out_norms[0].weight))


def test_a_backbone_is_loaded_completely_or_not_at_all(tmp_path: Path) -> None:
    from hybridzoo.train.backbone import PyramidBackbone

    state, _ = published_dense("dinat_mini", "norm{}")
    del state["backbone.levels.1.blocks.1.mlp.fc1.bias"]
    torch.save({"state_dict": state}, tmp_path / "partial.pth")
    backbone = PyramidBackbone("dinat_mini", out_norm="LN", **SMALL["dinat_mini"])
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=r"do not fit dinat_mini: 1 missing, first 'stages.1.blocks.1.mlp.fc1.bias'"):
        backbone.load(tmp_path / "partial.pth")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_classifiers_start_a_backbone(tmp_path: Path, capsys: Any) -> None:
    """Published ones, of which EfficientViT's (MIT) has a `backbone` too; and fewer levels than the network has."""
    from hybridzoo.checkpoints.keymaps import publish
    from hybridzoo.train.backbone import PyramidBackbone

    for name in ("efficientvit_mit_b0", "dinat_mini"):
        state = randomised(small(name).state_dict())
        torch.save({"state_dict": publish(state, name)}, tmp_path / f"{name}.pth")
        backbone = PyramidBackbone(name, out_indices=(0, 1, 2), **SMALL[name])
        backbone.load(tmp_path / f"{name}.pth")
        loaded = backbone.model.state_dict()
        assert not any(key.startswith("stages.3") for key in loaded)
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())
        assert f"{len(loaded)} of {len(loaded)} tensors; left out: backbone's head" in capsys.readouterr().out


def test_weights_whose_accuracy_was_published_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CSwin's files that is the moving average; a checkpoint of ours has another layout."""
    from hybridzoo.train.weights import read_parts

    monkeypatch.chdir(tmp_path)
    network = nn.Linear(1, 1)
    network.pretrained_cfg = {"architecture": "agent_cswin_tiny"}
    for content, expected in (
        ({"model": {"norm.bias": torch.zeros(1)}, "state_dict_ema": {"norm.bias": torch.ones(1)}}, 1),
        ({"state_dict": {"model.norm.bias": torch.full((1,), 2.0)}}, 2),
    ):
        torch.save(content, "w.pth")
        assert read_parts("w.pth", network).network["norm.bias"].item() == expected


def test_output_norms_have_the_epsilon_of_the_network() -> None:
    """As the published detectors have: DiNAT's and the Swin hosts' 1e-5, BiFormer's 1e-6."""
    from hybridzoo.train.backbone import PyramidBackbone

    def eps(name: str, **kwargs: Any) -> set[float]:
        norms = PyramidBackbone(name, out_norm="LN", **SMALL.get(name, {}), **kwargs).out_norms
        return {norm.eps for norm in norms}

    assert eps("dinat_mini") == eps("agent_swin_tiny") == {1e-5}
    assert eps("biformer_tiny") == {1e-6}
    assert eps("test_resnet", out_indices=(1, 2)) == {1e-6}
    assert eps("dinat_mini", out_norm_eps=1e-3) == {1e-3}


def test_the_backbone_of_another_kind_of_detector_is_loaded(tmp_path: Path, capsys: Any) -> None:
    from hybridzoo.train.backbone import PyramidBackbone
    from hybridzoo.train.weights import start_from

    def detector(neck: int) -> nn.Module:
        parts = {"backbone": PyramidBackbone("test_resnet", out_indices=(1, 2)), "neck": nn.Linear(4, neck)}
        return nn.ModuleDict(parts)

    theirs = detector(4)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "whole.pth")
    same, other = detector(4), detector(5)
    start_from(same, tmp_path / "whole.pth")
    assert torch.equal(same.neck.weight, theirs.neck.weight)
    count = len(theirs.state_dict())
    assert f"whole.pth: {count} of {count} tensors\n" in capsys.readouterr().out
    start_from(other, tmp_path / "whole.pth")
    key = "backbone.model.conv1.0.weight"
    assert torch.equal(other.state_dict()[key], theirs.state_dict()[key])
    said = capsys.readouterr().out
    assert "'neck.weight'" in said
    assert "left out: neck" in said
    with pytest.raises(UserError, match="do not fit"):
        start_from(nn.Linear(1, 1), tmp_path / "whole.pth")
