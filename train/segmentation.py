"""Semantic segmentation for the engine: mmseg's segmentors on ADE20K, or on a folder of one's own scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import Config

import hybridzoo.train.registration  # noqa: F401 - our backbone and necks, and mmcv's operators before mmseg asks
from hybridzoo.train import scenes
from hybridzoo.train.images import read_mask
from hybridzoo.train.layouts import IGNORED, SPLITS, How, inspect_segmentation, masked_images

with scenes.quietly():
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations
    from mmseg.registry import DATASETS, TRANSFORMS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@TRANSFORMS.register_module(name="LoadAnnotations", force=True)
class LoadMask(LoadAnnotations):
    """mmseg's loading of a mask by our reader: upright, palette indices and 1-bit values as they are stored."""

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        if self.backend_args:  # not a file of ours
            super()._load_seg_map(results)
            return
        ids = read_mask(Path(results["seg_map_path"])).astype(np.uint8)
        reduce = self.reduce_zero_label
        if results.get("reduce_zero_label") if reduce is None else reduce:
            ids = ids - np.uint8(1)  # 0 becomes 255, which is ignored,
            ids[ids == IGNORED - 1] = IGNORED  # and stays so
        before = ids.copy()
        for old, new in (results.get("label_map") or {}).items():
            ids[before == old] = new
        results["gt_seg_map"] = ids
        results["seg_fields"].append("gt_seg_map")


@DATASETS.register_module()
class MaskScenes(BaseSegDataset):
    """Images with one-channel masks of class ids, without those named in `skipped` (full paths).

    Suffixes and folders below do not matter, see `hybridzoo.train.layouts.masked_images`.
    """

    def __init__(self, *args: Any, split: str = "train", skipped: Sequence[str] = (), **kwargs: Any) -> None:
        self.split = split
        self.skipped = {Path(path) for path in skipped}
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        shared = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        return [
            {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": [], **shared}
            for image, mask in masked_images(Path(self.data_root), self.split)
            if image not in self.skipped
        ]


def configure(
    config: Config, data: Path | None, *, splits: Sequence[str] = SPLITS, classes: Sequence[str] | None = None
) -> None:
    """Put the data's place and classes into `config`, in place, after checking the data.

    A folder in the layout of the config's own dataset (the one that its `data_prefix` names, e.g. ADE20K's
    `images/training`) keeps the config's classes and is not looked through. Any other is taken for a scenes folder,
    see `hybridzoo.train.layouts`.

    Args:
        config: of a segmentation run.
        data: the user's folder; default the config's own data.
        splits: the parts that will be used, which are looked through.
        classes: names that a trained model knows, in order; default the data's.

    Raises:
        UserError: no data, or data that cannot be trained on.
    """
    root = scenes.find_root(config, data)
    scenes.read_by_ours(config)
    used = [dataset for split in splits for dataset in scenes.datasets(config, split)]
    if used[0].type != "MaskScenes" and all((root / dataset.data_prefix.img_path).is_dir() for dataset in used):
        for split in SPLITS:
            for dataset in scenes.datasets(config, split):
                dataset.data_root = str(root)
        return

    report = inspect_segmentation(root, How(config.get("on_bad") or "stop", splits, classes, config.get("white_value")))
    report.tell()
    for split in SPLITS:
        for dataset in scenes.datasets(config, split):
            dataset.update(
                type="MaskScenes",
                data_root=str(root),
                split=split,
                data_prefix={"img_path": f"images/{split}", "seg_map_path": f"masks/{split}"},
                skipped=[str(path) for path in report.skipped],
            )
            for key in ("img_suffix", "seg_map_suffix"):
                dataset.pop(key, None)
            for step in scenes.dicts(dataset.pipeline):
                if step.get("reduce_zero_label"):  # ADE20K's id 0 is no class; here it is one
                    step.reduce_zero_label = False
    scenes.set_classes(config, report.classes)
