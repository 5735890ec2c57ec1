"""The command for a GPU, as far as the interpreter goes: rows, continuation, failures, time boxes and the report."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def python(*arguments):
    """What Python prints that ends well."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    environment |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


CALLS = """
import contextlib, io, json, sys
from benchmarks.gpu.__main__ import main
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


def calls(*lines):
    """Exit code, output and errors of some command lines, one after the other in one process for the interpreter."""
    given = json.dumps([[str(word) for word in line] for line in lines])
    return [json.loads(line) for line in python("-c", CALLS, given).splitlines()]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_the_whole_command(tmp_path):
    """Every part, without a GPU; then again, when nothing is left to do; then the report, and a task by its name."""
    said = python("-m", "benchmarks.gpu", "--minutes", "9", "--workers", "0", "--out", str(tmp_path))
    rows = rows_of(tmp_path)
    assert not [row for row in rows if "error" in row or "cut" in row]
    parts = importlib.import_module("benchmarks.gpu.parts").PARTS
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        part for part in parts if part not in ("flex", "compiled")
    ]
    assert all(row["dry"] and {"device", "torch", "triton", "version", "at", "task"} <= set(row) for row in rows)
    timed = [row for row in rows if row["part"] in ("operators", "tuned") and not row.get("done")]
    assert {row["op"] for row in timed} == {"na2d", "routed", "mix2d"}
    assert all(row["q1_us"] <= row["median_us"] <= row["q3_us"] and row["bytes"] and row["flops"] for row in timed)
    assert {row["op"] for row in rows if row.get("worst", 2) <= 1} == {"na2d", "routed", "mix2d", "depthwise"}
    (table,) = tmp_path.glob("dry*.json")
    tuning = importlib.import_module("hybridzoo.kernels.tuning")
    tuned = {"na2d", "routed", "neighborhood_mix2d"}
    assert {key.operator for key in tuning.read_table(table)} <= tuned
    assert {row["key"][0] for row in rows if row["part"] == "tuning" and "key" in row} == tuned
    assert "== Operators (15)" in said

    again, reported, one, unknown = calls(
        ["--minutes", 1, "--workers", 0, "--out", tmp_path, "--parts", "ceilings", "correctness", "networks", "--dry"],
        ["report", tmp_path],
        ["one", "correctness/depthwise (1, 4, 5, 24, True) float32", "--dry", "--out", tmp_path / "one"],
        ["one", "correctness/no such", "--dry", "--out", tmp_path / "one"],
    )
    assert again[0] == reported[0] == one[0] == 0, (again, reported, one)
    assert len(rows_of(tmp_path)) == len(rows)
    assert "of what is allowed" in one[1]
    assert unknown[0] == 2
    assert "no task is called 'correctness/no such'" in unknown[2]

    text = (tmp_path / "report.md").read_text()
    assert all(f"## {title}" in text for title in ("Ceilings", "Correctness", "Operators", "Networks"))
    assert "Failures" not in text
    assert (tmp_path / "floors.png").stat().st_size > 1000


# ------------------------------------------------------------------- the runner, with tasks that need nothing of ours


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs tasks of this module's functions in two worker processes."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu_rows = importlib.import_module("benchmarks.gpu.rows")
    runner = importlib.import_module("benchmarks.gpu.runner")
    monkeypatch.setattr(runner, "PREPARING", 0.03)
    store = gpu_rows.Store(tmp_path)
    store.common = dict(device="none", torch="", triton="")
    said = []
    one = runner.Runner(store, True, 2, said.append)

    def run_tasks(names, seconds, quiet=True):
        tasks = [gpu_rows.Task(f"part/{n}", f"trial_tasks:{n.split()[0]}", {}, ()) for n in names]
        one.part(tasks, time.monotonic() + seconds, quiet)
        return store.rows

    yield run_tasks
    one.close()


@pytest.mark.slow
def test_a_task_that_fails_dies_or_hangs_does_not_end_the_run(run):
    rows = run(["fails", "dies", "works", "hangs", "works again"], 400)
    by_task = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    assert "ValueError: no good" in by_task["part/fails"][0]["error"]
    assert "benchmarks.gpu one 'part/fails'" in by_task["part/fails"][0]["command"]
    assert "the process ended while measuring (exit code 3)" in by_task["part/dies"][0]["error"]
    assert by_task["part/works"][0]["value"] == by_task["part/works again"][0]["value"] == 1
    assert by_task["part/hangs"][-1]["cut"] == "preparing"
    assert all(rows[-1].get("done") for name, rows in by_task.items() if "hangs" not in name)


# ------------------------------------------------------------------------------------------------------- smaller ones


def test_rows_are_complete_and_unfinished_ones_are_done_again(tmp_path):
    gpu_rows = importlib.import_module("benchmarks.gpu.rows")
    task = gpu_rows.Task("part/one", "x:y", dict(a=1), ("kernels/tuning.py",), (("A", "b"),))
    store = gpu_rows.Store(tmp_path)
    store.common = dict(device="d", torch="t", triton="t")
    store.add(dict(error="no"), task, task.version)
    assert not store.done(task)
    store.add(dict(done=True), task, task.version)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "cut off')
    again = gpu_rows.Store(tmp_path)
    again.common = store.common
    assert len(again.rows) == 2
    assert again.rows[0]["command"] == "A=b python -m benchmarks.gpu one 'part/one'"
    assert again.done(task)
    assert not again.done(task._replace(args=dict(a=2)))
    again.common = dict(store.common, device="other")
    assert not again.done(task)


def test_the_report_uses_the_last_complete_run_of_a_task():
    report = importlib.import_module("benchmarks.gpu.report")
    first = [dict(task="a", n=1), dict(task="a", done=True)]
    rows = [
        *first,
        dict(task="a", n=2),
        dict(task="a", done=True),
        dict(task="a", n=3),
        dict(task="a", cut="measuring"),
    ]
    assert [row.get("n") for row in report.newest(rows)] == [2, None]
    assert [row.get("n") for row in report.newest([dict(task="b", n=4)])] == [4]


def test_lower_bounds_follow_from_the_required_work():
    cases = importlib.import_module("benchmarks.gpu.cases")
    one = 128 * 56 * 56 * 2 * 32 * 2  # bytes of a map
    work = cases.work("na2d", dict(side=56, heads=2, dilation=8), 128, 2, False)
    assert work["forward"] == (4 * one, 2 * 2 * 128 * 2 * 32 * 56 * 56 * 49)
    assert work["both"] == (12 * one, 7 * 2 * 128 * 2 * 32 * 56 * 56 * 49)
    routed = cases.work("routed", dict(side=56, heads=2, topk=4), 128, 2, False)
    assert routed["forward"] == (4 * one, 2 * 2 * 128 * 2 * 32 * 56 * 56 * 4 * 64)
    shape = dict(side=14, heads=8, head_dim=16, kernel=13)
    mixed = cases.work("mix2d", shape, 128, 2, False)
    maps, taps = (128 * 8 * n * 16 * 2 for n in (14 * 14, 13 * 13))
    products = 2 * 128 * 8 * 14 * 14 * 169 * 16
    assert mixed == {"forward": (3 * maps + taps, 2 * products), "both": (9 * maps + 3 * taps, 7 * products)}


def test_forms_are_compared_by_direction_and_with_the_target():
    report = importlib.import_module("benchmarks.gpu.report")
    row = dict(task="", device="d", shape=dict(side=56, heads=2, dilation=1), op="na2d")
    work = {"forward": dict(bytes=2, flops=0), "both": dict(bytes=6, flops=0)}

    def times(part, form, forward, both):
        return [dict(row, part=part, form=form, way=way, median_us=us, **work[way])
                for way, us in (("forward", forward), ("both", both))]  # fmt: skip

    copies = [dict(row, part="ceilings", op="copy", rate=rate) for rate in (0.1e6, 0.2e6)]
    rows = [*copies, *times("tuned", "ours", 20, 80), *times("operators", "ours", 30, 90)]
    rows += [*times("operators", "gather", 60, 240), *times("flex", "flex", 40, 300)]
    rows += [dict(row, part="operators", form="sdpa, same mask and bias", way="both", reason="too much")]
    head, body = report.operators(rows)
    found = {cells[1]: dict(zip(head, cells, strict=True)) for cells in body}
    assert [found[way]["ours us"] for way in ("forward", "backward", "both")] == ["20.0", "60.0", "80.0"]
    assert [found[way]["floor us"] for way in found] == ["10.0", "20.0", "30.0"]
    assert [found[way]["of the floor"] for way in found] == ["50.0%", "33.3%", "37.5%"]
    assert [found[way]["gather"] for way in found] == ["3.00x"] * 3
    assert found["forward"]["target"] == "50%: met; 3x flex: MISSED"
    assert found["backward"]["target"] == "35%: MISSED"
    assert found["both"]["target"] == "3x flex: met"
    assert found["both"]["sdpa, same mask and bias"] == "too large"


def test_layer_norms_are_found_among_a_profile_s_kernels():
    networks, report = (importlib.import_module(f"benchmarks.gpu.{name}") for name in ("networks", "report"))
    names = [
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>",
        "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float>",
        "triton_per_fused_add_native_layer_norm_7",
    ]
    assert all(networks.NORMS.search(name) for name in names)
    assert not networks.NORMS.search("void at::native::batch_norm_collect_statistics_channels_last_kernel")
    row = dict(op="n", way="inference", mode="compiled, profiler", kernels=5, kernel_us=1500.0)
    head, body = report.profiles([row | dict(attention_share=0.1, norm_share=0.25), row | dict(mode="profiler")])
    assert len(head) == len(body[0])
    assert body == [
        ["n", "inference", "compiled", "5", "1.5", "10%", "25%"],
        ["n", "inference", "eager", "5", "1.5", "", ""],
    ]


def test_compiled_targets_are_the_first_wave():
    networks, rows = (importlib.import_module(f"benchmarks.gpu.{name}") for name in ("networks", "rows"))
    store = rows.Store.__new__(rows.Store)
    store.folder, store.common = Path("no such folder"), dict(device="none")
    tasks = [task.name for task in networks.compiled_tasks(False, store)]
    assert len(tasks) == len(set(tasks)) == 2 * len(networks.FIRST + networks.TIMM + networks.OTHERS)
    wave = [f"compiled/{name}, training" for name in networks.FIRST] + ["compiled/agent_swin_tiny, inference"]
    assert tasks[: networks.WAVE] == wave


def test_dense_forms_are_bounded():
    cases = importlib.import_module("benchmarks.gpu.cases")
    for op, shape in cases.walk(False):
        sizes = [cases.written(op, shape, form, "both", 128) for form in cases.FORMS[op]]
        assert (max(sizes) > cases.MOST_WRITTEN) == ((op, shape["side"]) in (("na2d", 56), ("routed", 128)))


def test_a_run_is_kept_with_what_was_kept_before(tmp_path):
    report = importlib.import_module("benchmarks.gpu.report")
    run, results, tuned = tmp_path / "run", tmp_path / "results", tmp_path / "tuned"
    common = dict(device="A GPU", torch="t", triton="t", version="v")
    rate = dict(common, part="ceilings", op="copy")

    def keep(*rows):
        run.mkdir(exist_ok=True)
        (run / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report.keep(run, results, tuned)
        return {row["task"]: row.get("rate") for row in report.read(results / "a-gpu")}

    first, second = dict(rate, task="a", rate=1.23456789), dict(rate, task="b", rate=2)
    assert keep(first, dict(common, part="x", task="a", done=True), second) == {"a": 1.2346, "b": 2}
    (run / "a-gpu.json").write_text("{}")
    assert keep(dict(rate, task="a", rate=3), dict(common, part="x", task="b", cut="ready")) == {"b": 2, "a": 3}
    assert (tuned / "a-gpu.json").read_text() == "{}"
    assert "1.23" not in (results / "a-gpu" / "report.md").read_text()
    with pytest.raises(SystemExit, match="rows of one GPU are kept"):
        keep(dict(rate, task="a", dry=True))


RESULTS = sorted(folder for folder in (ROOT / "benchmarks" / "results").iterdir() if folder.is_dir())


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_reports_agree_with_their_rows(folder):
    report = importlib.import_module("benchmarks.gpu.report")
    assert (folder / "report.md").read_text() == report.text(report.read(folder)), "run: python -m benchmarks.gpu keep"


def test_the_training_extras_are_not_needed():
    extras = ("mmengine", "mmcv", "mmdet", "mmseg", "wandb", "typer", "rich")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
    code += "import benchmarks.gpu.importable as i; i.make_importable()\n"
    code += "import benchmarks.gpu.parts, benchmarks.gpu.report, benchmarks.gpu.worker, hybridzoo.kernels\n"
    code += "import benchmarks.gpu.cases, benchmarks.gpu.networks, hybridzoo.train.bench.routed_forms\n"
    code += "from benchmarks.plain import biformer, hosts, neighborhood"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
