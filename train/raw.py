"""Lets mmengine's `Config.fromfile` and mmdet's and mmseg's builders read our configs.

`hybridzoo::NAME` works as a base there too. The values that follow from the network are set when a config is read, and
again when its detector or segmentor is built, because the network's name may have changed in between.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from mmengine import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, Registry

from hybridzoo.train.names import find_config, recipes
from hybridzoo.train.weights import tell

# `mmseg::` bases: mmengine looks for a distribution named mmsegmentation, but it may be onedl's.
MODULE2PACKAGE["mmseg"] = "mmseg"

read = Config.fromfile  # mmengine's function: the content of a file, without the values that follow from its network
_mmengines_path = Config._get_cfg_path
_mmengines_build = MODELS.build_func


def _path_of_base(base: str, filename: str) -> tuple[str, str | None]:
    """The file of a `_base_`: mmengine's rule, and ours for `hybridzoo::NAME`.

    For `package::folder/file.py`, mmengine first parses the package's model indexes, a hundred files; usually the file
    is simply inside the package, so that is tried first. Our published runs have no file, and our recipes no folder.
    """
    package, colons, name = base.partition("::")
    if not colons:
        return _mmengines_path(base, filename)
    if package != "hybridzoo":
        file = _in_package(package, name)
        return (str(file), package) if file is not None else _mmengines_path(base, filename)
    recipe = recipes().get(name.removesuffix(".py"))
    if recipe is None or not recipe.published:
        return str(find_config(name)), None
    composed = Path(_folder_of_runs(), f"{recipe.name}.py")
    if not composed.is_file():
        from hybridzoo.train.config import load_config

        load_config(recipe.name).dump(composed)
    return str(composed), None


def _in_package(package: str, name: str) -> Path | None:
    """A config's file in an installed package of OpenMMLab's."""
    spec = importlib.util.find_spec(package) if package in MODULE2PACKAGE else None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / ".mim" / "configs" / name
    return file if file.is_file() else None


@functools.cache
def _folder_of_runs() -> str:
    """A temporary folder for published runs as files, deleted when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="hybridzoo-recipes-")
    atexit.register(folder.cleanup)
    return folder.name


def _read_whole(*args: Any, **kwargs: Any) -> Config:
    """mmengine's `Config.fromfile`; for our recipes, and configs based on them, the network's values are set."""
    config = read(*args, **kwargs)
    mark = config.get("settle")
    if isinstance(mark, dict) and mark.pop("network", False):
        from hybridzoo.train import compose
        from hybridzoo.train.config import complete

        compose.fit(config)
        complete(config)
    return config


def _build(cfg: Any, registry: Registry, *args: Any, **kwargs: Any) -> Any:
    """mmengine's builder of models; a detector or segmentor with any timm network gets that network's widths."""
    backbone = cfg.get("backbone") if isinstance(cfg, dict) else None
    if isinstance(backbone, dict) and backbone.get("type") == "PyramidBackbone":
        from hybridzoo.train import compose

        changed = compose.completed(cfg)
        if changed is not None:
            tell(f"model {cfg['type']}: necks and heads get the widths of {backbone['name']}")
            cfg = changed
    return _mmengines_build(cfg, registry, *args, **kwargs)


Config._get_cfg_path = staticmethod(_path_of_base)
Config.fromfile = staticmethod(_read_whole)
for _registry in (MODELS, *MODELS.children.values()):
    _registry.build_func = _build
