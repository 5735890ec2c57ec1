"""How the command line treats a person: at once, in one line, without a traceback."""

import re
import resource
import shutil
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from timm.models import model_entrypoint

from hybridzoo.__main__ import main
from hybridzoo.train import batchnorm, config_check, engine, interruptions, names, tracking
from hybridzoo.train.classification import ImageClassifier
from hybridzoo.train.config import load_config
from hybridzoo.train.engine import prepare
from hybridzoo.train.errors import UserError, explain
from hybridzoo.train.weights import read_checkpoint


def test_help_and_misspelt_names_are_fast():
    """Seconds of CPU time in a process of its own, start included: importing timm alone takes several times as much."""

    def seconds(*argv: str) -> tuple[float, int]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = subprocess.run([sys.executable, "-m", "hybridzoo", *argv], capture_output=True).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, code

    for argv, code in (
        (["--help"], 0),
        (["train", "--help"], 0),
        (["info", "biformer_tinny"], 2),
        (["info", "resnet_50"], 2),
        (["train", "biformer_tiny_digit"], 2),
        (["train", "biformer_tiny_digits", "--weights", "biformer_tinny"], 2),
        (["checkpoints", "download", "biformer_tinny"], 2),
        (["trian"], 2),
        (["list"], 0),
        (["info", "biformer_tiny"], 0),
    ):
        spent, returned = seconds(*argv)
        assert returned == code, argv
        assert spent < 0.7, (argv, spent)


def test_the_names_known_without_timm_are_those_that_timm_registers():
    registered = {name: model_entrypoint(name).__module__.startswith("hybridzoo.") for name in timm.list_models()}
    assert names.our_models() == [name for name, ours in registered.items() if ours], "in timm's order"
    assert names.timm_models() == {name for name in timm.list_models(module="") if not registered[name]}


TINY = ["model.name=test_resnet", "model.regions=none", "train_cfg.max_epochs=1", "train_dataloader.batch_size=4"]
MISTAKES = [  # options of a config that libraries would refuse with a traceback, or not read at all
    ("train_cfg.max_epoch=3", ["train_cfg.max_epoch=3", "max_epochs"]),
    ("train_cfg.max_epochs=many", ["train_cfg.max_epochs='many'", "whole number"]),
    ("train_cfg.max_epochs=1.5", ["max_epochs", "1.5"]),
    ("train_cfg.max_epochs=0", ["train_cfg.max_epochs=0", "at least 1"]),
    ("optim_wrapper.optimizer.learning_rate=3", ["optimizer.learning_rate=3", " lr,"]),
    ("optim_wrapper.optimizer.lr=high", ["optimizer.lr='high'", "a number"]),
    ("optim_wrapper.optimizer.lr=-1", ["optim_wrapper", "-1"]),
    ("optim_wrapper.optimizer.type=AdmW", ["optimizer", "AdmW"]),
    ("optim_wrapper.optimzer.lr=3", ["optimzer", "optimizer"]),
    ("optim_wrapper.clip_grad.max_nrm=3", ["max_nrm", "max_norm"]),
    ("optim_wrapper=nonsense", ["optim_wrapper='nonsense'", "dict"]),
    ("model.drop_path=0.1", ["model.drop_path=0.1", "test_resnet", "drop_path_rate"]),
    ("model.regions=7", ["model.regions=7", "test_resnet"]),
    ("model.name=test_resnett", ["test_resnett", "test_resnet"]),
    ("model.name=test_resnet.nowhere", ["nowhere", "hybridzoo info test_resnet"]),
    ("model.name=biformer_tiny model.regions=many", ["regions", "'many'"]),
    ("model.label_smoothing=x", ["label_smoothing='x'", "a number"]),
    ("model.label_smoothing=7", ["smoothing"]),
    ("model.mixup.mixup_alfa=3", ["mixup_alfa", "mixup_alpha"]),
    ("model=nonsense", ["model='nonsense'", "dict"]),
    ("train_dataloader.batchsize=3", ["batchsize", "batch_size"]),
    ("train_dataloader.batch_size=two", ["batch_size='two'", "whole number"]),
    ("train_dataloader.batch_size=0", ["batch_size=0", "at least 1"]),
    ("train_dataloader.batch_size=999", ["batch_size=999", "smaller"]),
    ("train_dataloader.num_workers=-1", ["num_workers=-1", "at least 0"]),
    ("train_dataloader.sampler.type=Sampel", ["sampler", "Sampel"]),
    ("train_dataloader.dataset.split=nowhere", ["nowhere"]),
    ("train_dataloader.dataset.transform.hflipp=3", ["hflipp", "hflip"]),
    ("train_dataloader.dataset.transform.auto_augment=nonsense", ["nonsense"]),
    ("param_scheduler.0.beginn=3", ["beginn", "begin"]),
    ("param_scheduler.7.begin=3", ["param_scheduler", "7"]),
    ("default_hooks.checkpont.interval=3", ["default_hooks.checkpont", "checkpoint"]),
    ("default_hooks.checkpoint.intervall=3", ["intervall", "interval"]),
    ("default_hooks.checkpoint.interval=x", ["interval='x'", "whole number"]),
    ("custom_hooks=nonsense", ["custom_hooks='nonsense'", "list"]),
    ("val_evaluator.topp=3", ["topp", "topk"]),
    ("randomness.sed=3", ["randomness.sed", "seed"]),
    ("env_cfg.mp_cfg.start_method=spawn", ["start_method", "mp_start_method"]),
    ("task=nonsense", ["task='nonsense'", "segmentation"]),
    ("on_bad=nonsense", ["on_bad='nonsense'", "skip"]),
    ("task=detection", ["classification", "--recipes"]),
    ("train_cfg.max_epochs=-3", ["max_epochs=-3", "at least 1"]),
    ("train_dataloader.num_workers=1.5", ["num_workers=1.5", "whole number"]),
    ("train_dataloader.dataset.transform.input_size=0", ["input_size=0", "at least 1"]),
    ("optim_wrapper.optimizer.lr=1e999", ["lr=inf", "finite"]),
    ("optim_wrapper.clip_grad.max_norm=-1", ["max_norm=-1", "above 0"]),
    ("model.drop_rate=2", ["model.drop_rate=2", "below 1"]),
    ("model.drop_path_rate=-1", ["model.drop_path_rate=-1", "from 0"]),
    ("model.frozen_stages=99", ["freeze 99", "stages 0 to"]),
    ("model.type=Nothing", ["model", "Nothing"]),
    ("model.num_classes=7", ["model.num_classes=7", "has 3"]),
    ("param_scheduler.0.type=Nothing", ["no parameter scheduler called Nothing"]),
    ("default_hooks.timer.type=Nothing", ["no hook called Nothing"]),
    ("default_hooks.checkpoint.save_best=nothing_loss", ["nothing_loss", "accuracy/top1"]),
    ("val_evaluator.type=Nothing", ["no metric called Nothing"]),
    ("val_evaluator.topk=(0,)", ["topk=(0,)", "from 1"]),
    ("train_cfg.type=Nothing", ["no loop called Nothing"]),
    ("randomness.seed=-1", ["randomness.seed=-1", "from 0"]),
    ("compile=maybe", ["compile='maybe'", "true"]),
    ("device=tpu", ["--device tpu", "this machine has"]),
    ("launcher=pytorch", ["launcher='pytorch'", "use --launcher"]),
    ("data_root=elsewhere", ["data_root=elsewhere", "--data"]),
]
AFTER_STEPS = {"default_hooks.checkpoint.save_best=nothing_loss"}  # a validation tells


def failing(capsys, *argv):
    """The one line that a command prints before it exits with code 2."""
    code = main(argv)
    printed = capsys.readouterr()
    assert code == 2, printed.out
    assert re.fullmatch(r"error: .+\n", printed.err), printed.err
    return printed.err


@pytest.mark.parametrize(("option", "words"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_mistake_in_an_option_is_one_line(option, words, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [given for given in TINY if given.partition("=")[0] not in {o.partition("=")[0] for o in option.split()}]
    said = failing(
        capsys, "train", "biformer_tiny_digits", "--data", str(image_folder), "--no-wandb",
        "--cfg-options", *options, *option.split(),
    )  # fmt: skip
    for word in words:
        assert word in said
    assert option in AFTER_STEPS or not (tmp_path / "work_dirs").exists(), "a mistake leaves no folder behind"


@pytest.mark.parametrize(
    "words",
    ["--device tpu", "--device meta", "--freeze 99", "--img-size -3", "--epochs -2", "--lr nan", "--seed 99999999999"],
)
def test_a_mistake_in_a_short_option_leaves_no_folder(words, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = failing(capsys, "train", "test_resnet", "--data", str(image_folder), "--no-wandb", *words.split())
    assert words.split()[1] in said
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_does_not_change_an_older_folder(image_folder, tmp_path, run_config):
    """What lay there stays; what the run wrote before its first step goes."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "20260101_000000").mkdir()
    with pytest.raises(UserError, match="learning rate"):
        engine.train(run_config("optim_wrapper.optimizer.lr=-1"), work_dir=tmp_path, data=image_folder, wandb=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20260101_000000", "notes.txt"]


def test_a_run_that_made_a_step_keeps_its_folder(image_folder, tmp_path, run_config):
    config = run_config("custom_hooks=[{'type': 'TimmEMAHook', 'decay': 0.9}]", "optim_wrapper.optimizer.lr=1e30")
    with pytest.raises(UserError, match=r"is (nan|inf) at iteration"):
        engine.train(config, work_dir=tmp_path / "run", data=image_folder, wandb=False)
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_batch_of_one_is_refused_before_the_run_if_batchnorm_cannot_learn(image_folder, tmp_path, monkeypatch):
    """A network that ends in maps of one pixel; a transformer does not mind, nor do frozen BatchNorms."""
    monkeypatch.chdir(tmp_path)
    options = {"img_size": 32, "batch_size": 1}
    with pytest.raises(UserError, match=r"train_dataloader.batch_size=1: with one image of 32 px .*--batch-size 2"):
        engine.train(load_config("efficientvit_msra_m0", **options), data=image_folder, weights="none", wandb=False)
    assert list(tmp_path.iterdir()) == []
    batchnorm.single_images(load_config("test_vit", **options))
    batchnorm.single_images(load_config("efficientvit_msra_m0", img_size=32, batch_size=2))


@pytest.mark.parametrize(
    ("recipe", "network", "module"),
    [("upernet", "test_vit", "decode_head.psp_modules.0"), ("fpn", "test_vit", ""), ("mask-rcnn", "test_resnet", "")],
)
def test_a_pooled_map_of_one_image_is_found_in_a_dense_net(recipe, network, module):
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    config = load_config(recipe, model=network, batch_size=1)
    prepare(config)
    if module:
        with pytest.raises(UserError, match=f"{module}.*--batch-size 2"):
            batchnorm.single_images(config)
    else:
        batchnorm.single_images(config)


@pytest.mark.parametrize(
    ("config", "option", "words"),
    [
        (
            "mask-rcnn_biformer_tiny_digits",
            "model.backbone.drop_path=0.1",
            ["backbone.drop_path=0.1", "drop_path_rate"],
        ),
        ("mask-rcnn_biformer_tiny_digits", "model.test_cfg.rcnn.score_threshold=0.1", ["score_threshold", "score_thr"]),
        ("mask-rcnn_biformer_tiny_digits", "model.test_cfg.rcnn.max_per_image=9", ["max_per_image=9", "max_per_img"]),
        ("mask-rcnn_biformer_tiny_digits", "model.rpn_head.in_channel=10", ["in_channel", "in_channels"]),
        ("segformer_biformer_tiny_digits", "model.decode_head.chanels=10", ["chanels", "channels"]),
        ("segformer_biformer_tiny_digits", "model.backbone.name=maxvit_tiny", ["regions", "maxvit_tiny"]),
    ],
)
def test_dense_configs_report_it_too(config, option, words):
    pytest.importorskip("mmdet" if "rcnn" in config else "mmseg")
    with pytest.raises(UserError) as raised:
        prepare(load_config(config, [option]))
    for word in words:
        assert word in str(raised.value)


# Of the published runs of a recipe and a family, which differ in their rows' numbers, the first; the others in
# `make test-all`.
KINDS = {(recipe.path, recipe.network.partition("_")[0]): name for name, recipe in reversed(names.recipes().items())}


@pytest.mark.parametrize(
    "name",
    [
        name if name in {*KINDS.values()} else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in names.list_configs()
    ],
)
def test_our_own_configs_pass_the_checks(name):
    config = load_config(name)
    pytest.importorskip({"classification": "timm", "detection": "mmdet", "segmentation": "mmseg"}[config.task])
    prepare(config)
    assert list(config_check.problems(config.to_dict(), config_check.RUNNER)) == []


def test_resuming_on_other_classes_says_so(image_folder, tmp_path, run_config):
    engine.train(run_config("train_cfg.max_epochs=1"), work_dir=tmp_path / "run", data=image_folder, wandb=False)
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for split in ("train", "val"):
        shutil.rmtree(data / split / "red")
    with pytest.raises(UserError) as raised:
        engine.train(run_config(), work_dir=tmp_path / "run", data=data, wandb=False, resume=True)
    assert "trained on 3 classes (blue, green, red), the data has 2 (blue, green)" in str(raised.value)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_mixup_takes_an_odd_batch(size):
    classifier = ImageClassifier("test_resnet", num_classes=3, mixup=dict(mixup_alpha=1.0), label_smoothing=0.1)
    images, targets = torch.rand(size, 3, 32, 32), torch.arange(size) % 3
    mixed, soft = classifier._mix(images.clone(), targets)
    assert soft.shape == (size, 3)
    torch.testing.assert_close(soft.sum(1), torch.ones(size))
    if size % 2:
        assert torch.equal(mixed[-1], images[-1])
        assert soft[-1].argmax() == targets[-1]
    if size > 1:
        assert not torch.equal(mixed[0], images[0])
        assert torch.isfinite(classifier(images, targets, mode="loss")["loss"])


def test_a_last_batch_of_one_is_left_out_where_there_is_batchnorm(run_config, image_folder, tmp_path, capsys):
    """36 images in batches of 5: the last one has a single image."""
    options = ["train_cfg.max_epochs=1", "train_dataloader.batch_size=5", "train_dataloader.drop_last=False"]
    for model, batches in (("test_resnet", 7), ("test_vit", 8)):
        config = run_config(*options, f"model.name={model}")
        if model == "test_resnet":
            config.model.pop("img_size")
        engine.train(config, work_dir=tmp_path / model, data=image_folder, wandb=False)
        assert read_checkpoint(tmp_path / model / "final.pth")["meta"]["iter"] == batches
        assert ("leaves one of the 36 images out" in capsys.readouterr().out) is (model == "test_resnet")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), ["2.00 GiB", "batch"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), ["out of memory", "batch"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ["num_workers=0"]),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), ["num_workers=0"]),
        (
            ValueError("Expected more than 1 value per channel when training, got input size"),
            ["BatchNorm", "two images"],
        ),
        (IndexError("Target 12 is out of bounds."), ["label 12", "num_classes"]),
        (RuntimeError("No CUDA GPUs are available"), ["cpu"]),
        (AssertionError("Torch not compiled with CUDA enabled"), ["cpu"]),
        (PermissionError(13, "Permission denied", "/x/a.png"), ["/x/a.png", "Permission denied"]),
        (
            UserError(
                "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                '  File "x.py", line 1\nhybridzoo.train.errors.UserError: image a.png: broken\n'
            ),
            ["image a.png: broken"],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_of_the_machine_say_what_to_do(error, words):
    said = explain(error)
    assert said
    assert "\n" not in said
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_a_defect_keeps_its_traceback():
    assert explain(ValueError("something else")) is None
    assert explain(KeyError("name")) is None


def test_a_closed_output_pipe_is_not_an_error():
    piped = subprocess.run(
        f"{sys.executable} -m hybridzoo list | head -n 1", shell=True, capture_output=True, text=True
    )
    assert piped.stderr == ""
    assert len(piped.stdout.splitlines()) == 1


def test_testing_a_finished_run_prints_no_warnings(run_config, image_folder, tmp_path, capfd, monkeypatch):
    """The run's own config has wandb among its visualizers: a test logs nothing there, and prints its metrics alone."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = run_config("train_cfg.max_epochs=1")
    tracking.add_wandb(config, tmp_path, on=True)
    engine.train(config, work_dir=tmp_path / "run", data=image_folder, wandb=False)
    capfd.readouterr()
    engine.test(config, tmp_path / "run" / "final.pth", data=image_folder, work_dir=tmp_path / "test")
    printed = capfd.readouterr()
    assert printed.err == ""
    assert [line.split()[0] for line in printed.out.splitlines()] == ["test"]
    assert not list(tmp_path.glob("test/**/wandb"))


def test_only_advice_of_libraries_is_hidden(recwarn):
    with interruptions.quiet():
        warnings.warn_explicit("advice", UserWarning, "loss.py", 1, module="mmseg.models.losses.cross_entropy_loss")
    assert not [w for w in recwarn if "advice" in str(w.message)]
    with interruptions.quiet():
        warnings.warn_explicit("yours", UserWarning, "own.py", 1, module="somebody.config")
    assert [w for w in recwarn if "yours" in str(w.message)]
