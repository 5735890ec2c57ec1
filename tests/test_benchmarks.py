"""The benchmarks import and say what they take; a tuning run goes on where there is nothing to time."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import hybridzoo  # noqa: F401  (registers the models)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMANDS = sorted(file.name for file in BENCHMARKS.glob("*.py") if "--out " in file.read_text())

HELP = """
import runpy, sys
sys.path.insert(0, ".")
for file in sys.argv[1:]:
    sys.argv[:] = [file, "--help"]
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, file
"""


def test_every_command_starts():
    """All in one other process: some register models with timm, which tests that list models would find."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert len(COMMANDS) >= 7
    run = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], cwd=BENCHMARKS, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("usage: ") == len(COMMANDS)


@pytest.mark.parametrize("host", ["deit", "pvt", "swin", "cswin"])
@pytest.mark.parametrize("family", ["agent", "inline"])
def test_plain_transcriptions_are_the_same_networks(family, host, monkeypatch):
    """Every kind of block, nothing of ours in the plain one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    plain = importlib.import_module("linear_attention_families").plain
    depths = dict() if host == "deit" else dict(depths=(2, 2, 2, 2))
    ours = timm.create_model(f"{family}_{host}_tiny", num_classes=10, **depths).double().eval()
    other = plain(ours)
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x))
    assert not any(
        type(module).__name__ in ("Linear", "Mlp", "GELU") and "hybridzoo" in type(module).__module__
        for module in other.modules()
    )


@pytest.fixture
def tune(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU, pretended")
    return importlib.import_module("tune_common")


def test_a_kernel_that_nothing_launches_is_named_so(tune):
    launch = SimpleNamespace(kernel=SimpleNamespace(__name__="forward_tiled"))
    with pytest.raises(tune.NotLaunched, match="what runs here is forward_tiled"):
        tune.time_kernel("forward_dense", [launch])


def test_tuning_skips_what_it_cannot_time(tune, monkeypatch, tmp_path, capsys):
    """One kernel that the shape does not launch, one that never fits; the third is tuned, and written."""
    first, other = tune.Config(64, 64, 4, 2), tune.Config(32, 32, 1, 1)
    table = {(kind, 128, 2): first for kind in ("dense", "huge", "tiled")}

    def milliseconds(kind, batch, head_dim, dtype):
        if kind == "dense":
            raise tune.NotLaunched("what runs here is tiled")
        config = table[kind, head_dim, dtype.itemsize]
        return None if kind == "huge" else 1.0 if config == other else 2.0

    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(out), "--head-dims", "128"])
    pick = lambda kind, head_dim, itemsize: table[kind, head_dim, itemsize]  # noqa: E731
    tune.main("", table, pick, ["dense", "huge", "tiled"], "HYBRIDZOO_NO_SUCH", lambda kind: [(32, 32)], milliseconds)
    said = capsys.readouterr().out
    assert "('dense', 128, 2): skipped, what runs here is tiled" in said
    assert "('huge', 128, 2): skipped, no candidate fits into this GPU" in said
    assert table == {("dense", 128, 2): first, ("huge", 128, 2): first, ("tiled", 128, 2): other}
    assert json.loads(out.read_text()) == {"tiled,128,2": [32, 32, 1, 1]}
