"""The command line as a person meets it: verbs, options, help, and what bad input says."""

import re
import shlex
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import timm
from PIL import Image
from rich.console import Console
from typer.main import get_command

from hybridzoo.__main__ import main
from hybridzoo.checkpoints import cards
from hybridzoo.train import cli, model_info, names, tables
from hybridzoo.train.model_info import Summary

# The verbs with verbs of their own, such as `checkpoints`, have tests of their own too.
VERBS = sorted(name for name, verb in get_command(cli.app).commands.items() if not hasattr(verb, "commands"))
# What makes a run of the examples a matter of seconds.
TINY = ["model.name=test_resnet", "model.regions=none", "train_cfg.max_epochs=1", "train_dataloader.batch_size=256"]


@pytest.fixture
def call(capsys):
    """Run a command line in this process -> (exit code, stdout, stderr)."""

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def here(tmp_path, monkeypatch, data_home):
    """An empty working directory; the embedded data is made once for all tests, and small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDZOO_DATA", str(data_home))
    return tmp_path


def test_list_shows_every_model_with_its_published_values(call):
    code, out, err = call("list")
    assert code == 0
    assert err == ""
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(names.our_models()) <= set(lines)
    assert lines["biformer_tiny"].split() == ["biformer_tiny", "biformer", "13.1", "M", "224", "81.4", "MIT"]
    assert "resnet50" not in lines


@pytest.mark.parametrize("pattern", ["biformer_st*", "former_st", "biformer_stl?nchw"])
def test_list_takes_a_pattern(call, pattern):
    code, out, _ = call("list", pattern)
    assert code == 0
    assert "biformer_stl_nchw" in out
    assert "biformer_base" not in out


def test_list_recipes_shows_task_network_score_and_weights(call):
    code, out, _ = call("list", "--recipes", "rcnn")
    assert code == 0
    lines = {line.split()[0]: re.split(r"  +", line.strip()) for line in out.splitlines() if line.strip()}
    task, network, score, weights = lines["mask-rcnn_agent_swin_tiny_1x_coco"][1:5]
    assert (task, network, weights) == ("detection", "agent_swin_tiny", "agent_swin_tiny.in1k")
    assert score.startswith("box AP 44.6, mask AP 40.7")
    assert lines["mask-rcnn"][1:3] == ["detection", "any: --model NAME"]
    assert "upernet" not in lines


SMALLEST = {card.family: card.model for card in sorted(cards(), key=lambda c: -c.params)}


@pytest.mark.parametrize("name", SMALLEST.values())
def test_info_agrees_with_the_card(name):
    found = model_info.facts(name)
    card = cards(name)[0]
    assert found.params == card.params
    assert found.macs == pytest.approx(1e9 * card.gmacs)
    network = timm.create_model(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == found.params
    counted = model_info.count_macs(network, found.input_size)
    assert counted == pytest.approx(found.macs, rel=0.1), "more arithmetic is allowed where it is faster, but not much"
    assert found.top1 == card.top1
    assert (*found.tags, "")[0] == card.tag


def test_info_prints_them(call):
    code, out, err = call("info", "biformer_tiny")
    assert code == 0
    assert err == ""
    facts = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines() if line.strip())
    assert facts["parameters"] == "13,142,760 (13.1 M)"
    assert facts["channels"] == "64 128 256 512"
    assert facts["published"] == "top-1 81.4 %"
    assert facts["paper"] == "https://arxiv.org/abs/2303.08810"
    assert facts["licence"].startswith("MIT")
    assert facts["mean"] == "0.485 0.456 0.406"


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [("resnet18.a1_in1k", "11,689,512", "1.81"), ("vit_tiny_patch16_224", "5,717,416", "1.25")],
)
def test_info_knows_timms_models(call, name, params, gmacs):
    code, out, _ = call("info", name)
    assert code == 0
    assert params in out
    assert f"{gmacs} G" in out
    assert "apache-2.0" in out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["info", "biformer_tinny"], ["biformer_tinny", "biformer_tiny"]),
        (["info", "resnet_50"], ["resnet_50", "resnet50"]),
        (["info", "resnet50.nowhere"], ["nowhere", "a1_in1k"]),
        (["list", "bifromer_tiny"], ["bifromer_tiny", "biformer_tiny"]),
        (["list", "--configs", "biformer_tiny_digit_s"], ["biformer_tiny_digits"]),
        (["train", "biformer_tiny_digit"], ["unknown config", "biformer_tiny_digits"]),
        (
            ["train", "biformer_tiny_digits", "--cfg-options", "train_cfg.max_epochs"],
            ["train_cfg.max_epochs", "key=value"],
        ),
        (["train", "biformer_tiny_digits", "--cfg-options", "train_cgf.max_epochs=1"], ["train_cgf", "train_cfg"]),
        (["train", "biformer_tiny_digits", "--cfg-options"], ["--cfg-options", "hybridzoo train --help"]),
        (["train", "biformer_tiny_digits", "--data", "nowhere"], ["nowhere"]),
        (["train", "biformer_tiny_digits", "--data", "."], ["."]),
        (["train", "biformer_tiny_digits", "--seed", "x"], ["--seed", "integer"]),
        (["train", "biformer_tiny_digits", "--work-dir", "/dev/null/x"], ["/dev/null/x"]),
        (["train", "biformer_tiny_digits", "--weights", "nowhere.pth"], ["nowhere.pth"]),
        (["train"], ["RECIPE", "hybridzoo train --help"]),
        (["train", "biformer_tiny_digits", "--launcher", "mpi"], ["--launcher", "mpi", "pytorch"]),
        (["train", "biformer_tiny_digits", "--learning-rate", "1"], ["--learning-rate"]),
        (["test", "biformer_tiny_digits", "nowhere.pth"], ["nowhere.pth"]),
        (["predict", "biformer_tiny_digits", "nowhere.pth", "."], ["nowhere.pth"]),
        (["trian", "biformer_tiny_digits"], ["trian", "train"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(call, here, argv, parts):
    code, out, err = call(*argv)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    for part in parts:
        assert part in err
    assert not list(here.iterdir()), "nothing may be left behind"


@pytest.mark.parametrize(
    ("given", "spread"),
    [
        ("train c --cfg-options a=1 b=2 --resume", "train c --cfg-options a=1 --cfg-options b=2 --resume"),
        ("train c --cfg-options a=1 --cfg-options b=2", "train c --cfg-options a=1 --cfg-options b=2"),
        ("train c --cfg-options=a=1 b=2", "train c --cfg-options=a=1 --cfg-options b=2"),
        ("train --cfg-options a=-1 b=2 c --amp", "train --cfg-options a=-1 --cfg-options b=2 c --amp"),
        ("train --cfg-options a", "train --cfg-options a"),
        ("train c --resume x=1", "train c --resume x=1"),
        ("predict --cfg-options a=1 -- x=1.pth", "predict --cfg-options a=1 -- x=1.pth"),
    ],
)
def test_one_flag_takes_several_options(given, spread):
    assert cli.spread_options(given.split()) == spread.split()


def test_options_reach_the_run(call, here):
    code, out, err = call(
        *["train", "biformer_tiny_digits", "--no-wandb", "--work-dir", "w", "--seed", "5"],
        *["--cfg-options", *TINY, "log_level='WARNING'"],
    )
    assert code == 0, err
    assert "accuracy/top1" in out
    assert "epoch 1/1" in out
    resolved = (here / "w" / "biformer_tiny_digits.py").read_text()
    assert "seed=5" in resolved
    assert "test_resnet" in resolved
    assert "WARNING" in resolved
    assert not list(here.glob("w/*/wandb"))
    assert not (here / "w" / "wandb").exists()

    code, out, err = call(
        "test", "biformer_tiny_digits", "w/final.pth", "--cfg-options", "model.name=test_resnet18", "model.regions=none"
    )
    assert code == 2
    assert "w/final.pth" not in out

    code, out, err = call(
        *["train", "biformer_tiny_digits", "--no-wandb", "--work-dir", "w", "--resume"],
        *["--cfg-options", *TINY, "train_cfg.max_epochs=2"],
    )
    assert code == 0, err
    assert "epoch 2/2" in out
    assert "epoch 1/2" not in out


def test_interrupting_a_training_exits_130(here, image_folder):
    size = ["--img-size", "32", "--batch-size", "12", "--epochs", "1000", "--workers", "0"]
    argv = ["train", "test_resnet", "--data", str(image_folder), "--weights", "none", "--no-wandb", *size]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "hybridzoo", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    assert any(line.startswith("epoch 1/1000") for line in process.stdout)  # it trains by now
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted", "nothing of what libraries say to developers"


def test_an_interruption_inside_a_library_ends_the_command(call, monkeypatch):
    """mmengine turns a Ctrl-C that arrives while it writes its config into a SyntaxError."""

    def swallowing(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        except:  # noqa: E722 - as mmengine writes it
            raise SyntaxError("Failed to format the config file")  # noqa: B904

    monkeypatch.setattr(names, "our_models", swallowing)
    code, _, err = call("list")
    assert (code, err.strip()) == (130, "interrupted")


def _examples(call, verb: str) -> list[str]:
    code, out, _ = call(verb, "--help")
    assert code == 0
    lines = [line.strip().removeprefix("$ ") for line in out.splitlines() if line.strip().startswith("$ hybridzoo ")]
    return [line for line in lines if "--data" not in line]  # data of one's own: see test_recipes.py


def test_the_examples_of_every_verb_run(call, here, data_home):
    """In the order train, test, predict the examples are one story: each uses what the one before wrote."""
    Image.open(next(data_home.rglob("val/3/*.png"))).save("photo.png")
    for verb in ["list", "info", "train", "test", "predict"]:
        examples = _examples(call, verb)
        assert examples, f"{verb} --help has no example"
        for example in examples:
            argv = shlex.split(example)[1:]
            assert argv[0] == verb
            if verb in ("train", "test", "predict"):
                argv += ["--cfg-options", *TINY]
            code, out, err = call(*argv)
            assert code == 0, f"{example}: {err}"
            assert out.strip()
    others = {"check", "export", "show"}  # see test_input.py, test_export.py and test_show.py
    assert {"list", "info", "train", "test", "predict", *others} == set(VERBS)
    assert Path("predictions/photo.png").is_file()


def test_help_fits_eighty_columns(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for verb in VERBS:
        _, out, _ = call(verb, "--help")
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out
    assert call()[1] == call("--help")[1], "without a verb the help is shown"


def test_the_list_fits_a_narrow_terminal_without_cutting_names():
    names = ["biformer_stl_nchw", "efficientvit_msra_m5", "agent_cswin_small", "fastervit_6"]
    rows = [Summary(n, "efficientvit_msra", 1_360_000_000, (3, 224, 224), 81.4, "CC-BY-NC-SA-4.0") for n in names]
    console = Console(width=80, record=True, force_terminal=True, file=StringIO())
    console.print(tables.models(rows))
    text = console.export_text()
    assert "…" not in text
    assert len(text.splitlines()) == 2 + len(names)
    for name in [*names, "CC-BY-NC-SA-4.0"]:
        assert name in text


def test_output_to_a_pipe_has_plain_uncut_lines(data_home):
    """Real processes: no colours, no cut, no trailing blanks; a reader that leaves early is no error."""
    listed = subprocess.run(
        [sys.executable, "-m", "hybridzoo", "list", "--configs"], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in listed.stdout
    assert "…" not in listed.stdout
    assert all(line == line.rstrip() for line in listed.stdout.splitlines())
    assert not listed.stdout.startswith("\n")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_train_extra_it_says_what_to_install(package):
    program = f"import sys; sys.argv = ['hybridzoo']; sys.modules[{package!r}] = None; "
    program += "from hybridzoo.__main__ import main; sys.exit(main(['list']))"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert asked.returncode == 2
    assert asked.stderr.strip().splitlines()[-1].startswith(f"error: the command line needs {package}")
    assert 'pip install "hybridzoo[train]"' in asked.stderr


def test_version(call):
    assert call("--version")[:2] == (0, "hybridzoo 0.1.0\n")
