"""A run resumes only from its own complete, unchanged checkpoint; nothing in a file is executed."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine import Config
from mmengine.optim import OptimWrapper

from hybridzoo.train import classification, engine, resuming, run_folder
from hybridzoo.train.errors import UserError
from hybridzoo.train.weights import read_checkpoint

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def make_config() -> Callable[..., Config]:
    from hybridzoo.train.config import find_config, load_config

    def make(*options: str) -> Config:
        base = find_config("biformer_tiny_digits").parents[1] / "_base_" / "classification_digits.py"
        small = (
            "model.name=test_vit",
            "model.img_size=32",
            "train_cfg.max_epochs=2",
            "train_dataloader.batch_size=12",
            "optim_wrapper.optimizer.lr=1e-3",
            "param_scheduler=[{'type': 'CosineAnnealingLR', 'eta_min_ratio': 0.1, 'end': 6, 'by_epoch': True}]",
        )
        return load_config(base, [*small, *options])

    return make


@pytest.fixture(scope="module")
def finished(make_config: Any, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("finished")
    engine.train(make_config(), work_dir=folder, data=image_folder, wandb=False)
    return folder


@pytest.fixture(scope="module")
def configured(make_config: Any, image_folder: Path) -> Config:
    """The config as in the engine after the check of the data."""
    config = make_config("train_cfg.max_epochs=3")
    classification.configure(config, image_folder)
    return config


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the newest checkpoint holds."""
    content = torch.load(folder / "epoch_2.pth", weights_only=True)
    change(content)
    torch.save(content, folder / "epoch_2.pth")


def built(config: Config) -> tuple[torch.nn.Module, OptimWrapper]:
    """The network, and an optimizer as the run's."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS

    model = MODELS.build(copy.deepcopy(config.model))
    return model, build_optim_wrapper(model, copy.deepcopy(config.optim_wrapper))


def go_on(folder: Path, config: Config) -> None:
    """What the engine does with a checkpoint, up to the first step."""
    state = resuming.find(folder)
    assert state is not None
    state.check(config)
    model, optimizer = built(config)
    state.check_built(optimizer, None)
    model.load_state_dict(state.content["state_dict"])
    optimizer.load_state_dict(state.content["optimizer"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


# Wrong content --------------------------------------------------------------------------------------------------------


def setter(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return change


def first(content: dict[str, Any], key: str) -> Any:
    return content["optimizer"]["state"][0][key]


HEAD = "model.head.weight"
WRONG = {
    "no meta": (lambda c: c.pop("meta"), "does not say how many iterations its run had done"),
    "no epoch": (lambda c: c["meta"].pop("epoch"), "does not say how many iterations its run had done"),
    "epoch as text": (setter("meta", "epoch", to="2"), "does not say how many iterations its run had done"),
    "epoch below 0": (setter("meta", "epoch", to=-1), "does not say how many iterations its run had done"),
    "no seed": (lambda c: c["meta"].pop("seed"), "meta.seed is None"),
    "huge seed": (setter("meta", "seed", to=1 << 40), "meta.seed is 1099511627776"),
    "no message_hub": (lambda c: c.pop("message_hub"), "has no 'message_hub'"),
    "message_hub as text": (setter("message_hub", to="hub"), "another kind of 'message_hub'"),
    "optimizer as a list": (setter("optimizer", to=[]), "another kind of 'optimizer'"),
    "no optimizer state": (lambda c: c["optimizer"].pop("state"), "'optimizer' is no optimizer's state"),
    "no weights": (lambda c: c.pop("state_dict"), "has no 'state_dict'"),
    "empty weights": (setter("state_dict", to={}), "missing, first"),
    "another task": (setter("meta", "task", to="detection"), "is of detection, the config is of classification"),
    "a tensor too few": (lambda c: c["state_dict"].pop(HEAD), f"1 missing, first '{HEAD}'"),
    "a tensor too many": (setter("state_dict", "more", to=torch.zeros(1)), "1 unexpected, first 'more'"),
    "another shape": (
        setter("state_dict", HEAD, to=torch.zeros(3, 65)),
        r"of another shape, first 'model.head.weight'",
    ),
    "NaN": (lambda c: c["state_dict"][HEAD][0].fill_(torch.nan), f"1 not finite, first '{HEAD}'"),
    "float64 too large": (setter("state_dict", HEAD, to=torch.full((3, 64), 1e300, dtype=torch.float64)), "too large"),
    "integers": (setter("state_dict", HEAD, to=torch.ones(3, 64).int()), "another kind of numbers"),
    "complex": (setter("state_dict", HEAD, to=torch.ones(3, 64) * 1j), "another kind of numbers"),
    "sparse": (setter("state_dict", HEAD, to=torch.ones(3, 64).to_sparse()), f"{HEAD} is sparse"),
    "stride 0": (setter("state_dict", HEAD, to=torch.ones(1).expand(3, 64)), "of which the file holds fewer"),
    "text for a tensor": (setter("state_dict", HEAD, to="weights"), f"{HEAD} is not a tensor"),
    "average of another network": (
        setter("ema_state_dict", to={"steps": torch.tensor(1)}),
        "ema_state_dict does not fit",
    ),
    "average without a count": (setter("ema_state_dict", to={}), "ema_state_dict.steps is not a count"),
    "more classes": (setter("meta", "class_names", to=[*CLASSES, "white"]), "on 4 classes .*white.* the data has 3"),
    "other classes": (setter("meta", "class_names", to=["a", "b", "c"]), r"\(a, b, c\), .* 3 \(blue, green, red\)"),
    "another order": (
        setter("meta", "class_names", to=CLASSES[::-1]),
        r"\(red, green, blue\), .* \(blue, green, red\)",
    ),
    "numbers for names": (setter("meta", "class_names", to=[1, 2, 3]), "the class name 1 is not a name"),
    "names as text": (setter("meta", "class_names", to="abc"), "its class names are not a list"),
    "an empty name": (setter("meta", "class_names", to=["a", " ", "c"]), "the class name ' ' is not a name"),
    "a long name": (setter("meta", "class_names", to=["a" * 9999, "b", "c"]), "is not a name"),
    "a name twice": (setter("meta", "class_names", to=["a", "b", "a"]), "the class name 'a' is repeated"),
    "ids that lead elsewhere": (
        setter("message_hub", "runtime_info", "keep_ckpt_ids", to=["../../x"]),
        "keep_ckpt_ids is ",
    ),
    "a best score that is text": (
        setter("message_hub", "runtime_info", "best_score", to="best"),
        "best_score is 'best'",
    ),
    "another shape in the optimizer": (
        lambda c: first(c, "exp_avg").resize_(1, 1, 7),
        r"optimizer.state\[0\].exp_avg has shape \(1, 1, 7\)",
    ),
    "NaN in the optimizer": (lambda c: first(c, "exp_avg").fill_(torch.nan), "exp_avg is not finite"),
    "a moment missing": (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "the optimizer keeps "),
    "no moments": (setter("optimizer", "state", to={}), "optimizer.state is empty"),
    "moments of no parameter": (setter("optimizer", "state", 9999, to={}), "belongs to no parameter"),
    "other groups": (setter("optimizer", "param_groups", to=[]), "the optimizer has 0 groups"),
    "a group of others": (lambda c: c["optimizer"]["param_groups"][0]["params"].reverse(), "has other parameters"),
    "a rate as text": (
        lambda c: c["optimizer"]["param_groups"][0].update(lr="fast"),
        r"param_groups\[0\].lr is 'fast'",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_content_is_one_line(folder: Path, configured: Config, kind: str) -> None:
    (folder / "epoch_1.pth").unlink()  # else the run would go on from it where the newest says nothing of itself
    change, reason = WRONG[kind]
    changed(folder, change)
    with pytest.raises(UserError, match=reason) as caught:
        go_on(folder, configured)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_valid_content_resumes(folder: Path, configured: Config) -> None:
    go_on(folder, configured)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested dictionaries and lists, including containers."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += leaves(value, (*path, key))
    return found


STRANGE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: "text", lambda: -1, lambda: 1 << 60, lambda: 1e300, lambda: float("nan"), lambda: True,
    list, dict, lambda: [[1]], lambda: {"a": {1: 2}}, lambda: b"bytes", lambda: (1, 2),
    lambda: torch.tensor(float("nan")), lambda: torch.zeros(3), lambda: torch.zeros(2, 2) * 1j,
    lambda: torch.eye(2).to_sparse(), lambda: torch.zeros(1).expand(1 << 40), lambda: torch.empty(2, device="meta"),
    lambda: torch.zeros(3, dtype=torch.int64), lambda: "\x1b[2J[/red]", lambda: "../../etc/passwd",
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_one_line_or_harmless(
    finished: Path, tmp_path: Path, configured: Config, data: st.DataObject
) -> None:
    """Some values of a good checkpoint are taken out or replaced by what does not belong there."""
    content = torch.load(finished / "epoch_2.pth", weights_only=True)
    # Half of the changes outside the two long lists of tensors, where every line of the checks is.
    short = {**content, "state_dict": {}, "optimizer": {}}
    for _ in range(data.draw(st.integers(1, 2))):
        places = leaves(short if data.draw(st.booleans()) else content)
        *path, last = data.draw(st.sampled_from(places))
        node = content
        for key in path:
            node = node[key] if isinstance(node, dict | list) and (isinstance(node, list) or key in node) else {}
        if not isinstance(node, dict | list) or (isinstance(node, list) and last >= len(node)):
            continue
        if data.draw(st.booleans()):
            node[last] = data.draw(st.sampled_from(STRANGE))()
        elif isinstance(node, list) or last in node:
            del node[last]
    torch.save(content, tmp_path / "epoch_2.pth")
    problem = ""
    try:
        go_on(tmp_path, configured)
        model, _ = built(configured)
        engine.load_weights(model, tmp_path / "epoch_2.pth", allow_head_mismatch=False)
    except UserError as error:
        problem = str(error)
    assert "\n" not in problem
    if not problem:  # nothing of what counts was touched
        good, found = read_checkpoint(finished / "epoch_2.pth"), read_checkpoint(tmp_path / "epoch_2.pth")
        for name, value in good["state_dict"].items():
            assert torch.equal(found["state_dict"][name].to(value.dtype), value)


# What a file asks for -------------------------------------------------------------------------------------------------


def test_nothing_in_a_checkpoint_is_evaluated(
    folder: Path, make_config: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """mmengine's own resume evaluates meta["config"]; others may evaluate meta["cfg"]."""
    monkeypatch.chdir(tmp_path)
    code = "import pathlib\npathlib.Path('exploded').touch()\ngpu_ids = [1, 2, 3]\n"
    changed(folder, lambda c: c["meta"].update(config=code, cfg=code))
    engine.train(make_config("train_cfg.max_epochs=3"), work_dir=folder, data=image_folder, wandb=False, resume=True)
    checkpoint = folder / "epoch_3.pth"
    changed(folder, lambda c: c["meta"].update(config=code, cfg=code))
    engine.test(make_config(), folder / "epoch_2.pth", work_dir=tmp_path / "test", data=image_folder)
    engine.build_for_inference(make_config(), folder / "epoch_2.pth", device="cpu")
    assert not list(tmp_path.rglob("exploded"))
    assert read_checkpoint(checkpoint)["meta"]["epoch"] == 3


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_mmengine_does_not_execute_code_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It falls back to Python's pickle where the safe reader refuses a file; models may ask it for weights."""
    from mmengine.runner import load_checkpoint

    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Bomb()}, "bomb.pth")
    with pytest.raises(UserError, match="only arbitrary code can rebuild"):
        load_checkpoint(torch.nn.Linear(1, 1), "bomb.pth")
    assert not Path("exploded").exists()


def test_a_copied_folder_does_not_change_the_original(
    folder: Path, make_config: Any, image_folder: Path, tmp_path: Path
) -> None:
    best = next(folder.glob("best_*.pth"))
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    worse = setter("message_hub", "runtime_info", "best_score", to=-1.0)  # so that the next epoch is the best
    changed(copied, worse)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    engine.train(make_config("train_cfg.max_epochs=3"), work_dir=copied, data=image_folder, wandb=False, resume=True)
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert not (copied / best.name).exists(), "the copy's old best checkpoint is its own"
    assert len(list(copied.glob("best_*.pth"))) == 1


@pytest.mark.parametrize("name", ["/etc/best_of.pth", "../victim.pth", "best_x/../../victim.pth", "run.json", ""])
def test_only_names_inside_the_folder_count(folder: Path, name: str) -> None:
    (folder.parent / "victim.pth").touch()
    changed(folder, setter("message_hub", "runtime_info", "best_ckpt", to=name))
    state = resuming.find(folder)
    assert state is not None
    assert "best_ckpt" not in state.content["message_hub"]["runtime_info"]
    assert state.content["message_hub"]["runtime_info"]["best_score"] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("model.depth=2",), r"does not fit test_vit: \d+ unexpected"),
        (("param_scheduler=[]",), "param_schedulers has 1 entries, the config makes 0"),
        (("optim_wrapper.optimizer={'type': 'SGD', 'lr': 0.1}",), "optimizer"),
    ],
)
def test_another_config_is_refused_and_nothing_changes(
    folder: Path, make_config: Any, image_folder: Path, options: tuple[str, ...], reason: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    config = make_config("train_cfg.max_epochs=3", *options)
    with pytest.raises(UserError, match=reason):
        engine.train(config, work_dir=folder, data=image_folder, wandb=False, resume=True)
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert run_folder.run_of(folder) == read_checkpoint(folder / "epoch_2.pth")["meta"]["run"]


def test_a_test_needs_the_same_classes(folder: Path, make_config: Any, image_folder: Path, tmp_path: Path) -> None:
    file = folder / "epoch_2.pth"
    score = engine.test(make_config(), file, work_dir=tmp_path / "before", data=image_folder)

    def other_way_round(content: dict[str, Any]) -> None:
        content["meta"]["class_names"] = CLASSES[::-1]
        for name, value in content["state_dict"].items():
            if name.startswith("model.head") and value.shape[:1] == (len(CLASSES),):
                content["state_dict"][name] = value.flip(0)

    assert score["accuracy/top1"] != 100 / len(CLASSES)  # what exchanged classes might score as well
    changed(folder, other_way_round)  # the same names in another order are the same classes
    assert engine.test(make_config(), file, work_dir=tmp_path / "after", data=image_folder) == score
    changed(folder, setter("meta", "class_names", to=[*CLASSES[:-1], "grey"]))
    with pytest.raises(UserError, match="the model has no class 'red'"):
        engine.test(make_config(), folder / "epoch_2.pth", work_dir=tmp_path / "test", data=image_folder)
    changed(folder, setter("meta", "class_names", to=["a"] * 200_000))
    with pytest.raises(UserError, match="its class names are not a list of at most 100,000"):
        engine.build_for_inference(make_config(), folder / "epoch_2.pth")
