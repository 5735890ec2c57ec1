"""The plain networks of the comparisons give the same results, and every committed table agrees with its data."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from networks import few_blocks
from PIL import Image

from hybridzoo.train.bench import rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


compared = {
    "agent_cswin_tiny": 224, "agent_deit_tiny": 224, "agent_pvt_tiny": 224, "agent_swin_tiny": 224,
    "inline_cswin_tiny": 224, "inline_deit_tiny": 224, "inline_pvt_tiny": 224, "inline_swin_tiny": 224,
    "biformer_tiny": 224, "dat_plus_tiny": 64, "dat_tiny": 64, "dinat_mini": 224, "fastervit_0": 224,
    "litv2_small": 64, "overlock_xtiny": 64, "patnet_t0": 64, "ravlt_tiny": 64,
}  # fmt: skip


def shallow(name: str) -> dict:
    """Networks whose plain form is made for one depth are as deep as they are."""
    return {} if name.startswith(("patnet", "overlock")) else few_blocks(name)


@pytest.mark.parametrize("name", compared)
def test_plain_transcriptions_are_the_same_networks(name):
    """In evaluation, and in training: `dat_tiny` where the maps are as large as its windows."""
    comparison = importlib.import_module("benchmarks.compare").Comparison
    made = comparison(name, batch=1, size=compared[name], turns=1, seconds=0.0, **shallow(name))
    others = [form for form in made.models if not form.startswith(("ours", "timm"))]
    assert others
    ours, plain = (made.models[form].double().eval() for form in ("ours", others[0]))
    kinds = [{type(module) for module in model.modules()} for model in (ours, plain)]
    assert kinds[0] != kinds[1], "something is written otherwise"
    x = torch.randn(1, 3, compared[name], compared[name], dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), ours(x))


def test_a_comparison_measures_every_form_in_every_way():
    comparison = importlib.import_module("benchmarks.compare").Comparison
    made = comparison("efficientvit_msra_m0", batch=2, size=64, turns=1, seconds=0.0)
    found = made.measure()
    timms = ["timm: efficientvit_m0", "timm: efficientvit_m0, channels last"]
    assert [(row["way"], row["form"]) for row in found] == [
        *((way, form) for way in ("inference", "latency") for form in ("ours", *timms, "fused")),
        *(("training", form) for form in ("ours", *timms)),
    ]
    assert all(row["median_us"] > 0 and row["peak_mib"] >= 0 for row in found)


def test_compiled_forms_are_measured_on_request(monkeypatch):
    compare = importlib.import_module("benchmarks.compare")
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)  # the compiler takes minutes
    made = compare.Comparison("ravlt_tiny", 2, 32, turns=1, seconds=0.0, compiled=True, **few_blocks("ravlt_tiny"))
    forms = ["ours", "plain", "fused", "ours, compiled", "plain, compiled"]
    assert [(row["way"], row["form"]) for row in made.measure()] == [
        (way, form) for way in ("inference", "latency") for form in forms
    ]


def test_only_one_memory_layout_is_compiled(monkeypatch):
    compare = importlib.import_module("benchmarks.compare")
    made = compare.Comparison("efficientvit_msra_m0", 1, 32, turns=1, seconds=0.0)
    assert list(made._in_one_layout()) == ["ours", "timm: efficientvit_m0, channels last"]


def test_the_compiled_table_compares_with_the_faster_layout_as_created(tables, monkeypatch):
    times = {"ours": 9, "timm: n": 12, "timm: n, channels last": 10, "fused": 5, "ours, compiled": 4}
    times |= {"timm: n, channels last, compiled": 8}
    base = dict(op="a", runs=3, device="cpu", threads=2, torch="2", at="2026-11-27")
    found = [
        base | dict(way=way, form=form, cpu_us=time, batch=1)
        for way in ("inference", "latency")
        for form, time in times.items()
    ]
    monkeypatch.setattr(tables, "read", lambda _: found)
    *_, row = tables.compiled().splitlines()
    assert row == "| `a` | timm: n | " + " | ".join(["1.25x", "2.50x", "2.00x"] * 2) + " |"


def test_forms_with_different_results_are_not_compared():
    comparison = importlib.import_module("benchmarks.compare").Comparison
    made = comparison("ravlt_tiny", batch=1, size=32, turns=1, seconds=0.0, **few_blocks("ravlt_tiny"))
    torch.nn.init.normal_(made.models["plain"].head.fc.weight)
    made.models["ours"].eval(), made.models["plain"].eval()
    with pytest.raises(ValueError, match="plain differs from ours"):
        made.check(made.models)


def test_every_network_that_is_compared_is_tested():
    compare = importlib.import_module("benchmarks.compare")
    alone = {"ascan_tiny"}  # no other implementation exists, and it consists of PyTorch's own layers
    timms = {"maxvit_tiny", "efficientvit_msra_m0", "efficientvit_mit_b0"}
    assert set(compare.COMPARISONS) == {*compared, *alone, *timms}


@pytest.fixture
def tables():
    return importlib.import_module("benchmarks.tables")


@pytest.mark.parametrize(
    "name", ["speed.md", "bench.md", "networks_cpu.md", "operators_cpu.md", "input_pipeline_cpu.md", "export.md"]
)
def test_committed_tables_agree_with_their_data(tables, name):
    (file,) = [file for file in tables.FILES if file.name == name]
    assert file.read_text() == tables.text(file), "run: python -m benchmarks.tables"


def test_every_table_is_in_a_document_and_every_file_of_results_is_used(tables):
    marks = [mark[2] for file in tables.FILES for mark in tables.MARKED.finditer(file.read_text())]
    assert sorted(marks) == sorted(tables.TABLES)
    source = (ROOT / "benchmarks" / "tables.py").read_text() + (ROOT / "docs" / "linear_cost.py").read_text()
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert file.stem in source, f"{file.name}: no table is made of it"
        assert rows.read(file)


def test_the_picture_of_bench_is_drawn_from_the_committed_data(tables):
    picture = Image.open(tables.PLOT)
    assert picture.info["data"] == tables.digest(), "run: python -m benchmarks.tables"
    assert tables.PLOT.stat().st_size < 150_000


def test_tables_follow_their_data(tables, tmp_path, monkeypatch):
    """Also memory, quartiles and reasons, for rows as the commands write them."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    where = dict(device="a CPU", threads=2, torch="2", at="2026-01-02 03:04:05", runs=5)
    row = dict(op="na2d", shape=dict(height=7, width=7, heads=2, dilation=1), batch=2, peak_mib=3.0, **where)
    times = {("ours", "forward"): 1e3, ("ours", "both"): 2e3, ("gather", "forward"): 5e3}
    found = [row | dict(form=form, way=way, median_us=us, q1_us=us, q3_us=2 * us) for (form, way), us in times.items()]
    rows.write(tmp_path / "operators_cpu.json", [*found, row | dict(form="gather", way="both", median_us=8e3)])
    assert "| 7x7, 2 heads, dilation 1 | 5.0x | 4.0x | 3 / 3 |" in tables.TABLES["na2d"]()
    assert "Batch 2. a CPU, 2 threads, PyTorch 2, float32, 2026-01-02. Medians of 5" in tables.TABLES["na2d"]()
    rows.write(
        tmp_path / "operators_cpu.json", [*found, row | dict(form="gather", way="both", error="would need 9 GiB")]
    )
    full = tables.TABLES["operators"]()
    assert "| gather | 2 | 5 | 5-10 | 5.00x | would need 9 GiB |" in full
