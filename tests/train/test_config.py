"""Configs are found by name or path, and options are checked."""

import re
from pathlib import Path

import pytest

from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import TASKS, find_config, list_configs


def test_every_shipped_config_loads_and_says_how_to_run_it() -> None:
    configs = list_configs()
    assert {"biformer_tiny_digits", *(f"biformer_{v}_300e_in1k" for v in ("tiny", "small", "base", "stl"))} <= set(
        configs
    )
    for name, path in configs.items():
        config = load_config(name)
        assert config.task in TASKS
        assert path.parent.name in (config.task, "configs")
        assert re.search(rf"train {name}\b", path.read_text()), f"{name} does not show its command"


def test_found_by_name_by_file_name_and_by_path(tmp_path: Path) -> None:
    shipped = find_config("biformer_tiny_digits")
    assert find_config("biformer_tiny_digits.py") == shipped == find_config(str(shipped))
    own = tmp_path / "mine.py"
    own.write_text(f"_base_ = [{str(shipped)!r}]\ntrain_cfg = dict(max_epochs=3)\n")
    assert load_config(own).train_cfg.max_epochs == 3
    assert load_config(own).model.name == "biformer_tiny"


def test_unknown_config_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown config 'biformer_tiny_digit'.*biformer_tiny_digits"):
        find_config("biformer_tiny_digit")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("task = 'classification'\nx = (", "config .*SyntaxError"), ("x = 1\n", "has to set task"), ("1 / 0", "Zero")],
)
def test_broken_config_files(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        load_config(path)


def test_option_values() -> None:
    config = load_config(
        "biformer_tiny_digits",
        [
            "train_cfg.max_epochs=3",
            "optim_wrapper.optimizer.lr=1e-4",
            "model.name=resnet10t",
            "model.mixup={'mixup_alpha': 0.5}",
            "model.mixup.prob=0.3",
            "model.new.deep=1",
            "data_root=a b=c",
            "val_evaluator.topk=1,3",
            "optim_wrapper.optimizer.betas=(0.8, 0.9)",
            "train_dataloader.drop_last=false",
            "class_names=cat,dog",
            "param_scheduler.0.end=7",
        ],
    )
    assert config.train_cfg.max_epochs == 3
    assert config.optim_wrapper.optimizer.lr == 1e-4
    assert config.model.name == "resnet10t"
    assert config.model.mixup == {"mixup_alpha": 0.5, "prob": 0.3}
    assert config.model.new == {"deep": 1}
    assert config.data_root == "a b=c"
    assert config.val_evaluator.topk == (1, 3)
    assert config.optim_wrapper.optimizer.betas == (0.8, 0.9)
    assert config.train_dataloader.drop_last is False
    assert config.class_names == ["cat", "dog"]
    assert config.param_scheduler[0].end == 7


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("train_cfg.max_epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("train_cfg..max_epochs=3", "expected key=value"),
        ("trian_cfg.max_epochs=3", "no 'trian_cfg'; did you mean train_cfg"),
        ("task.deep=3", "task is 'classification', nothing can be set inside it"),
        ("param_scheduler.9.end=3", "param_scheduler has the elements 0 to 1, not 9"),
        ("val_evaluator.topk=(1, x", "no Python literal"),
    ],
)
def test_malformed_options(option: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config("biformer_tiny_digits", [option])
