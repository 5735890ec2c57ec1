"""Semantic segmentation for the engine: mmseg's segmentors on ADE20K, or on a folder of one's own scenes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine import Config

import hybridzoo.train.backbone  # noqa: F401 - registers PyramidBackbone
from hybridzoo.train import scenes

with scenes.quietly():
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@DATASETS.register_module()
class MaskScenes(BaseSegDataset):
    """Images with one-channel masks of class ids, without the images named in `skipped`, which cannot be read."""

    def __init__(self, *args: Any, skipped: Sequence[str] = (), **kwargs: Any) -> None:
        self.skipped = {os.path.realpath(path) for path in skipped}
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        return [entry for entry in super().load_data_list() if os.path.realpath(entry["img_path"]) not in self.skipped]


def configure(config: Config, data: Path | None) -> None:
    """Put the data's place and classes into `config`, in place, after checking the data.

    A folder in the layout of the config's own dataset (the one that its `data_prefix` names, e.g. ADE20K's
    `images/training`) keeps the config's classes and is not looked through. Any other is taken for a scenes folder,
    see `hybridzoo.train.layouts`.

    Args:
        config: of a segmentation run.
        data: the user's folder; default the config's own data.

    Raises:
        UserError: no data, or data that cannot be trained on.
    """
    root = scenes.find_root(config, data)
    sets = [dataset for split in ("train", "val") for dataset in scenes.datasets(config, split)]
    if sets[0].type != "MaskScenes" and all((root / dataset.data_prefix.img_path).is_dir() for dataset in sets):
        for dataset in sets:
            dataset.data_root = str(root)
        return

    from hybridzoo.train.layouts import check_segmentation  # decodes images: only where training needs it

    skipped: list[Path] = []
    names = check_segmentation(root, on_bad=config.get("on_bad") or "stop", skipped=skipped)
    for split in ("train", "val"):
        for dataset in scenes.datasets(config, split):
            dataset.update(
                type="MaskScenes",
                data_root=str(root),
                data_prefix={"img_path": f"images/{split}", "seg_map_path": f"masks/{split}"},
                img_suffix=_suffix(root / "images" / split),
                seg_map_suffix=_suffix(root / "masks" / split),
                skipped=[str(path) for path in skipped],
            )
            for step in scenes.dicts(dataset.pipeline):
                if step.get("reduce_zero_label"):  # ADE20K's id 0 is no class; here it is one
                    step.reduce_zero_label = False
    scenes.set_classes(config, names)


def _suffix(folder: Path) -> str:
    """The one suffix of a folder's files: `check_segmentation` has refused mixtures."""
    from timm.data.readers.img_extensions import get_img_extensions

    return next(path.suffix for path in sorted(folder.iterdir()) if path.suffix.lower() in get_img_extensions())
