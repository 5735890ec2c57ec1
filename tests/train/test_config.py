"""Configs are found by name or path, and options are checked."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from mmengine import Config

from hybridzoo.train.config import load_config
from hybridzoo.train.errors import UserError
from hybridzoo.train.names import find_config, recipes
from hybridzoo.train.overrides import READ

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


def test_resolved_configs_of_published_runs_do_not_change() -> None:
    """Digests of the configs as they were one file each. Where one is meant to change, write the new digest here."""
    assert len(DIGESTS) == 83
    changed = [name for name, digest in DIGESTS.items() if resolved_digest(name) != digest]
    assert not changed


@pytest.mark.usefixtures("formatted")
def test_a_saved_config_is_formatted_and_says_the_same(tmp_path: Path) -> None:
    config = load_config("mask-rcnn_biformer_tiny_digits")
    config.dump(tmp_path / "saved.py")
    lines = (tmp_path / "saved.py").read_text().splitlines()
    assert len(lines) > 100
    assert sum(len(line) < 100 for line in lines) > 0.9 * len(lines)
    assert Config.fromfile(tmp_path / "saved.py").to_dict() == config.to_dict()


def resolved_digest(name: str) -> str:
    """Of a resolved config without what load_config adds for other entry points, and without the weights' name."""
    config = load_config(name).to_dict()
    for key in ("start", "custom_imports", "visualizer", "test_pipeline"):
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_recipe_is_found_by_name_file_name_and_path(tmp_path: Path) -> None:
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
    [("task = 'classification'\nx = (", "config .*SyntaxError"), ("x = 1\n", "must set task"), ("1 / 0", "Zero")],
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
        ("val_evaluator.topk=(1, x", "not a Python literal"),
    ],
)
def test_malformed_options(option: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config("biformer_tiny_digits", [option])


@pytest.mark.parametrize(
    ("config", "option", "parts"),
    [
        ("mask-rcnn_biformer_small_1x_coco", "max_epochs=3", ["max_epochs is only a variable", "no 'max_epochs'"]),
        ("mask-rcnn_biformer_small_1x_coco", "dataset_type=Mine", ["train_dataloader.dataset.type"]),
        ("mask-rcnn_biformer_small_1x_coco", "train_pipeline=[]", ["train_dataloader.dataset.pipeline"]),
        ("mask-rcnn_biformer_small_1x_coco", "backend_args.backend=local", ["backend_args"]),
        ("upernet", "norm_cfg.type=BN", ["norm_cfg is only a variable", "model.decode_head.norm_cfg"]),
        ("upernet", "crop_size=(64,64)", ["crop_size"]),
        ("upernet", "data_preprocessor.size=(64,64)", ["model.data_preprocessor"]),
        ("upernet", "test_pipeline.0.type=X", ["test_dataloader.dataset.pipeline"]),
        ("finetune", "_transform.input_size=64", ["_transform"]),
        ("finetune", "max_epochs=3", ["train_cfg.max_epochs (--epochs)"]),
        ("finetune", "batch_size=3", ["train_dataloader.batch_size (--batch-size)"]),
        ("finetune", "lr=3", ["optim_wrapper.optimizer.lr (--lr)"]),
        ("finetune", "epochs=3", ["--epochs"]),
        ("finetune", "workers=3", ["--workers"]),
    ],
)
def test_an_option_that_nothing_reads_suggests_another(config: str, option: str, parts: list[str]) -> None:
    """Variables of a config file, its own and those of mmdet's and mmseg's bases, and keys without their place."""
    with pytest.raises(UserError) as raised:
        load_config(config, [option])
    said = str(raised.value)
    assert said.startswith(f"option {option!r}: ")
    assert any(part in said for part in parts), said


def test_a_variable_that_other_values_depend_on_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('_base_ = "hybridzoo::finetune"\nmax_epochs = 7\ntrain_cfg = dict(max_epochs=max_epochs)\n')
    with pytest.raises(UserError, match=r"variable .* set train_cfg.max_epochs \(--epochs\) instead"):
        load_config(file, ["max_epochs=3"])


def test_every_top_level_key_of_our_recipes_is_read_or_refused() -> None:
    """Whatever stands at the top of a config: an option on it changes what is run, or is refused."""
    for name in ("finetune", "mask-rcnn", "dino", "upernet", "mask2former", "upernet_nat_tiny_160k_ade20k"):
        config = load_config(name)
        for key in set(config.keys()) - READ:
            with pytest.raises(UserError, match=f"{key} is only a variable"):
                load_config(name, [f"{key}=1"])


@pytest.mark.parametrize(
    ("recipe", "network", "option"),
    [
        ("finetune", "shvit_s1", "model.drop_path_rate=0.3"),  # has no such argument
        ("mask-rcnn", "efficientvit_msra_m0", "model.neck.num_outs=6"),  # gets another neck
        ("mask2former", "test_convnext", "model.decode_head.pixel_decoder.num_outs=2"),
    ],
)
def test_an_option_that_the_network_overrides_is_refused(recipe: str, network: str, option: str) -> None:
    pytest.importorskip("mmdet")
    with pytest.raises(UserError, match=option.partition("=")[0].rpartition(".")[2]):
        load_config(recipe, [option], model=network)


def test_an_element_of_a_tuple_is_set() -> None:
    assert load_config("mask-rcnn", ["optim_wrapper.optimizer.betas.1=0.95"]).optim_wrapper.optimizer.betas == [
        0.9,
        0.95,
    ]
