"""Configs are found by name or path, and options are checked."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import find_config, recipes

DIGESTS = json.loads((Path(__file__).parent / "resolved_configs.json").read_text())


def test_every_recipe_loads_and_files_say_how_to_run_them() -> None:
    known = recipes()
    assert {"finetune", "biformer_tiny_digits", "biformer_stl_300e_in1k", "upernet_dinat_large_160k_ade20k"} <= set(
        known
    )
    for name, recipe in known.items():
        if name not in DIGESTS:  # those are loaded below
            assert load_config(name).task == recipe.task
        if not recipe.published:
            assert re.search(rf"train {name}\b", recipe.path.read_text()), f"{name} does not show its command"


def test_what_published_runs_resolve_to_stays() -> None:
    """Digests of the configs as they were one file each. Where one is meant to change, write the new digest here."""
    assert len(DIGESTS) == 83
    changed = [name for name, digest in DIGESTS.items() if resolved_digest(name) != digest]
    assert not changed


def resolved_digest(name: str) -> str:
    """Of a resolved config without what load_config adds for other entry points, and without the weights' name."""
    config = load_config(name).to_dict()
    for key in ("start", "custom_imports", "visualizer", "test_pipeline"):
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
