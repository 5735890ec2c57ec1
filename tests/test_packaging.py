"""The wheel contains every package, and the import of hybridzoo is fast."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("backbones", "checkpoints", "configs", "hybridzoo", "kernels", "layers", "train")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_packages_list_every_folder():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for room in ROOMS:
        for folder in {f.parent for f in (ROOT / room).rglob("*.py")}:
            relative = folder.relative_to(ROOT)
            found.add("hybridzoo" if room == "hybridzoo" else ".".join(("hybridzoo", *relative.parts)))
    assert listed == found


def test_the_wheel_has_every_file(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    # From a copy: setuptools builds inside the folder.
    tracked = [f for room in ROOMS for f in (ROOT / room).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    copy = tmp_path / "source"
    for file in [*tracked, ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]:
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hybridzoo-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for file in tracked:
        path = file.relative_to(ROOT).as_posix()
        assert (path if path.startswith("hybridzoo/") else f"hybridzoo/{path}") in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_core_dependencies_are_three():
    names = {re.split(r"[<>=\[]", d)[0] for d in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "torchvision", "timm"}
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        "docs",
        "train", "detection", "segmentation", "shards", "tensorboard", "export", "dev", "all",
    }  # fmt: skip


EXTRAS = ("mmengine", "mmcv", "mmdet", "mmseg", "rich", "typer", "wandb", "matplotlib", "sklearn", "scipy")
IMPORTS = f"""
import json, os, sys, time, warnings
a = time.perf_counter(); import torch, torchvision; torchs = time.perf_counter() - a

def timed():
    a = time.perf_counter(); import timm; b = time.perf_counter()
    modules, timms = set(sys.modules), {{n: timm.models.model_entrypoint(n) for n in timm.list_models()}}
    warnings.simplefilter("error")
    c = time.perf_counter(); import hybridzoo; d = time.perf_counter()
    return dict(
        ratio=1 + (d - c) / (torchs + b - a),
        added=sorted(set(sys.modules) - modules),
        changed=[n for n, f in timms.items() if timm.models.model_entrypoint(n) is not f],
        ours=len(timm.list_models()) - len(timms),
    )

def without_extras():
    sys.modules.update(dict.fromkeys({EXTRAS}))
    import hybridzoo, hybridzoo.layers, hybridzoo.kernels, hybridzoo.checkpoints, timm
    return timm.create_model("biformer_tiny", num_classes=2).eval()(torch.zeros(1, 3, 32, 32)).shape

for answer in (timed, timed, timed, without_extras):
    child = os.fork()
    if not child:
        print(json.dumps(answer()), flush=True)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, answer
"""


@pytest.fixture(scope="module")
def answers() -> list:
    """What four processes say that imported nothing of ours: forks of one, since PyTorch takes long to import."""
    return [json.loads(line) for line in python(IMPORTS).splitlines()]


@pytest.fixture
def imports(answers) -> list[dict]:
    """What importing hybridzoo after timm does and takes, in three of them."""
    return answers[:3]


def test_import_adds_nothing_heavy(imports):
    added = imports[0]["added"]
    assert "hybridzoo.backbones.biformer" in added
    heavy = {"triton", "mmengine", "mmcv", "mmdet", "mmseg", "wandb", "matplotlib", "rich", "typer", "sklearn"}
    assert not {name.split(".")[0] for name in added} & heavy
    assert not [name for name in added if name.startswith("hybridzoo.train")]


def test_import_costs_little_more_than_timm(imports):
    """At most 1.15 times `import timm`: what comes after timm is timed in the same process, so that noise is shared."""
    ratios = [found["ratio"] for found in imports]
    assert statistics.median(ratios) <= 1.15, ratios


def test_no_name_of_timm_is_overwritten(imports):
    assert imports[0]["changed"] == []
    assert imports[0]["ours"] >= 5


def test_importing_is_possible_without_the_extras(answers):
    """A core installation has no mmengine, rich or typer: the front door and every room but train must not ask."""
    assert answers[3] == [1, 2]
