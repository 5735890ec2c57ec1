"""`hybridzoo hub`: folders that timm and we load, their model cards, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from mmengine import Config
from mmengine.registry import MODELS
from networks import few_blocks
from PIL import Image

from hybridzoo.__main__ import main
from hybridzoo.checkpoints import cards, papers, store
from hybridzoo.train import engine, provenance, results, trained
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub import export as exporting
from hybridzoo.train.hub import folder as hub_folder
from hybridzoo.train.hub import licences

CLASSES = ["a cat", "a dog", "ein Käfer"]
SMALL = {"depths": (1, 1, 1, 1)}
NETWORKS = {
    "efficientvit_msra_m0": {},
    "biformer_tiny": {**SMALL, "regions": "auto"},
    "dat_tiny": {**SMALL, "img_size": 96},
    "overlock_xtiny": {**few_blocks("overlock_xtiny"), "aux_head": True},
    "test_vit": {"img_size": 64},
}
Make = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Network -> a run's folder with `final.pth` of random weights, as training would leave it."""

    def make(name: str = "efficientvit_msra_m0", **arguments: Any) -> Path:
        meta = arguments.pop("meta", {})
        config = load_config("finetune", model=name, img_size=64)
        config.model.update(num_classes=len(CLASSES), **arguments)
        config.val_dataloader.dataset.root = str(tmp_path / "private place" / "animals")
        torch.manual_seed(1)
        engine.prepare(config, ("model",))
        state = MODELS.build(dict(config.model)).state_dict()
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        known = {"setup": trained.describe(config), "class_names": CLASSES, "task": "classification"}
        torch.save({"meta": {**known, **meta}, "state_dict": state}, run / "final.pth")
        return run

    return make


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["hub", *map(str, argv)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def exported(run: Path, **how: Any) -> Path:
    return exporting.export(run, run.parent / "model", **how).folder


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exhaustive) if n.startswith("overlock") else n for n in NETWORKS]
)
def test_timm_loads_the_folder_and_computes_the_same(make: Make, name: str) -> None:
    run = make(name, **NETWORKS[name])
    folder = exported(run)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    images = torch.rand(2, 3, 64, 64)
    ours = engine.build_for_inference(None, run, "cpu")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(theirs(images), ours(images))
    again = engine.build_for_inference(None, folder, "cpu")
    assert torch.equal(again(images), ours(images))
    assert tuple(theirs.pretrained_cfg["label_names"]) == again.dataset_meta["classes"] == tuple(CLASSES)
    how = timm.data.resolve_model_data_config(theirs)
    assert tuple(how["input_size"]) == (3, 64, 64)
    transform = timm.data.create_transform(**how)
    picture = Image.effect_noise((70, 90), 80).convert("RGB")
    from hybridzoo.train.classification import eval_transform

    assert torch.equal(transform(picture), eval_transform(trained.load(run / "final.pth"))(picture))


def test_timm_loads_it_with_another_head_and_as_a_pyramid(make: Make) -> None:
    folder = exported(make())
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    assert other(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    pyramid = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
    own = engine.build_for_inference(None, folder, "cpu").model.state_dict()
    assert all(torch.equal(value, own[name.removeprefix("model.")]) for name, value in pyramid.state_dict().items())


@pytest.mark.parametrize("names", [["x", "y"], {"0": "x", "1": "y"}, None], ids=["a list", "an object", "none"])
def test_a_folder_that_timm_wrote_for_its_own_network(tmp_path: Path, names: Any) -> None:
    network = timm.create_model("test_vit", num_classes=2, img_size=64).eval()
    timm.models.save_for_hf(network, tmp_path / "theirs", {"label_names": names}, safe_serialization=True)
    model = engine.build_for_inference(None, tmp_path / "theirs", "cpu")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model(images), network(images))
    assert model.dataset_meta["classes"] == (("x", "y") if names else ("0", "1"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    picture = Image.effect_noise((90, 120), 80).convert("RGB")
    from hybridzoo.train.classification import eval_transform

    config = trained.load(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(transform(picture), eval_transform(config)(picture))


def test_weights_without_their_config_are_refused(make: Make) -> None:
    folder = exported(make())
    shutil.move(folder / "model.safetensors", folder.parent / "alone.safetensors")
    with pytest.raises(UserError, match="does not contain its config"):
        trained.load(folder.parent / "alone.safetensors")


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text("ab_", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_data_goes_through_json_and_comes_back(value: Any) -> None:
    text = json.dumps(hub_folder.encoded(value), allow_nan=False)
    back = hub_folder.decoded(json.loads(text))
    assert repr(back) == repr(value)  # which tells tuples from lists


def _change(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["hybridzoo"]["setup"]["model"].update(type="os.system"), "type"),
        (lambda c: c["hybridzoo"]["setup"]["model"].update(checkpoint="http://x/y.pth"), "names a file"),
        (lambda c: c["hybridzoo"]["setup"].update(format=9), "update it"),
        (lambda c: c["hybridzoo"]["setup"]["model"].update(name="test_vit"), "do not fit"),
        (lambda c: c.update(label_names=["x", "x", "y"]), "repeated"),
        (lambda c: c.update(label_names=[1, 2, 3]), "class"),
    ],
    ids=["a type", "a file", "a later format", "another network", "a name twice", "names that are none"],
)
def test_a_changed_config_is_validated(make: Make, change: Callable[[Any], Any], says: str) -> None:
    folder = exported(make())
    _change(folder, change)
    with pytest.raises(UserError, match=says) as caught:
        engine.build_for_inference(None, folder, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000], ids=["cut", "a list", "bytes", "deep"])
def test_a_config_that_is_not_json(make: Make, content: bytes) -> None:
    folder = exported(make())
    (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: (cannot be read|is not a model's config)") as caught:
        engine.build_for_inference(None, folder, "cpu")
    assert "\n" not in str(caught.value)


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_has_the_measured_scores_and_no_local_paths(make: Make, tmp_path: Path) -> None:
    training = {"recipe": "finetune_efficientvit_msra_m0", "epochs": 3, "lr": 0.001, "images": 40, "data": "animals"}
    run = make(meta={"training": {**training, "start": []}})
    measured = {"accuracy/top1": 91.25, "accuracy/top5": 100.0}
    place = dict(data=str(tmp_path / "private place" / "animals"), checkpoint=str(run / "final.pth"), split="val")
    results.write(run, "classification", measured, None, **place)
    folder = exported(run, title="Animals | of `mine`", licence="cc-by-4.0")
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
        assert b"private place" not in file.read_bytes(), file.name
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("hybridzoo", "image-classification")
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (91.25, "animals", "val")
    for part in (
        "ein Käfer",
        "| length | 3 epochs |",
        "import hybridzoo",
        papers.find("2305.07027").title,
        "40 images",
    ):
        assert part in card.text, part


def test_scores_of_another_checkpoint_are_not_used(make: Make) -> None:
    run = make()
    results.write(run, "classification", {"accuracy/top1": 99.0}, None, checkpoint=str(run / "best_x.pth"))
    card = ModelCard.load(exported(run) / "README.md")
    assert card.data.eval_results is None
    assert "No scores are recorded" in card.text


def test_a_network_of_timm_needs_only_timm(make: Make) -> None:
    card = ModelCard.load(exported(make("test_vit", img_size=64)) / "README.md")
    assert card.data.library_name == "timm"
    assert "import hybridzoo" not in card.text


def test_the_python_example_of_the_card_runs(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = exported(make())
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((70, 90), 80).save("photo.jpg")
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    exec(compile(block.replace("hf-hub:USER/NAME", f"local-dir:{folder}"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert any(name in printed for name in CLASSES)


def test_every_networks_paper_is_known() -> None:
    for card in cards(task=None):
        paper = papers.find(card.paper)
        assert paper is not None, card.name
        assert card.paper == f"arXiv:{paper.arxiv}"
        assert paper.bibtex().count("{") == paper.bibtex().count("}")


# Licences -------------------------------------------------------------------------------------------------------------

MIT = {"name": "dinat_mini.in1k", "licence": "MIT (repository and model cards; trained on ImageNet)", "url": ""}
FREE = {"name": "maxvit_tiny.in1k", "licence": "Apache-2.0", "url": "https://huggingface.co/timm/maxvit/resolve/x"}
BOUND = {"name": "fastervit_0", "licence": "NVIDIA Source Code License-NC: NON-COMMERCIAL use only", "url": ""}
SILENT = {"name": "agent_deit_tiny", "licence": "none stated (all rights reserved)", "url": ""}
FILE = {"name": "somebodys.pth", "licence": "unknown", "url": ""}
OWN = {"name": "final.pth", "licence": "", "url": ""}  # an earlier run of ours


@pytest.mark.parametrize(
    ("starts", "chosen", "word"),
    [
        ([], None, "unknown"),
        ([], "mit", "mit"),
        ([MIT], None, "mit"),
        ([OWN, FREE], None, "apache-2.0"),
        ([MIT], "apache-2.0", "apache-2.0"),
        ([MIT, FREE], None, "other"),
        ([BOUND], None, "other"),
        ([OWN, BOUND], None, "other"),
        ([SILENT], None, "unknown"),
        ([FILE], None, "unknown"),
    ],
)
def test_the_start_weights_licence_follows_the_model(starts: list[Any], chosen: str | None, word: str) -> None:
    found = licences.licence_of(starts, bool(starts), chosen)
    assert found.word == word
    assert all(start["name"] in found.text for start in starts if start["licence"])
    assert bool(found.warning) == (word == "unknown" or BOUND in starts)
    if BOUND in starts:
        assert found.name == "nvidia-source-code-license-nc"
        assert "non-commercial" in found.text


@pytest.mark.parametrize("chosen", ["mit", "apache-2.0", "cc-by-4.0"])
def test_a_restrictive_licence_cannot_be_replaced(chosen: str) -> None:
    with pytest.raises(UserError, match=r"--license .*fastervit_0.*non-commercial"):
        licences.licence_of([OWN, BOUND], True, chosen)


def test_every_licence_of_the_published_weights_is_understood() -> None:
    for card in cards(task=None):
        if card.url:
            start = {"name": card.name, "licence": card.licence, "url": card.url}
            found = licences.licence_of([start], True)
            free = card.licence.lower().startswith(("mit (rep", "mit (code", "apache"))
            assert (found.word in ("mit", "apache-2.0")) == free, card.licence
            assert bool(found.warning) == (not free), card.licence
            assert bool(store.licence_notice(card)) <= bool(found.warning)


def test_provenance_is_copied_from_file_to_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights, a run from them, its folder for the hub, and a run from that."""
    card = store.find("fastervit_0")
    monkeypatch.setattr(store, "cached", lambda one, **_: tmp_path / "published.pth" if one is card else None)
    config = Config(dict(model=dict(name="fastervit_0")))
    first = provenance.start_of(tmp_path / "published.pth", config)
    assert first == [{"name": card.name, "licence": card.licence, "url": card.url}]
    run = make(meta={"training": {"start": first}, "started": True})
    second = provenance.start_of(run / "final.pth", config)
    assert [start["name"] for start in second] == ["final.pth", card.name]
    third = provenance.start_of(exported(run) / "model.safetensors", config)
    assert [start["name"] for start in third] == ["model.safetensors", card.name]
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pth")
    assert provenance.start_of(tmp_path / "other.pth", config)[0]["licence"] == "unknown"
    assert provenance.start_of(None, config) == []


# The command line -----------------------------------------------------------------------------------------------------


def test_export_prints_the_path_and_the_licence(make: Make, call: Call, tmp_path: Path) -> None:
    run = make(meta={"training": {"start": [BOUND]}, "started": True})
    code, out, err = call("export", run, "--out", tmp_path / "model")
    assert (code, out) == (0, f"{tmp_path / 'model'}\n")
    assert re.fullmatch(r"note: fastervit_0, which the training started from, is for non-commercial use only .*\n", err)
    code, out, err = call("export", run, "--out", tmp_path / "free", "--license", "mit")
    assert code == 2
    assert "non-commercial" in err
    assert not (tmp_path / "free").exists()


def test_without_out_the_folder_lies_in_the_run(make: Make, call: Call) -> None:
    run = make()
    assert call("export", run)[:2] == (0, f"{run / 'hub'}\n")
    assert sorted(file.name for file in (run / "hub").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "--force" in call("export", run)[2]
    assert call("export", run, "--force")[0] == 0


def test_existing_files_are_kept_without_force(make: Make, call: Call, tmp_path: Path) -> None:
    run, out = make(), tmp_path / "model"
    out.mkdir()
    assert call("export", run, "--out", out)[0] == 0, "an empty folder is nobody's"
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("mine")
    code, _, err = call("export", run, "--out", out)
    assert code == 2
    assert "--force" in err
    assert (out / "README.md").read_text() == "mine"
    assert call("export", run, "--out", out, "--force")[0] == 0
    assert (out / "README.md").read_text().startswith("---\n")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere", "--out", "x"], "nowhere: no such file or run folder"),
        (["run", "--out", "run"], "is the folder of the weights themselves"),
        (["run", "--out", "run/final.pth"], "is a file"),
        (["run", "--out", "run/final.pth/x"], "cannot be written"),
        (["bare.pth", "--out", "x"], "does not contain its config"),
        (["run", "--out", "x", "--license", "All Rights!"], "--license 'All Rights!'"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    make: Make, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    make()
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1)}, "bare.pth")
    code, out, err = call("export", *argv)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err), err
    assert says in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bare.pth", "final.pth", "run"]


def test_a_full_disk_leaves_nothing(make: Make, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()

    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.card, "text", full)
    code, _, err = call("export", run, "--out", tmp_path / "model")
    assert code == 2
    assert "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
