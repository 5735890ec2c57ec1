"""Who may know whom: the arrows between the rooms, read from the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "layers": {"layers", "kernels"},
    "checkpoints": {"checkpoints"},
    "backbones": {"backbones", "layers", "kernels", "checkpoints"},
    "train": {"train", "backbones", "layers", "kernels", "checkpoints", "configs"},
}
ONLY_TRAIN = {"matplotlib", "mmcv", "mmdet", "mmengine", "mmseg", "rich", "scipy", "sklearn", "typer", "wandb"}
FILES = [(room, file) for room in MAY_IMPORT for file in sorted((ROOT / room).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports would follow the folders, not the package"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("room", "file"), FILES, ids=lambda value: str(getattr(value, "name", value)))
def test_imports_follow_the_order_of_the_rooms(room, file):
    for name in imported(file):
        package, *rest = name.split(".")
        if package == "hybridzoo" and rest and rest[0] != "__version__":
            assert rest[0] in MAY_IMPORT[room], f"{room} may not import {name}"
        assert room == "train" or package not in ONLY_TRAIN, f"{room} may not import {name}"


def test_every_room_has_files():
    assert {room for room, _ in FILES} == set(MAY_IMPORT)
