"""`hybridzoo export --int8`: linear layers in eight bits, in every format that can express them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

from hybridzoo.__main__ import main
from hybridzoo.train import engine
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.export import comparing, exporting, int8, runs, sources
from hybridzoo.train.export.formats import FORMATS

ROOT = Path(__file__).parents[2]


class Tokens(nn.Module):
    """An MLP on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 8, 8)
        self.up, self.down, self.head = nn.Linear(128, 512), nn.Linear(512, 128), nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def tokens() -> sources.Source:
    torch.manual_seed(0)
    return sources.Source(Tokens().eval(), ("logits",), (64, 64), metadata={"model": "tokens"})


@pytest.mark.parametrize("to", int8.CARRY)
@pytest.mark.parametrize("way", int8.WAYS)
def test_a_file_computes_what_the_int8_network_computes(tmp_path, way, to):
    source = tokens()
    before = source.run(source.image(64, 64, 1))[0]
    change = int8.quantize(source, way)
    after = source.run(source.image(64, 64, 1))[0]
    assert 1e-3 < change < 0.1
    assert change == pytest.approx(comparing.difference(before, after))
    path = tmp_path / f"network{FORMATS[to].suffix}"
    done = exporting.export(source, to, path, dynamic=False, tolerance=int8.tolerance(way, change))
    assert exporting.read_metadata(path)["int8"] == way
    if way == "weights":
        assert done.error < 1e-5
    if to == "onnx":  # a pt2 file has a large graph beside the weights
        parameters = sum(parameter.numel() for parameter in Tokens().parameters())
        assert sum(file.stat().st_size for file in done.files) < 0.7 * 4 * parameters
    else:
        assert to == "pt2"
        assert_int8_without_torchao(path, way)


def assert_int8_without_torchao(path, way):
    """The weights of a pt2 file are int8, and reading it needs no operators of torchao."""
    program = torch.export.load(path)
    called = {str(node.target) for node in program.graph.nodes}
    assert ("aten._int_mm.default" in called) == (way == "dynamic")
    assert not [name for name in called if "torchao" in name]
    stored = list(program.state_dict.values())
    assert {type(value) for value in stored} <= {Tensor, nn.Parameter}
    kinds = {tuple(value.shape): value.dtype for value in stored}
    assert {kinds[shape] for shape in ((512, 128), (128, 512), (10, 128))} == {torch.int8}


@pytest.mark.parametrize("way", int8.WAYS)
@pytest.mark.parametrize("to", sorted({*FORMATS} - {*int8.CARRY}))
def test_a_format_that_does_not_keep_int8_is_refused_at_once(capsys, way, to):
    assert main(["export", "test_resnet", "--to", to, "--weights", "none", "--int8", way]) == 2
    said = capsys.readouterr().err
    assert f"--int8 {way}: --to {to} does not keep int8; the formats that do: onnx, pt2" in said
    assert said.count("\n") == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", ["segformer", "retinanet"])
def test_linear_layers_of_segmentors_and_detectors_become_int8(tmp_path, recipe):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    from mmengine.registry import MODELS, DefaultScope

    torch.manual_seed(0)
    config = load_config(recipe, ["model.backbone.depths=(1,1,1,1)"], model="ravlt_tiny")
    engine.prepare(config, ("model",))
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    model.eval().dataset_meta = {"classes": ("one", "two")}
    source = runs.from_model(config, model, Path("final.pth"))
    source.size = (64, 96)
    assert int8.quantize(source, "weights") < 0.5
    done = exporting.export(source, "pt2", tmp_path / "dense.pt2", dynamic=False)
    assert exporting.read_metadata(done.path)["int8"] == "weights"
    assert torch.int8 in {value.dtype for value in torch.export.load(done.path).state_dict.values()}


def test_a_network_without_linear_layers_is_refused():
    source = sources.Source(nn.Conv2d(3, 2, 3).eval(), ("map",), (64, 64), metadata={"model": "a convolution"})
    with pytest.raises(UserError, match="--int8 weights: a convolution has no linear layer"):
        int8.quantize(source, "weights")


def test_the_command_reports_the_difference_of_int8_and_float32(capsys, tmp_path):
    out = tmp_path / "network.pt2"
    words = ("--static", "--to", "pt2", "--weights", "none", "--img-size", "64", "--int8", "weights", "--out", str(out))
    assert main(["export", "test_resnet", *words]) == 0
    assert "int8 (weights): changes the outputs by at most " in capsys.readouterr().out
    assert exporting.read_metadata(out)["int8"] == "weights"


def test_the_table_has_every_way_of_every_network(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    measured = importlib.import_module("benchmarks.int8")
    rows = json.loads((ROOT / "docs" / "int8.json").read_text())
    assert set(rows) <= set(measured.NETWORKS)
    for cells in rows.values():
        assert tuple(cells) == measured.WAYS
        assert all(cells[way]["mb"] < cells["float32"]["mb"] for way in int8.WAYS)
