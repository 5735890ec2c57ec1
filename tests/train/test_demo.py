"""`make demo`'s program on a crumb of its data: every step, picture and score, and the exit code of a missed target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from PIL import Image

from hybridzoo.train import demo
from hybridzoo.train.digits import digits_root

SMALL = ("digits.train=6", "digits.val=4", "train_cfg.max_epochs=1", "train_dataloader.batch_size=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded strokes, all but a few of each digit taken away."""
    root = tmp_path_factory.mktemp("data")
    for folder in digits_root("classification", root=root).glob("*/*"):
        for image in sorted(folder.iterdir())[2:]:
            image.unlink()
    return root


@pytest.mark.exhaustive  # CI runs `make demo` itself
def test_trains_three_tasks_and_shows_what_they_learned(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hybridzoo.train.demo", "--out", "demo", "--data", str(data)]
    run = subprocess.run([*command, "--cfg-options", *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr  # nobody learns ten digits from two of each
    out = tmp_path / "demo"
    results = json.loads((out / "results.json").read_text())
    assert {line["task"] for line in results} == {step.task for step in demo.STEPS}
    assert {line["metric"] for line in results} >= set(demo.TARGETS)
    assert all(0 <= line["score"] <= 100 for line in results)
    for name in (*(step.task for step in demo.STEPS), "curves"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 100
            assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1]
    for step in demo.STEPS:
        assert (out / step.task / "final.pth").is_file()
        assert f"hybridzoo train {step.config}" in run.stdout
        assert step.starts_from is None or f"--weights demo/{step.starts_from}/final.pth" in run.stdout


def test_bad_options_are_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", "--cfg-options", "no.such.key=1"])
    assert demo.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
