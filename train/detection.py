"""Detection and instance segmentation for the engine: mmdet's detectors on COCO, or on a folder of one's own scenes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mmengine import Config

import hybridzoo.train.backbone  # registers PyramidBackbone
import hybridzoo.train.necks  # noqa: F401 - registers FinerFPN
from hybridzoo.train import scenes

with scenes.quietly():
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric
    from mmdet.registry import DATASETS, METRICS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@DATASETS.register_module()
class CocoScenes(CocoDataset):
    """mmdet's COCO dataset without the images named in `skipped` (full paths), which cannot be read."""

    METAINFO: ClassVar[dict[str, Any]] = {}  # no palette for COCO's 80 classes

    def __init__(self, *args: Any, skipped: Sequence[str] = (), **kwargs: Any) -> None:
        self.skipped = {os.path.realpath(path) for path in skipped}
        with scenes.quietly():  # pycocotools prints
            super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        return [entry for entry in super().load_data_list() if os.path.realpath(entry["img_path"]) not in self.skipped]


@METRICS.register_module()
class CocoScenesMetric(CocoMetric):
    """COCO's average precision over the images that were predicted: skipped ones do not count as missed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with scenes.quietly():
            super().__init__(*args, **kwargs)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        self.img_ids = [truth["img_id"] for truth, _ in results]
        with scenes.quietly():
            return super().compute_metrics(results)


def configure(config: Config, data: Path | None) -> None:
    """Put the data's place and classes into `config`, in place, after checking the data.

    A folder in COCO's own layout (the one that the config's `ann_file` names, e.g.
    `annotations/instances_train2017.json`) keeps the config's classes and is not looked through. Any other is taken
    for a scenes folder, see `hybridzoo.train.layouts`.

    Args:
        config: of a detection run.
        data: the user's folder; default the config's own data.

    Raises:
        UserError: no data, or data that cannot be trained on.
    """
    root = scenes.find_root(config, data)
    sets = [dataset for split in ("train", "val") for dataset in scenes.datasets(config, split)]
    if sets[0].type != "CocoScenes" and all((root / dataset.ann_file).is_file() for dataset in sets):
        for dataset in sets:
            dataset.data_root = str(root)
        for metric in scenes.evaluators(config, "CocoMetric"):
            metric.ann_file = str(root / next(scenes.datasets(config, "val")).ann_file)
        return

    from hybridzoo.train.layouts import check_detection  # decodes images: only where training needs it

    skipped: list[Path] = []
    masks = "mask_head" in (config.model.get("roi_head") or config.model)
    names = check_detection(root, masks=masks, on_bad=config.get("on_bad") or "stop", skipped=skipped)
    for split in ("train", "val"):
        for dataset in scenes.datasets(config, split):
            dataset.update(type="CocoScenes", data_root=str(root), ann_file=f"annotations/{split}.json")
            dataset.update(data_prefix={"img": f"images/{split}/"}, skipped=[str(path) for path in skipped])
    for kind in ("CocoMetric", "CocoScenesMetric"):
        for metric in scenes.evaluators(config, kind):
            metric.update(type="CocoScenesMetric", ann_file=str(root / "annotations" / "val.json"))
    scenes.set_classes(config, names)
