"""After training: what a run's folder or checkpoint knows, and what `test` and `predict` make of it, for each task.

One run of one epoch a task, on crops of photographs, as the command line leaves it; every test starts from a copy.
"""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_folders as folders
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hybridzoo.__main__ import main
from hybridzoo.train import engine, results, trained
from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub import remote
from hybridzoo.train.scenes import quietly
from hybridzoo.train.weights import find_weights

RECIPES = {
    "classification": ("finetune", "--img-size", "64"),
    "detection": ("mask-rcnn_biformer_tiny_digits",),
    "segmentation": ("segformer_biformer_tiny_digits",),
}
EACH = pytest.mark.parametrize("task", RECIPES)
NETWORK = "test_resnet"
MAIN = {"classification": "accuracy/top1", "detection": "coco/bbox_mAP", "segmentation": "mIoU"}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="session")
def trained_once(home: Path) -> Callable[[str], tuple[Path, Path]]:
    """Task -> (the run's folder, its data); trained when a test first asks for it."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(task: str) -> tuple[Path, Path]:
        if task not in made:
            data = getattr(folders, task)(home / f"data-{task}")
            run = home / f"run-{task}"
            recipe, *options = RECIPES[task]
            argv = ["train", recipe, "--model", NETWORK, "--data", str(data), "--work-dir", str(run), *options]
            argv += ["--epochs", "1", "--batch-size", "2", "--weights", "none", "--no-wandb", "--seed", "1"]
            assert main(argv) == 0
            made[task] = run, data
        return made[task]

    return get


@pytest.fixture
def run(trained_once, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the task's run, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_once(task)[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def data(trained_once, task: str) -> Path:
    return trained_once(task)[1]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def pictures_of(data: Path, task: str) -> Path:
    return data / "val" if task == "classification" else data / "images/val"


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    return file


# The checkpoint alone ---------------------------------------------------------------------------------------------


@EACH
def test_a_checkpoint_works_without_its_run_folder(task, run, data, call, tmp_path):
    """Moved to another folder and under another name, it gives the score that its training ended with."""
    trained_to = results.read(run)
    alone = tmp_path / "elsewhere" / "weights.pth"
    alone.parent.mkdir()
    shutil.move(run / "final.pth", alone)
    shutil.rmtree(run)
    code, out, err = call("test", alone)  # the data still lie where they were
    assert code == 0, err
    recipe = RECIPES[task][0]
    found = results.read(tmp_path / "work_dirs" / f"{recipe}_{NETWORK}")
    assert found["metrics"] == pytest.approx(trained_to["metrics"])
    assert found["per_class"] == trained_to["per_class"]
    assert found["confusion_matrix"] == trained_to["confusion_matrix"]
    assert all(row["class"] in out for row in found["per_class"])
    assert [path.name for path in alone.parent.iterdir()] == ["weights.pth"], "a lone file's folder is left as it is"

    code, out, err = call("predict", alone, pictures_of(data, task), "--score", "0.1")
    assert code == 0, err
    assert "drawn in predictions" in out
    drawn = {path.relative_to("predictions") for path in Path("predictions").rglob("*.png")}
    assert drawn == {path.relative_to(pictures_of(data, task)) for path in pictures_of(data, task).rglob("*.png")}


@EACH
def test_a_run_folder_gives_its_final_weights_and_receives_the_results(task, run, data, call):
    for name in (results.NAME, "confusion_matrix.png"):
        assert (run / name).is_file(), "training leaves its own"
        (run / name).unlink()
    assert (run / "curves.png").is_file()
    code, out, err = call("test", run, "--data", data)
    assert code == 0, err
    assert f"checkpoint: {run / 'final.pth'}" in out
    content = results.read(run)
    assert content["task"] == task
    assert content["checkpoint"] == str(run / "final.pth")
    assert content["data"] == str(data)
    assert content["options"] == {"tta": False, "slide": None}
    assert [row["class"] for row in content["per_class"]] == content["classes"]
    for name in ("confusion_matrix.png", *["pr_curves.png"] * (task == "detection")):
        assert min(Image.open(run / name).size) > 300
    assert f"results: {run / 'results.json'}, confusion_matrix.png" in out

    (run / "final.pth").unlink()
    assert trained.find(run).name.startswith("best_")
    for path in run.glob("best_*"):
        path.unlink()
    assert trained.find(run).name == "epoch_1.pth"
    (run / "epoch_1.pth").unlink()
    code, _, err = call("predict", run, data)
    assert code == 2
    assert "holds no checkpoint" in err


@EACH
def test_a_hub_folder_can_be_used_like_a_run(task, run, data, call, tmp_path):
    """The same scores and predictions; the card has the scores, and nothing says where this machine keeps its data."""
    trained_to = results.read(run)
    code, out, err = call("hub", "export", run, "--out", "model", "--license", "mit")
    assert (code, out) == (0, "model\n"), err
    shutil.rmtree(run)
    for file in Path("model").iterdir():
        assert str(data.parent).encode() not in file.read_bytes(), file.name
    card = ModelCard.load("model/README.md")
    values = {result.metric_value for result in card.data.eval_results}
    assert round(trained_to["metrics"][MAIN[task]], 4) in values
    assert card.data.pipeline_tag == {"classification": "image-classification", "detection": "object-detection",
                                      "segmentation": "image-segmentation"}[task]  # fmt: skip
    code, _, err = call("test", "model")
    assert code == 2
    assert "--data" in err, "a folder for others does not know where the data lie"
    code, out, err = call("test", "model", "--data", data, "--work-dir", "scores")
    assert code == 0, err
    assert results.read(Path("scores"))["metrics"] == pytest.approx(trained_to["metrics"])
    code, out, err = call("predict", "model", pictures_of(data, task), "--score", "0.1")
    assert code == 0, err
    assert "drawn in predictions" in out
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    if task != "classification":
        known: dict[str, Any] = {}
        exec(compile(block.replace("hf-hub:USER/NAME", "model"), "README.md", "exec"), known)
        assert list(known["model"].dataset_meta["classes"]) == trained_to["classes"]


@EACH
def test_a_training_starts_from_the_hub(task, run, data, call, hub):
    """`train --weights hf-hub:USER/NAME`; a folder for the hub, and a run's folder, are taken too."""
    assert call("hub", "export", run, "--out", "model")[0] == 0
    remote.push(Path("model"), "me/model")
    recipe, *options = RECIPES[task]
    argv = ["train", recipe, "--model", NETWORK, "--data", data, "--work-dir", "next", *options, "--epochs", "1"]
    code, _, err = call(*argv, "--batch-size", "2", "--lr", "1e-9", "--no-wandb", "--weights", "hf-hub:me/model")
    assert code == 0, err
    before, after = (torch.load(folder / "final.pth", weights_only=True) for folder in (run, Path("next")))
    for name, value in before["state_dict"].items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(after["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    assert after["meta"]["training"]["start"][0]["name"] == "me/model"
    assert find_weights("model") == Path("model/model.safetensors")
    assert find_weights(run) == run / "final.pth"


@EACH
def test_a_config_may_be_named_but_not_contradict(task, run, data, call):
    recipe, picture = RECIPES[task][0], next(pictures_of(data, task).rglob("*.png"))
    dumped = next(run.glob("*.py"))
    for argv in (["predict", dumped, run / "final.pth", picture], ["predict", run, picture, "--config", dumped]):
        code, _, err = call(*argv)
        assert code == 0, err
    code, _, err = call("predict", recipe, run / "final.pth", picture)
    assert code == 2
    assert re.search(rf"was trained with model(\.backbone)?\.name='{NETWORK}', the config says '\w+'; leave", err), err
    other = {"classification": "mask-rcnn", "detection": "finetune", "segmentation": "finetune"}[task]
    code, _, err = call("test", other, run)
    assert code == 2
    assert f"was trained with task='{task}', the config says '" in err
    with pytest.raises(UserError, match="leave the config out"):
        engine.build_for_inference(load_config(recipe), run / "final.pth")


def test_unknown_and_ambiguous_arguments(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("finetune").mkdir()
    Path("photo.png").touch()
    Path("work_dirs/finetune_resnet18").mkdir(parents=True)
    for argv, parts in [
        (["test", "upernet"], ["upernet is a config", "hybridzoo test RUN_OR_FILE"]),
        (
            ["predict", "finetune", "photo.png"],
            ["finetune is a config's name, and a file or folder here", "./finetune"],
        ),
        (["test", "runs/nothing"], ["runs/nothing: no such file or run folder"]),
        (["test", "work_dirs/resnet18"], ["did you mean work_dirs/finetune_resnet18?"]),
        (["test", "finetune_resnet"], ["work_dirs/finetune_resnet18"]),
        (["test", "upernt"], ["upernt", "did you mean upernet"]),
        (["predict", "./finetune", "photo.png"], ["finetune: holds no checkpoint"]),
        (["predict", "photo.png", "nowhere.png"], ["nowhere.png: no such file"]),
        (["predict", "photo.png"], ["Missing argument 'PICTURES'"]),
        (["test", "photo.png", "photo.png"], ["one run or checkpoint at a time"]),
        (["test", "photo.png", "--stride", "32"], ["--stride 32: is the step of --slide"]),
    ]:
        code, _, err = call(*argv)
        assert code == 2, argv
        assert all(part in err for part in parts), err
        assert err.count("\n") == 1


# Nothing in a file is believed ------------------------------------------------------------------------------------


def at(setup: dict[str, Any], place: str, value: Any) -> None:
    *path, last = place.split(".")
    for key in path:
        setup = setup[int(key)] if isinstance(setup, list) else setup[key]
    setup[last] = value


EVIL = [
    ("model.type", "os.system", "is no name of a type"),
    ("model.type", "subprocess.Popen", "is no name of a type"),
    ("model.type", "mmengine.Config", "is not known here"),
    ("model.backbone.type", "__import__('os').system('touch pwned')", "is no name of a type"),
    ("model.test_cfg.rcnn.nms.type", "eval", "is not known here"),
    ("model.test_cfg.rcnn.nms.type", "__import__('os').system('touch pwned')", "is no name of a type"),
    ("model.backbone.name", "hf-hub:somebody/network", "is no word of a config"),
    ("model.backbone.name", "local-dir:/tmp/network", "is no word of a config"),
    ("model.backbone.checkpoint_path", "weights.pth", "names a file"),
    ("model.backbone.pretrained_cfg", {"file": "weights.pth"}, "names a file"),
    ("model.backbone.pretrained", "torchvision", "names a file"),
    ("model.init_cfg", {"type": "Pretrained", "checkpoint": "x.pth"}, "names a file"),
    ("model.teacher_config", "evil.py", "names a file"),
    ("model.backbone.other", "evil.py", "is no word of a config"),
    ("model.backbone.other", "../../etc", "is no word of a config"),
    ("model.backbone.other", "a;b", "is no word of a config"),
    ("model.backbone._scope_", "os", "is no package that is known here"),
    ("model.backbone.__class__", 1, "is under no name of a setting"),
    ("model.backbone.width", 1e300, "is no number of a config"),
    ("model.language_model", {"type": "BertModel", "name": "bert-base-uncased"}, "is not known here"),
    ("model.roi_head.bbox_head.num_classes", 1 << 40, "is no number of a config"),
    ("custom_imports", {"imports": ["os"]}, "holds other things"),
    ("input", {"type": "LoadImageFromFile"}, "is no config"),
    ("input.0.type", "Compose.x", "is no name of a type"),
    ("input.0.backend_args", {"backend": "petrel"}, "names a file"),
    ("metric", {"type": "DumpDetResults", "out_file_path": "x.pkl"}, "is none"),
    ("metric.outfile_prefix", "x", "is none"),
    ("digits", {"kind": "scenes", "root": "/tmp/x"}, "is none"),
    ("name", "../../x", "is none"),
    ("task", "sabotage", "is none"),
    ("batch_size", 1 << 30, "is none"),
    ("format", 2, "has format 2, this hybridzoo reads 1"),
]


def test_a_hostile_setup_is_refused_in_one_line(trained_once, tmp_path, monkeypatch, call):
    """Nothing is imported, evaluated, fetched or written; each refusal names the file and the place."""
    monkeypatch.chdir(tmp_path)
    run, _ = trained_once("detection")
    good = torch.load(run / "final.pth", weights_only=True)
    Image.new("RGB", (32, 32)).save("x.png")
    (tmp_path / "evil.py").write_text("open('pwned', 'w')")
    before = set(tmp_path.iterdir()) | {tmp_path / "bad.pth"}
    for place, value, why in EVIL:
        content = {**good, "meta": copy.deepcopy(good["meta"])}
        at(content["meta"]["setup"], place, value)
        torch.save(content, "bad.pth")
        with pytest.raises(UserError) as caught:
            trained.load(Path("bad.pth"))
        assert why in str(caught.value), (place, str(caught.value))
        assert str(caught.value).startswith("checkpoint bad.pth: "), place
        assert "\n" not in str(caught.value)
    code, _, err = call("predict", "bad.pth", "x.png")
    assert (code, err.count("\n")) == (2, 1)
    for setup in ("text", [1], {"format": True}, {"format": 1}):
        content["meta"]["setup"] = setup
        torch.save(content, "bad.pth")
        with pytest.raises(UserError, match=r"checkpoint bad.pth: its setup"):
            trained.load(Path("bad.pth"))
    assert set(tmp_path.iterdir()) == before


def test_a_setup_that_does_not_fit_the_weights_is_refused_quickly(trained_once, tmp_path):
    run, _ = trained_once("classification")
    good = torch.load(run / "final.pth", weights_only=True)
    for change, why in [
        ({"name": "maxvit_xlarge"}, "describes far more than its weights"),
        ({"name": "test_resnet2"}, "test_resnet2"),
        ({"name": "resnet18"}, "do not fit its own config|far more"),
        ({"num_classes": 7}, "do not fit its own config: .*of another shape"),
        ({"no_such_argument": 7}, "no_such_argument"),
    ]:
        content = {**good, "meta": copy.deepcopy(good["meta"])}
        content["meta"]["setup"]["model"].update(change)
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=why):
            trained.load(tmp_path / "bad.pth")


def test_weights_without_a_config_ask_for_one(trained_once, tmp_path, call):
    """As all that other programs write; the text of a config in a file is never evaluated."""
    run, data = trained_once("classification")
    file = tmp_path / "old.pth"
    shutil.copy(run / "final.pth", file)
    evil = f"open({str(tmp_path / 'pwned')!r}, 'w')"
    changed(file, lambda content: content["meta"].update(setup=None, cfg=evil, config=evil))
    code, _, err = call("predict", file, data / "val")
    assert code == 2
    assert "does not contain its config" in err
    assert f"CONFIG {file}" in err
    code, _, err = call("predict", next(run.glob("*.py")), file, data / "val", "--out", tmp_path / "out")
    assert code == 0, err
    assert not (tmp_path / "pwned").exists()


# Results ----------------------------------------------------------------------------------------------------------


@EACH
def test_results_class_by_class_agree_with_the_metrics(task, run):
    content = results.read(run)
    rows, metrics = content["per_class"], content["metrics"]
    counts = np.array(content["confusion_matrix"]["counts"])
    key = {"classification": "recall", "detection": "box AP", "segmentation": "iou"}[task]
    mean = np.mean([row[key] for row in rows])
    tolerance = 0.006 if task == "segmentation" else 1e-9  # mmseg rounds
    assert mean == pytest.approx(metrics[MAIN[task]], abs=tolerance)
    unit = {"classification": "images", "detection": "objects", "segmentation": "pixels"}[task]
    assert counts.sum(1)[: len(rows)].tolist() == [row[unit] for row in rows]
    if task == "detection":
        assert content["confusion_matrix"]["labels"][-1] == "(nothing)"
        assert {len(line) for line in content["pr_curves"]["mask"].values()} == {101}
        assert np.mean([row["mask AP50"] for row in rows]) == pytest.approx(metrics["coco/segm_mAP_50"])
    else:
        right = 100 * np.trace(counts) / counts.sum()
        assert right == pytest.approx(metrics["accuracy/top1" if task == "classification" else "aAcc"], abs=tolerance)


def reordered(data: Path, task: str, to: Path) -> Path:
    """The same data, whose two classes stand in the other order."""
    shutil.copytree(data, to)
    if task == "detection":
        for file in (to / "annotations").iterdir():
            content = json.loads(file.read_text())
            content["categories"] = [{"id": 7, "name": "cup"}, {"id": 9, "name": "cat"}]
            for entry in content["annotations"]:
                entry["category_id"] = {1: 9, 2: 7}[entry["category_id"]]
            file.write_text(json.dumps(content))
    else:
        (to / "classes.txt").write_text("cat\nbackground\n")
        for file in (to / "masks").rglob("*.png"):
            Image.fromarray(1 - np.array(Image.open(file))).save(file)
    return to


@pytest.mark.parametrize("task", ["detection", "segmentation"])  # classification: see test_resuming.py
def test_classes_in_another_order_are_mapped(task, run, data, call, tmp_path):
    """By the score: it is that of the training's own validation."""
    before = results.read(run)
    other = reordered(data, task, tmp_path / "other")
    code, _, err = call("test", run, "--data", other)
    assert code == 0, err
    after = results.read(run)
    assert after["metrics"] == pytest.approx(before["metrics"])
    assert after["per_class"] == before["per_class"]


@EACH
def test_other_classes_are_an_error_with_both_lists_and_missing_ones_are_explained(task, run, data, call, tmp_path):
    other = Path(shutil.copytree(data, tmp_path / "other"))
    if task == "classification":
        (other / "val/coffee").rename(other / "val/tea")
    elif task == "detection":
        file = other / "annotations/val.json"
        file.write_text(file.read_text().replace('"cup"', '"tea"'))
    else:
        (other / "classes.txt").write_text("background\ntea\n")
    known = {"classification": "chelsea, coffee", "detection": "cat, cup", "segmentation": "background, cat"}[task]
    theirs = known.rpartition(", ")[0] + ", tea"
    code, _, err = call("test", run, "--data", other)
    assert code == 2
    assert f"the model has no class 'tea', which cannot be scored; it knows {known.split(', ')[1]}, which" in err
    assert f"The data has {theirs}; the model has {known}" in err

    if task == "classification":
        shutil.rmtree(other / "val/tea")
    elif task == "detection":
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:1]
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 1]
        file.write_text(json.dumps(content))
    else:
        return
    code, out, err = call("test", run, "--data", other)
    assert code == 0, err
    assert f"class '{known.split(', ')[1]}' never occurs" in out
    row = results.read(run)["per_class"][1]
    assert row["recall"] is None
    assert row["images" if task == "classification" else "objects"] == 0


@EACH
def test_augmented_predictions_differ_and_have_the_same_form(task, run, data, call):
    code, _, err = call("test", run, "--tta", "--work-dir", "augmented")
    assert code == 0, err
    plain, augmented = results.read(run), results.read(Path("augmented"))
    assert augmented["options"]["tta"] is True
    assert augmented["metrics"].keys() == plain["metrics"].keys()
    assert augmented["confusion_matrix"]["labels"] == plain["confusion_matrix"]["labels"]

    picture = next(pictures_of(data, task).rglob("*.png"))
    mirrored = Path("mirrored.png")
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    seen = {}
    for file in (picture, mirrored):
        code, _, err = call(*("predict", run, file, "--tta", "--json", "--no-draw", "--score", 0))
        assert code == 0, err
        seen[file] = json.loads(Path("predictions/predictions.json").read_text())
    one, other = seen.values()
    if task == "classification":  # the mean of an image and its mirror image is its mirror image's too
        assert [p["probability"] for p in one[0]["predictions"]] == pytest.approx(
            [p["probability"] for p in other[0]["predictions"]], abs=1e-5
        )
    elif task == "segmentation":
        shares = [{c["class"]: c["share"] for c in answer[0]["classes"]} for answer in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=0.02)
    else:
        assert one[0]["score"] == pytest.approx(other[0]["score"], abs=1e-3)
        left = 96 - other[0]["bbox"][0] - other[0]["bbox"][2]
        assert left == pytest.approx(one[0]["bbox"][0], abs=0.5)
        assert one[0]["segmentation"]["size"] == [80, 96]


@pytest.mark.parametrize("task", ["segmentation"])
def test_windows_slide_over_a_picture(task, run, data, call, monkeypatch):
    from mmseg.models import EncoderDecoder

    seen = []
    slide = EncoderDecoder.slide_inference
    monkeypatch.setattr(
        EncoderDecoder, "slide_inference", lambda self, *a: (seen.append(dict(self.test_cfg)), slide(self, *a))[1]
    )
    code, _, err = call("test", run, "--slide", 64, "--stride", 32, "--work-dir", "windows")
    assert code == 0, err
    assert len(seen) == 2
    assert seen[0] == {"mode": "slide", "crop_size": (64, 64), "stride": (32, 32)}
    assert results.read(Path("windows"))["options"]["slide"] == [64, 32]
    assert results.read(Path("windows"))["metrics"] != results.read(run)["metrics"]
    code, _, err = call("predict", run, pictures_of(data, task), "--slide", 48, "--no-draw")
    assert code == 0, err
    assert seen[-1] == {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)}
    for argv, why in (
        (("--slide", 8), "give a side of 32"),
        (("--slide", 64, "--stride", 65), "a step up to the side"),
    ):
        code, _, err = call("test", run, *argv)
        assert code == 2
        assert why in err


@pytest.mark.parametrize("task", ["detection"])
def test_windows_are_for_segmentation(task, run, call):
    code, _, err = call("test", run, "--slide", 64)
    assert code == 2
    assert "windows are for segmentation, this is detection" in err


# Predictions as files ---------------------------------------------------------------------------------------------


@EACH
def test_predictions_are_written_for_other_programs(task, run, data, call):
    source = pictures_of(data, task)
    code, out, err = call("predict", run, source, "--json", "--csv", "seen/table.csv", "--score", 0, "--no-draw")
    assert code == 0, err
    assert not list(Path().rglob("predictions/*.png"))
    assert "written: seen/table.csv" in out
    found = json.loads(Path("predictions/predictions.json").read_text())
    rows = table(Path("seen/table.csv"))
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*.png"))
    assert sorted({row["image"] for row in rows}) == names
    assert sorted({entry["file_name"] for entry in found}) == names
    if task == "detection":
        assert len(rows) == len(found) > 10
        with quietly():
            truth = COCO(data / "annotations/val.json")
            answers = truth.loadRes(found)  # image ids are 1, 2, ... there too
            scores = {}
            for kind in ("bbox", "segm"):
                evaluation = COCOeval(truth, answers, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                scores[kind] = evaluation.stats[0]
        metrics = results.read(run)["metrics"]
        assert scores["bbox"] == pytest.approx(metrics["coco/bbox_mAP"], abs=1e-3)
        assert scores["segm"] == pytest.approx(metrics["coco/segm_mAP"], abs=1e-3)
    elif task == "classification":
        assert [sum(p["probability"] for p in entry["predictions"]) for entry in found] == pytest.approx(
            [1] * 4, abs=1e-5
        )
        assert [row["class"] for row in rows if row["rank"] == "1"] == [e["predictions"][0]["class"] for e in found]
    else:
        from pycocotools import mask as mask_tools

        for entry in found:
            covered = sum(mask_tools.decode(part["segmentation"]).astype(int) for part in entry["classes"])
            assert (covered == 1).all(), "every pixel has one class"
            assert [part["pixels"] for part in entry["classes"]] == [
                int(mask_tools.area(part["segmentation"])) for part in entry["classes"]
            ]
        assert {row["index"] for row in rows} <= {"0", "1"}


@pytest.mark.parametrize("task", ["classification"])
def test_one_bad_picture_does_not_stop_the_others(task, run, data, call, monkeypatch):
    """Named, left out, exit code 1; several sources at once, and bounded memory."""
    Path("photos").mkdir()
    for number in range(5):
        folders.crop("chelsea", seed=number).save(f"photos/{number}.png")
    Path("photos/2.png").write_bytes(Path("photos/1.png").read_bytes()[:300])
    code, out, err = call("predict", run, "photos", data / "val/coffee/0.png", "--csv", "--json")
    assert code == 1, err
    assert "5 pictures drawn in predictions, 1 image skipped" in out
    assert next(line for line in err.splitlines() if "photos/2.png" in line).startswith("skipped: ")
    rows = table(Path("predictions/predictions.csv"))
    assert {row["image"] for row in rows} == {f"photos/{n}.png" for n in (0, 1, 3, 4)} | {
        str(data / "val/coffee/0.png")
    }
    assert len(json.loads(Path("predictions/predictions.json").read_text())) == 5
    before = Path("predictions/predictions.csv").read_bytes()
    for path in Path("photos").iterdir():
        path.write_bytes(b"")
    code, _, err = call("predict", run, "photos", "--csv")
    assert code == 2
    assert "none of 5 images can be read" in err
    assert Path("predictions/predictions.csv").read_bytes() == before, "a failed one replaces nothing"
    assert not list(Path("predictions").glob(".*"))
