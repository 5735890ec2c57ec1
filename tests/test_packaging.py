"""The wheel contains every package and every file."""

from __future__ import annotations

import re
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
