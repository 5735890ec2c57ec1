"""Makes `import hybridzoo` work in a checkout that is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("backbones", "checkpoints", "configs", "kernels", "layers", "train")


def make_importable() -> None:
    """Also for the processes that this one starts."""
    try:
        installed = importlib.util.find_spec("hybridzoo.kernels") is not None
    except (ImportError, AttributeError):
        installed = False
    if installed:
        return
    for name in [n for n in sys.modules if n == "hybridzoo" or n.startswith("hybridzoo.")]:
        del sys.modules[name]  # the folder of that name at the root, which lacks the rooms
    links = ROOT / ".links" / "hybridzoo"
    links.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        _link(links / room, ROOT / room)
    for name in ("__init__.py", "__main__.py"):
        _link(links / name, ROOT / "hybridzoo" / name)
    _first(links.parent)
    importlib.invalidate_caches()


def _link(link: Path, target: Path) -> None:
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _first(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder) + (os.pathsep + before if before else "")
