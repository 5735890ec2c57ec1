"""Semantic segmentation: mmseg's segmentors on ADE20K, or on the user's own folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import Config

import hybridzoo.train.registration  # noqa: F401 - our backbone and necks, and mmcv's operators before mmseg asks
from hybridzoo.train import measures, scenes
from hybridzoo.train.data.report import divided, how_of, place_of
from hybridzoo.train.data.segmentation import is_cityscapes, renumbered
from hybridzoo.train.images import MaskError, read_mask, without_zero
from hybridzoo.train.layouts import (
    IGNORED,
    SPLITS,
    Layout,
    OnBad,
    Place,
    ade20k_layout,
    inspect_segmentation,
    is_ade20k,
    masked_images,
    segmentation_layout,
)
from hybridzoo.train.lost import SkipsLost
from hybridzoo.train.nodes import dicts

with scenes.quietly():
    from mmseg.datasets import ADE20KDataset, BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import DATASETS, METRICS, TRANSFORMS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)


@TRANSFORMS.register_module(name="LoadAnnotations", force=True)
class LoadMask(LoadAnnotations):
    """mmseg's loading of a mask, with our reader: upright, with stored palette indices and 1-bit values.

    Raises:
        MaskError: a mask with another size than its image, or with ids outside the classes of `MaskScenes`.
    """

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        if self.backend_args:  # another dataset's file
            super()._load_seg_map(results)
            return
        file = Path(results["seg_map_path"])
        ids = read_mask(file)
        if results.get("seg_stored"):
            ids = renumbered(ids, results["seg_stored"])
        size = results.get("ori_shape") if "seg_classes" in results else None
        if size and ids.shape != tuple(size):
            sizes = [f"{width}x{height}" for height, width in (ids.shape, size)]
            raise MaskError(f"mask {file} is {sizes[0]}, its image {sizes[1]}; correct it")
        reduce = self.reduce_zero_label
        if results.get("reduce_zero_label") if reduce is None else reduce:
            ids = without_zero(ids)
        most = results.get("seg_classes", IGNORED) - 1
        wrong = (ids < 0) | ((ids > most) & (ids != IGNORED))
        if wrong.any():
            raise MaskError(
                f"mask {file} holds a value beyond its {most + 1} classes, {int(ids[wrong][0])}; correct it"
            )
        ids = ids.astype(np.uint8)
        before = ids.copy()
        for old, new in (results.get("label_map") or {}).items():
            ids[before == old] = new
        results["gt_seg_map"] = ids
        results["seg_fields"].append("gt_seg_map")


@DATASETS.register_module()
class MaskScenes(SkipsLost, BaseSegDataset):
    """Images with one-channel masks of class ids, without the files in `skipped` (full paths).

    Subfolders do not matter, nor suffixes unless they are given, see `hybridzoo.train.layouts.masked_images`. With
    `on_bad="skip"`, a training image that cannot be read any more is replaced by another one, with a message. `stored`
    is that of `hybridzoo.train.layouts.Layout`, `source` the result of its `Place.source`.
    """

    def __init__(
        self,
        *args: Any,
        skipped: Sequence[str] = (),
        img_suffix: str = "",
        seg_map_suffix: str = "",
        on_bad: OnBad = "stop",
        stored: Sequence[int] | None = None,
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.stored = list(stored) if stored is not None else None
        self.source = source
        self.skipped = {Path(path) for path in skipped}
        super().__init__(*args, img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
        self.skip_lost(on_bad)

    def load_data_list(self) -> list[dict[str, Any]]:
        shared = {"label_map": self.label_map, "reduce_zero_label": self.reduce_zero_label}
        shared["seg_classes"] = len(self.metainfo["classes"])
        if self.stored is not None:
            shared["seg_stored"] = self.stored
        folders = Path(self.data_prefix["img_path"]), Path(self.data_prefix["seg_map_path"])
        place = place_of(*folders, self.source)
        return [
            {"img_path": str(image), "seg_map_path": str(mask), "seg_fields": [], **shared}
            for image, mask in masked_images(place, (self.img_suffix, self.seg_map_suffix))
            if image not in self.skipped
        ]


@METRICS.register_module()
class MaskScenesMetric(IoUMetric):
    """mmseg's metrics, computed from exact confusion counts.

    Args:
        **kwargs: passed to mmseg's class.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.details: measures.Details | None = None  # of the last validation, in the first process

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        if self.format_only:
            super().process(data_batch, data_samples)
            return
        classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            predicted = sample["pred_sem_seg"]["data"].squeeze().long().cpu().numpy()
            true = sample["gt_sem_seg"]["data"].squeeze().long().cpu().numpy()
            known = true != self.ignore_index
            # The pairs of classes in the image, which are few, with their counts.
            self.results.append(np.unique(true[known] * classes + predicted[known], return_counts=True))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """mmseg's metrics, which it rounds to two decimals."""
        if self.format_only:
            return super().compute_metrics(results)
        names = self.dataset_meta["classes"]
        flat = np.zeros(len(names) ** 2, np.int64)
        for pairs, numbers in results:
            flat[pairs] += numbers
        counts = flat.reshape(len(names), len(names))
        self.details = measures.segmentation(len(results), counts, names)
        right, found, true = np.diagonal(counts), counts.sum(0), counts.sum(1)
        areas = (right, found + true - right, found, true)
        return super().compute_metrics([tuple(torch.from_numpy(area.astype(float)) for area in areas)])


def configure(
    config: Config, data: Path | None, *, splits: Sequence[str] = SPLITS, classes: Sequence[str] | None = None
) -> None:
    """Put the data's place and classes into `config`, in place, after checking the data.

    A folder in the layout of the config's own dataset (the one that its `data_prefix` names, e.g. ADE20K's
    `images/training`) keeps the config's classes; any other is ADE20K or a scenes folder, see
    `hybridzoo.train.layouts`. All are checked in the same way, except datasets that read their files in their own way.

    Args:
        config: of a segmentation run.
        data: the user's folder; default the config's own data.
        splits: the parts that will be used; they are checked.
        classes: names of a trained model's classes, in order; default the data's.

    Raises:
        UserError: no data, or data that cannot be trained on.
    """
    root = scenes.find_root(config, data)
    scenes.read_by_ours(config)
    used = [dataset for split in splits for dataset in scenes.datasets(config, split)]
    if "test" not in splits and all((root / dataset.data_prefix.img_path).is_dir() for dataset in used):
        layout = _own_layout(config, root, used)
        if layout is None:
            print(f"data {root}: read by mmseg's {used[0].type}, and not checked")
            for split in SPLITS:
                for dataset in scenes.datasets(config, split):
                    dataset.data_root = str(root)
            return
    else:
        layout = layout_of(root)

    how = how_of(config, splits, classes)
    layout = divided(layout, how, root)
    report = inspect_segmentation(root, how, layout=layout)
    layout = report.layout
    report.tell()
    tested = "test" if "test" in splits else "val"
    for split in SPLITS:
        place = layout.places[tested if split == "val" else split]
        for dataset in scenes.datasets(config, split):
            dataset.update(
                type="MaskScenes",
                data_root=str(root),
                data_prefix={
                    "img_path": scenes.below(place.images, root),
                    "seg_map_path": scenes.below(place.labels, root),
                },
                skipped=[str(path) for path in report.skipped],
                img_suffix=layout.suffixes[0],
                seg_map_suffix=layout.suffixes[1],
                reduce_zero_label=layout.zero_is_none,
            )
            scenes.say(dataset, stored=layout.stored, source=place.source())
            for step in dicts(dataset.pipeline):
                if step.get("reduce_zero_label"):  # the data decide
                    step.reduce_zero_label = layout.zero_is_none
    for metric in scenes.evaluators(config, "IoUMetric"):
        metric.type = "MaskScenesMetric"
    for dataset in scenes.datasets(config, "train"):
        dataset.on_bad = how.on_bad
    scenes.set_classes(config, report.classes)


def layout_of(root: Path) -> Layout:
    """ADE20K's layout, with its 150 classes unless there is a `classes.txt`, Cityscapes', or ours."""
    if not is_ade20k(root):
        return segmentation_layout(root)
    return ade20k_layout(root, None if (root / "classes.txt").exists() else ADE20KDataset.METAINFO["classes"])


def _own_layout(config: Config, root: Path, used: Sequence[Any]) -> Layout | None:
    """The places of the config's own datasets; None if mmseg reads them in another way."""
    with DATASETS.switch_scope_and_registry(config.get("default_scope", "mmseg")) as registry:
        kinds = [registry.get(node.type) if isinstance(node.type, str) else node.type for node in used]
    ours = kinds[0] is MaskScenes
    if any(node.get("source") or node.get("stored") for node in used) or is_cityscapes(root):
        return layout_of(root)
    plain = (MaskScenes.load_data_list, BaseSegDataset.load_data_list)
    for kind, node in zip(kinds, used, strict=True):
        own_names = not ours and (node.get("metainfo") or {}).get("classes") is not None
        if kind.load_data_list not in plain or node.get("ann_file") or own_names or node.get("backend_args"):
            return None
    if ours and (root / "masks").is_dir():
        return segmentation_layout(root)
    places: dict[str, Place] = {}
    for split in SPLITS:
        for node in scenes.datasets(config, split):
            place = Place(root / node.data_prefix.img_path, root / node.data_prefix.seg_map_path)
            if places.setdefault(split, place) != place:
                return None
    kind, node = kinds[0], used[0]

    def value(name: str) -> Any:
        return node[name] if name in node else _default(kind, name)

    names = (node.get("metainfo") or {}).get("classes") or kind.METAINFO.get("classes")
    return Layout(
        places,
        None if (root / "classes.txt").is_file() else names,
        bool(value("reduce_zero_label")),
        (value("img_suffix"), value("seg_map_suffix")),
    )


def _default(kind: type, name: str) -> Any:
    """The default value of an argument of a dataset's class."""
    for owner in kind.__mro__:
        given = inspect.signature(owner.__init__).parameters.get(name)  # type: ignore[misc]
        if given is not None:
            return given.default
    return ""
