"""`hybridzoo bench`: rows, tables and pictures of networks and operators; what fails is said and the rest measured."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex

import pytest
import torch
from typer.main import get_command

from hybridzoo.__main__ import main
from hybridzoo.checkpoints import cards
from hybridzoo.train import model_info
from hybridzoo.train.bench import (
    cases,
    forms,
    measuring,
    models,
    network,
    operators,
    ops,
    plot,
    processes,
    rows,
    tables,
    verbs,
)
from hybridzoo.train.errors import UserError

VERBS = sorted(get_command(verbs.app).commands)
TINY = ("--img-size", "32", "--batch-size", "2", "--repeats", "2", "--device", "cpu")


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run `hybridzoo bench ...` in this process and an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "Worker", processes.Here)
    monkeypatch.setattr(ops, "Worker", processes.Here)
    monkeypatch.setattr(measuring, "LEAST", 0.0)

    def run(*argv: str) -> tuple[int, str, str]:
        code = main(["bench", *argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


# ------------------------------------------------------------------------------------------------------------ networks


def test_models_side_by_side(call, tmp_path):
    code, out, err = call(
        "models",
        "efficientvit_msra_m0",
        "test_resnet",
        *TINY,
        "--train",
        "--json",
        "a.json",
        "--csv",
        "--plot",
        "a.png",
    )
    assert code == 0, err
    head, *lines = [re.split(r"  +", line.strip()) for line in out.splitlines() if "  " in line]
    assert head == ["network", "px", "params", "GMACs", "images/s", "ms, one image", "MiB", "train images/s",
                    "train MiB", "top-1"]  # fmt: skip
    assert [line[0] for line in lines] == ["efficientvit_msra_m0", "test_resnet"]
    assert [line[-1] for line in lines] == ["63.3", "-"]
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+-[\d.]+\)", line[4]) for line in lines)
    found = rows.read(tmp_path / "a.json")
    assert [(row["op"], row["way"]) for row in found] == [
        (name, way) for name in ("efficientvit_msra_m0", "test_resnet") for way in ("inference", "latency", "training")
    ]
    for row in found:
        assert row["q1_us"] <= row["median_us"] <= row["q3_us"]
        assert (row["runs"], row["dtype"], row["shape"]) == (2, "float32", {"height": 32, "width": 32})
        assert {"device", "threads", "torch", "timm", "python", "hybridzoo", "at", "cpu_us", "params", "macs"} <= set(
            row
        )
        assert row["batch"] == (1 if row["way"] == "latency" else 2)
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["median_us"] * 1e6, rel=1e-3)
        assert ("peak_mib" in row) == (row["way"] != "latency")
    listed = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert listed[0]["network"] == "efficientvit_msra_m0"
    assert float(listed[0]["images_per_s_q1"]) <= float(listed[0]["images_per_s"])
    assert listed[1]["top1"] == ""
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert out.count("written: ") == 3


def test_a_network_that_fails_is_reported_and_the_others_are_measured(call, tmp_path):
    code, out, err = call("models", "test_vit2", "test_resnet", *TINY[2:], "--img-size", "33x40", "--json")
    assert code == 1
    assert err == ""
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "should be divisible by patch size" in lines["test_vit2"]
    assert "33x40" in lines["test_vit2"]
    assert re.search(r"\d \(", lines["test_resnet"])
    failed, _, measured, _ = rows.read(tmp_path / "bench.json")
    assert "divisible" in failed["error"]
    assert "median_us" not in failed
    assert measured["median_us"] > 0


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["models"], ["NAME"]),
        (["models", "dinat_tinny"], ["dinat_tinny", "dinat_tiny"]),
        (["models", "resnet_50"], ["resnet_50", "resnet50"]),
        (["models", "dinut_*"], ["dinut_*", "dinat_tiny"]),
        (["models", "resnet50.nowhere_"], ["nowhere_"]),
        (["models", "dinat_mini.nowhere"], ["nowhere", "in1k"]),
        (["models", "test_resnet", "--img-size", "big"], ["--img-size big", "224"]),
        (["models", "test_resnet", "--img-size", "0"], ["--img-size 0"]),
        (["models", "test_resnet", "--batch-size", "0"], ["--batch-size"]),
        (["models", "test_resnet", "--repeats", "0"], ["--repeats"]),
        (["models", "test_resnet", "--threads", "0"], ["--threads"]),
        (["models", "test_resnet", "--device", "gpu"], ["--device gpu", "this machine has"]),
        (["models", "test_resnet", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["models", "test_resnet", "--fuse", "--train"], ["--fuse", "--train"]),
        (["models", "test_resnet", "--json", "nowhere/a.json"], ["nowhere/a.json"]),
        (["models", "test_resnet", "--plot", "a.gif"], ["a.gif", ".png"]),
        (["models", "test_resnet", "--plot", "nowhere/a.png"], ["nowhere/a.png"]),
        (["models", "test_resnet", "--plot-y", "beauty"], ["--plot-y", "beauty"]),
        (["modles"], ["modles"]),
        (["ops", "na3d"], ["na3d", "na2d"]),
        (["ops", "dat", "--impl", "triton"], ["--impl triton", "dat"]),
        (["ops", "--impl", "fast"], ["--impl", "fast", "triton"]),
        (["ops", "na2d", "--img-size", "16"], ["--img-size 16"]),
        (["ops", "na2d", "--csv", "nowhere/a.csv"], ["nowhere/a.csv"]),
    ],
    ids=lambda value: "_".join(value).replace("/", "") if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_nothing_is_measured(call, tmp_path, argv, parts):
    code, out, err = call(*argv)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err), err
    assert all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["dinat_mini", "dinat_m*"], ["dinat_mini"]),
        (["biformer_st"], ["biformer_stl", "biformer_stl_nchw"]),
        (["maxvit_tiny.tf_384_in1k", "test_resnet"], ["maxvit_tiny.tf_384_in1k", "test_resnet"]),
        (["test_vi?"], ["test_vit"]),
    ],
)
def test_names_and_patterns(words, found):
    assert models.find(words) == found


def test_metadata_of_a_network_agree_with_info():
    """At the published size; at another one it is counted."""
    for name in ("efficientvit_msra_m0", "overlock_xtiny", "dinat_mini"):
        found, info = network.facts(name, network.make(name), cards(name)[0].input_size), model_info.facts(name)
        assert (found["params"], found["macs"], found["top1"]) == (info.params, info.macs, info.top1)
    small = network.facts("efficientvit_msra_m0", network.make("efficientvit_msra_m0"), (3, 112, 112))
    assert small["macs"] == pytest.approx(79.2e6 / 4, rel=0.3)


def test_timms_networks_for_one_size_are_created_for_the_requested_size():
    assert network.make("test_vit", (64, 96)).patch_embed.img_size == (64, 96)
    assert network.make("maxvit_tiny", (64, 96)).pretrained_cfg["input_size"] == (3, 224, 224)


def test_a_fused_network_and_a_compiled_one():
    fused = network.Network("efficientvit_msra_m0", "inference", batch=2, size=(64, 64), fused=True)
    assert not list(fused.model.parameters())
    assert fused.facts["params"] == cards("efficientvit_msra_m0")[0].params, "counted before they became buffers"
    assert fused.prepare()["macs"] > 0
    compiled = network.Network("test_resnet", "inference", size=(32, 32), compiled=True)
    assert isinstance(compiled.call, torch._dynamo.OptimizedModule)


def test_more_networks_than_fit_at_once_are_measured_in_groups(monkeypatch):
    """Turns of a group are interleaved."""
    said, closed = [], []

    class Fake:
        def __init__(self, target, threads, name, way, **arguments):
            self.name = name

        def call(self, method, way=""):
            said.append(f"{self.name} {way or method}")
            return dict(params=1, peak_mib=1.0) if method == "prepare" else (1e-3, 1e-3)

        def close(self):
            closed.append(self.name)

    monkeypatch.setattr(models, "AT_ONCE", 2)
    shares = []
    settings = models.Settings(turns=2)
    found = list(
        models.measure("abc", settings, dict(device="d", threads=1), lambda _, share: shares.append(share), Fake)
    )
    assert [len(group) for group in found] == [4, 2]
    turn = ["a inference", "a latency", "b inference", "b latency"]
    assert said[:10] == ["a prepare", "b prepare", *turn, *turn]
    assert closed == ["a", "b", "c"]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_network_is_measured_in_a_separate_process():
    """It answers, says an error in one line and goes on; its end is said too."""
    arguments = dict(name="test_resnet", way="inference", size=[32, 32], batch=1)
    worker = processes.Worker("hybridzoo.train.bench.network:Network", 1, **arguments)
    try:
        found = worker.call("prepare")
        assert found["params"] * 4 / 2**20 < found["peak_mib"] < 500
        with pytest.raises(processes.Failed, match="no_such_way"):
            worker.call("turn", way="no_such_way")
        assert worker.call("turn", way="inference")[0] > 0
        worker._process.kill()
        with pytest.raises(processes.Failed, match="memory ran out"):
            worker.call("turn", way="inference")
    finally:
        worker.close()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_too_little_memory_is_reported_with_the_commands_options(error):
    assert "--batch-size" in processes.say(error)


# ----------------------------------------------------------------------------------------------------------- operators


def test_every_operator_has_shapes_at_any_image_size():
    assert list(ops.OPS) == list(cases.SHAPES)
    for op in ops.OPS:
        assert len(cases.shapes(op)) >= 2
        assert len(cases.shapes(op, (800, 1344))) >= 2
    assert cases.shapes("na2d")[1] == dict(height=56, width=56, heads=2, dilation=8)
    assert cases.shapes("routed", (800, 1344))[0]["regions"] == 16
    assert cases.shapes("na2d", (32, 32)) == [dict(height=8, width=8, heads=2, dilation=1)]


@pytest.mark.parametrize("op", ops.OPS)
def test_forms_compute_the_same_with_the_same_gradients(op):
    shape = dict(cases.shapes(op, (96, 128) if op == "mix" else (64, 96))[-1])
    made = cases.make(op, shape, 2, "cpu", torch.float64)
    names = [name for name, form in made.forms.items() if form.same]
    assert names[0] == "ours"
    assert len(names) >= 2
    expected = []
    for name in names:
        out = made.call(made.forms[name].make())
        found = [out, *(g for g in made.backward(out) if g is not None)]
        expected = expected or found
        assert len(found) == len(expected)
        for one, right in zip(found, expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-6, atol=1e-6 * right.abs().max().item() + 1e-9)


def test_operators_and_other_forms_are_measured(call, tmp_path):
    code, out, err = call(
        "ops", "mix", "routed", "--img-size", "96x128", "--batch-size", "1", "--repeats", "1", "--json"
    )
    assert code == 0, err
    head, *lines = [re.split(r"  +", line.strip()) for line in out.splitlines() if "  " in line]
    assert head == ["op", "shape", "form", "forward ms", "x ours", "both ms", "x ours", "MiB"]
    assert lines[0][:3] == ["mix", "6x8, 8 heads, head_dim 16, kernel 5", "ours"]
    assert {line[2] for line in lines} == {"ours", "gather", "dense, all tokens"}
    found = rows.read(tmp_path / "bench.json")
    assert {row["way"] for row in found} == {"forward", "both"}
    assert all(row["part"] == "ops" and row["median_us"] > 0 and "peak_mib" in row for row in found)
    assert {row.get("impl") for row in found if row["form"] == "ours"} == {"auto"}


def test_a_form_that_needs_too_much_memory_or_gives_another_result_is_reported(monkeypatch):
    monkeypatch.setattr(operators, "total_memory", lambda device: 1000)
    measured = operators.Operator("mix", batch=1, size=(96, 128), turns=1, budget=0.0).measure(0)
    by_form = {row["form"]: row for row in measured}
    assert by_form["gather"]["error"].startswith("would need ")
    assert "median_us" in by_form["ours"]
    with pytest.raises(ValueError, match="gather disagrees with ours"):
        forms.check_agreement("gather", [torch.ones(2)], [torch.zeros(2) + 2], 1e-4)


def test_a_process_that_dies_is_replaced_for_the_remaining_shapes():
    made = []

    class Dies:
        def __init__(self, target, threads, **arguments):
            made.append(self)

        def call(self, method, index):
            if index == 0:
                raise processes.Failed("gone")
            return [dict(op="na2d", shape=dict(height=index))]

        def close(self):
            made.append("closed")

    found = list(ops.measure({"na2d": 3}, dict(device="d"), make=Dies))
    assert [group[0].get("error") for group in found] == ["gone", None, None]
    assert [one for one in made if one == "closed"] == ["closed", "closed"]


# ------------------------------------------------------------------------------------------------------ rows and files


def test_a_file_of_results_is_read_in_both_forms(tmp_path):
    found = [dict(op="a", median_us=1.5), dict(op="b", device="ü")]
    rows.write(tmp_path / "list.json", found)
    assert json.loads((tmp_path / "list.json").read_text()) == found
    assert len((tmp_path / "list.json").read_text().splitlines()) == 4, "a row a line"
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found) + '{"op": "cut of')
    assert rows.read(tmp_path / "list.json") == rows.read(tmp_path / "lines.jsonl") == found
    rows.write(tmp_path / "none.json", [])
    assert rows.read(tmp_path / "none.json") == []


@pytest.mark.parametrize("content", ["[1, 2]", "[{", "3\n"])
def test_a_file_of_something_else_is_an_error(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: is no file of results"):
        rows.read(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        rows.read(tmp_path / "b.json")


def test_steps_are_interleaved():
    said = []
    steps = {name: lambda name=name: said.append(name) for name in "ab"}
    found = measuring.interleaved(steps, torch.device("cpu"), 3, 0.0)
    assert [name for i, name in enumerate(said) if i == 0 or said[i - 1] != name] == ["a", "b"] * 3
    assert all(row["runs"] == 3 and row["cpu_us"] >= 0 for row in found.values())


def test_memory_is_the_peak_of_a_call():
    step = lambda: torch.zeros(20 << 20, dtype=torch.uint8).add_(1)  # noqa: E731
    assert 19 < measuring.peak_of(step, torch.device("cpu")) < 40


def line(name, speed, top1):
    ends = {f"{key}{end}": value for key, value in (("images_per_s", speed),) for end in ("", "_q1", "_q3")}
    where = dict(device="a CPU", batch=8, dtype="float32", form="fused", mode="eager")
    return dict(network=name, top1=top1, params=1e6, macs=1e9, memory_mib=10.0, latency_ms=3.0, **ends, **where)


def test_names_in_the_picture_do_not_overlap(tmp_path, monkeypatch):
    """Of 24 networks, many of them close together; those without a top-1 stand below."""
    placed, place = [], plot._place
    monkeypatch.setattr(plot, "_place", lambda *given: placed.append(place(*given)) or placed[-1])
    generator = torch.Generator().manual_seed(0)
    spots = torch.rand(24, 2, generator=generator).tolist()
    lines = [line(f"network_{i}", 100 * 4**x, None if i > 21 else 80 + 5 * y) for i, (x, y) in enumerate(spots)]
    plot.draw(lines, tmp_path / "a.svg")
    boxes = [box for box, _ in placed]
    assert len(boxes) == 24
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if plot.overlap(box, other)]
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("y", [None, *plot.COLUMNS])
def test_pictures_of_every_column(tmp_path, y):
    """Bars where no network has a top-1."""
    plot.draw([line("a", 10.0, None), line("b", 20.0, None)], tmp_path / "a.png", y)
    assert (tmp_path / "a.png").stat().st_size > 3000


def test_a_csv_has_every_key_and_empty_unknown_values():
    text = tables.as_csv([dict(a=1, b=None), dict(a=2, b="x, y")])
    assert list(csv.reader(io.StringIO(text))) == [["a", "b"], ["1", ""], ["2", "x, y"]]


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_fits_eighty_columns_and_its_examples_are_valid(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for verb in VERBS:
        _, out, _ = call(verb, "--help")
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out
        examples = re.findall(r"\$ hybridzoo bench (\w+ .*?)\n *\n", out, re.S)
        assert examples
        for example in examples:
            words = shlex.split(" ".join(example.split()))
            command = get_command(verbs.app).commands[words[0]]
            command.make_context("bench", [word + "=" if word in ("--json", "--csv") else word for word in words[1:]])
    assert call()[1].strip() == call("--help")[1].strip(), "without a verb the help is shown"
