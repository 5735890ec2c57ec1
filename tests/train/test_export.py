"""`hybridzoo export`: files that compute what PyTorch computes, at other sizes too, or no file at all."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from hybridzoo.__main__ import main
from hybridzoo.train import engine
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.export import comparing, exporting, runs, sources
from hybridzoo.train.export.exporting import read_metadata
from hybridzoo.train.export.formats import FORMATS, Onnx, Pt2

ROOT = Path(__file__).parents[2]
NAME = "test_resnet"  # of timm, tiny


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Run a command line in this process, in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save(timm.create_model(NAME).state_dict(), file)
    return file


@pytest.mark.parametrize(
    "to", [to if to != "aoti" else pytest.param(to, marks=pytest.mark.exhaustive) for to in FORMATS]
)
def test_a_network_by_name_is_written_and_computes_what_pytorch_computes(call, weights, to):
    code, out, err = call("export", NAME, "--to", to, "--weights", str(weights), "--img-size", "64")
    assert code == 0, err
    path = Path(NAME + FORMATS[to].suffix)
    assert f"written: {path}" in out
    # What AOTInductor (2.15) makes for open sizes computes something else at some of them, which the comparison finds.
    assert ("any batch, 64 x 64 px only" if to == "aoti" else "any batch, any height and width") in out
    model = timm.create_model(NAME).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    run = FORMATS[to].open(path)
    for shape in ((1, 3, 64, 64), (3, 3, 64, 64) if to == "aoti" else (3, 3, 101, 75)):
        image = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(image)[0], model(image), rtol=1e-4, atol=1e-5)
    facts = read_metadata(path)
    cfg = model.pretrained_cfg
    assert (facts["model"], facts["task"], facts["weights"]) == (NAME, "classification", "tiny.pth")
    assert facts["input"]["mean"] == pytest.approx(cfg["mean"])
    assert facts["input"]["size"] == [64, 64]
    assert facts["sizes"]["multiple"] == (0 if to == "aoti" else 1)
    assert len(facts["classes"]) == 1000
    assert not list(Path().glob(".*")), "temporary files"


def test_a_pyramid_gives_the_maps_of_all_strides(call):
    """Of ours, by the same command; --static keeps height and width."""
    words = ("--features", "--weights", "none", "--img-size", "64x96", "--static", "--to", "torchscript")
    code, out, err = call("export", "efficientvit_msra_m0", *words, "--out", "maps/m0.torchscript")
    assert code == 0, err
    assert "64 x 96 px only" in out
    assert read_metadata(Path("maps/m0.torchscript"))["sizes"] == {
        "batch": "any", "multiple": 0, "height": [64, 64], "width": [96, 96],
    }  # fmt: skip
    maps = FORMATS["torchscript"].open(Path("maps/m0.torchscript"))(torch.randn(2, 3, 64, 96))
    model = timm.create_model("efficientvit_msra_m0", features_only=True)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert out.count("stride") == len(maps)


class Decides(nn.Module):
    """Asks Python about the size of its image, as windows do."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3)
        self.multiple = multiple

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[2] % self.multiple or image.shape[3] % self.multiple:
            image = image + 1
        return self.layer(image).mean((2, 3))


def source_of(network: nn.Module, size: tuple[int, int] = (64, 64)) -> sources.Source:
    return sources.Source(network.eval(), ("logits",), size, metadata={"model": "a network"})


@pytest.mark.parametrize("to", ["pt2", "torchscript"])
@pytest.mark.parametrize(("multiple", "taken"), [(32, 32), (96, 0)])
def test_the_sizes_in_the_metadata_were_tested(tmp_path, to, multiple, taken):
    """A size that Python decides over is no dynamic one: the other branch is not in the file."""
    source = source_of(Decides(multiple))
    done = exporting.export(source, to, tmp_path / "network", dynamic=True)
    assert done.sizes.multiple == taken
    assert done.why
    run = FORMATS[to].open(done.path)
    for size in [(64, 64, 4), *([(96, 160, 1)] if taken else [])]:
        comparing.compare(source, run, size)


class Quotient(nn.Module):
    """Nothing divided by nothing and a little more, as linear attention does where no key counts."""

    def forward(self, image: Tensor) -> Tensor:
        nothing = torch.relu(-image.abs()).mean((2, 3))
        return nothing / (nothing + 1e-15)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_small_summand_is_kept(tmp_path, to):
    """onnxscript's optimizer takes what is below 1e-8 for zero."""
    done = exporting.export(source_of(Quotient()), to, tmp_path / f"network{FORMATS[to].suffix}")
    (out,) = FORMATS[to].open(done.path)(torch.randn(1, 3, 64, 64))
    assert torch.equal(out, torch.zeros(1, 3))


class Wrong(Pt2):
    def open(self, path):
        run = super().open(path)
        return lambda image: tuple(out + 0.01 * out.std() for out in run(image))


def test_a_difference_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "pt2", Wrong())
    with pytest.raises(UserError, match=r"torch.export: a network cannot be .*logits differs .* at 64 x 64"):
        exporting.export(source_of(nn.Sequential(nn.Conv2d(3, 2, 3))), "pt2", tmp_path / "network.pt2")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_by_a_whole_file(tmp_path, monkeypatch):
    file, source = tmp_path / "network.pt2", source_of(nn.Sequential(nn.Conv2d(3, 2, 3)))
    file.write_text("mine")
    with pytest.raises(UserError, match=r"is there already.*--force"):
        exporting.export(source, "pt2", file)
    monkeypatch.setitem(FORMATS, "pt2", Wrong())
    with pytest.raises(UserError, match="differs"):
        exporting.export(source, "pt2", file, force=True)
    assert file.read_text() == "mine"
    monkeypatch.setitem(FORMATS, "pt2", Pt2())
    exporting.export(source, "pt2", file, force=True)
    assert read_metadata(file)["model"] == "a network"


def test_large_weights_lie_beside_the_onnx_file_and_move_with_it(tmp_path, monkeypatch):
    class Large(Onnx):
        def write(self, recorded, path, metadata):
            super().write(recorded, path, metadata)
            recorded.save(path, external_data=True)  # as it is done above 2 GB

    monkeypatch.setitem(FORMATS, "onnx", Large())
    source = source_of(nn.Sequential(nn.Conv2d(3, 64, 9)))
    done = exporting.export(source, "onnx", tmp_path / "sub" / "network.onnx", dynamic=False)
    assert len(done.files) == 2
    assert all(file.is_file() for file in done.files)
    comparing.compare(source, FORMATS["onnx"].open(done.path), (64, 64, 2))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["resnet_50"], "resnet_50: no such file or run folder"),
        ([NAME], "weights of test_resnet"),
        ([NAME, "--to", "tflite"], "'tflite' is not one of"),
        ([NAME, "--weights", "nowhere.pth"], "weights nowhere.pth: no such file"),
        ([NAME, "--weights", "none", "--img-size", "big"], "--img-size big: expected a side or HEIGHTxWIDTH"),
        ([NAME, "--weights", "none", "--img-size", "16"], "--img-size 16"),
        ([NAME, "--weights", "none", "--to", "pt2", "--out", "there"], "--out there: is there already"),
        ([NAME, "--weights", "none", "--to", "pt2", "--out", "there/n.pt2"], "--out there/n.pt2: cannot be written"),
        ([NAME, "--weights", "none", "--cfg-options", "model.depth=3"], "model.depth=3: test_resnet has no such"),
        ([NAME, "--weights", "none", "--cfg-options", "lr=3"], "model.KEY=VALUE"),
        (["there", "--features"], "--features: is for a network's NAME"),
    ],
)
def test_bad_input_is_one_line(call, monkeypatch, argv, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("there").write_text("a file")
    code, out, err = call("export", *argv)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_missing_package_names_its_extra(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, _, err = call("export", NAME, "--weights", "none")
    assert (code, err) == (2, 'error: this needs onnxscript; type: pip install "hybridzoo[export]"\n')


def dense(recipe: str) -> sources.Source:
    """What a recipe would train, untrained, as something to export."""
    from mmengine.registry import MODELS, DefaultScope

    config = load_config(recipe, [], model=NAME)
    engine.prepare(config, ("model",))
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    model.eval().dataset_meta = {"classes": ("one", "two")}
    return runs.from_model(config, model, Path("final.pth"))


def test_a_segmentor_gives_scores_as_large_as_its_image(tmp_path):
    pytest.importorskip("mmseg")
    source = dense("segformer")
    source.size = (64, 96)
    done = exporting.export(source, "torchscript", tmp_path / "map.torchscript", dynamic=False)
    (logits,) = FORMATS["torchscript"].open(done.path)(torch.randn(2, 3, 64, 96))
    assert logits.shape[0] == 2
    assert logits.shape[2:] == (64, 96)
    facts = read_metadata(done.path)
    assert (facts["task"], facts["classes"]) == ("segmentation", ["one", "two"])
    assert facts["input"]["mean"] == pytest.approx([0.485, 0.456, 0.406], abs=1e-5)


def test_a_detector_gives_the_boxes_that_mmdet_chooses_from(tmp_path):
    """What mmdet gives after non-maximum suppression is among them, each box with its score for its class."""
    pytest.importorskip("mmdet")
    from mmdet.structures import DetDataSample

    torch.manual_seed(0)
    source = dense("retinanet")
    source.size = (64, 96)
    model = source.network.model
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.2)
    torch.nn.init.normal_(model.bbox_head.retina_reg.weight, std=0.05)
    done = exporting.export(source, "torchscript", tmp_path / "boxes.torchscript", dynamic=False)
    image = source.image(64, 96, 1)
    boxes, scores = (out[0] for out in FORMATS["torchscript"].open(done.path)(image))
    sample = DetDataSample(metainfo={"img_shape": (64, 96), "scale_factor": (1.0, 1.0)})
    with torch.no_grad():
        (found,) = model.predict(image, [sample], rescale=False)
    chosen = found.pred_instances
    assert len(chosen) > 5
    assert read_metadata(done.path)["iou_threshold"] == model.test_cfg.nms.iou_threshold
    for box, score, label in zip(chosen.bboxes, chosen.scores, chosen.labels, strict=True):
        away = (boxes - box).abs().amax(1) + (scores[:, label] - score).abs()
        assert away.min() < 0.01


def test_a_detector_of_two_stages_is_refused_with_the_reason():
    pytest.importorskip("mmdet")
    with pytest.raises(UserError, match=r"final.pth: MaskRCNN cannot be exported: .* RetinaNet can"):
        dense("mask-rcnn")


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder) -> Path:
    """The folder of a run of an epoch: three colours."""
    folder = tmp_path_factory.mktemp("runs") / "colours"
    words = ["--model", NAME, "--data", str(image_folder), "--epochs", "1", "--img-size", "64", "--weights", "none"]
    assert main(["train", "finetune", *words, "--work-dir", str(folder), "--no-wandb", "--workers", "0"]) == 0
    return folder


def test_a_run_is_exported_with_its_classes_and_the_documented_reader_reads_it(call, run, capsys):
    code, _, err = call("export", str(run), "--out", "network.onnx")
    assert code == 0, err
    facts = read_metadata(Path("network.onnx"))
    assert facts["classes"] == ["blue", "green", "red"]
    assert facts["task"] == "classification"
    assert facts["input"]["size"] == [64, 64]
    model = engine.build_for_inference(None, run, "cpu")
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
    torch.testing.assert_close(FORMATS["onnx"].open(Path("network.onnx"))(image)[0], expected, rtol=1e-4, atol=1e-5)
    Image.fromarray(np.full((40, 50, 3), (250, 5, 5), np.uint8)).save("photo.png")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    exec(compile(block, "docs/export.md", "exec"), {})
    assert capsys.readouterr().out.strip() in facts["classes"]
    code, _, err = call("export", str(run), "--weights", "none")
    assert code == 2
    assert "--weights: is for a network's NAME" in err
