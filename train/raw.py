"""Configs of ours that others read and build: mmengine's `Config.fromfile`, mmdet's and mmseg's builders.

`hybridzoo::NAME` is a base for them too, and what follows from the network is put in when a config is read, and again
when its detector or segmentor is built, because the network may have got another name in between.
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

# `mmseg::` bases: mmengine looks for a distribution called mmsegmentation, which may be onedl's.
MODULE2PACKAGE["mmseg"] = "mmseg"

read = Config.fromfile  # mmengine's own: what a file says, without what follows from its network
_mmengines_path = Config._get_cfg_path
_mmengines_build = MODELS.build_func


def _path_of_base(base: str, filename: str) -> tuple[str, str | None]:
    """mmengine's way from a `_base_` to its file, and ours where it is `hybridzoo::NAME`.

    mmengine looks for `package::folder/file.py` inside a package, and first parses the package's lists of models, a
    hundred files, for another place; most often the file just lies there. A published run of ours has no file, and no
    recipe a folder.
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
    """A folder for published runs as files, which goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="hybridzoo-recipes-")
    atexit.register(folder.cleanup)
    return folder.name


def _read_whole(*args: Any, **kwargs: Any) -> Config:
    """mmengine's `Config.fromfile`; in a recipe of ours, or a config that begins from one, the network is put in."""
    config = read(*args, **kwargs)
    mark = config.get("settle")
    if isinstance(mark, dict) and mark.pop("network", False):
        from hybridzoo.train import compose
        from hybridzoo.train.config import complete

        compose.fit(config)
        complete(config)
    return config


def _build(cfg: Any, registry: Registry, *args: Any, **kwargs: Any) -> Any:
    """mmengine's building of a model; a detector or segmentor around any timm network gets that network's widths."""
    backbone = cfg.get("backbone") if isinstance(cfg, dict) else None
    if isinstance(backbone, dict) and backbone.get("type") == "PyramidBackbone":
        from hybridzoo.train import compose

        changed = compose.completed(cfg)
        if changed is not None:
            tell(f"model {cfg['type']}: necks and heads take the widths of {backbone['name']}")
            cfg = changed
    return _mmengines_build(cfg, registry, *args, **kwargs)


Config._get_cfg_path = staticmethod(_path_of_base)
Config.fromfile = staticmethod(_read_whole)
for _registry in (MODELS, *MODELS.children.values()):
    _registry.build_func = _build
