"""The benchmarks import and say what they take; their plain networks are the same networks."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

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
    assert len(COMMANDS) >= 5
    run = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], cwd=BENCHMARKS, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("usage: ") == len(COMMANDS)


def test_readmes_table_of_inference_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    inference = importlib.import_module("inference")
    data = BENCHMARKS / "results" / "inference_cpu.json"
    rows = json.loads(data.read_text())
    assert {row["model"] for row in rows} <= set(inference.MODELS)
    written = (BENCHMARKS.parent / "README.md").read_text()
    assert inference.table(rows) in written, f"python benchmarks/inference.py --table {data}"


@pytest.mark.parametrize("host", ["deit", "pvt", "swin", "cswin"])
@pytest.mark.parametrize("family", ["agent", "inline"])
def test_plain_transcriptions_are_the_same_networks(family, host, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    plain = importlib.import_module("linear_attention_families").plain
    depths = dict() if host == "deit" else dict(depths=(2, 2, 2, 2))
    ours = timm.create_model(f"{family}_{host}_tiny", num_classes=10, **depths).double().eval()
    other = plain(ours)
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x))


@pytest.mark.parametrize("name", ["dat_tiny", "dat_plus_tiny"])
def test_plain_deformable_attention_is_the_same(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    make_plain = importlib.import_module("deformable_attention").make_plain
    ours = timm.create_model(name, num_classes=10, depths=(1, 1, 2, 1)).double().eval()
    other = make_plain(copy.deepcopy(ours))
    assert sum(type(module).__name__ == "PlainDeformableAttention" for module in other.modules()) >= 2
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(other(x), ours(x))
