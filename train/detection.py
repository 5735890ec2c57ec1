"""Detection and instance segmentation: mmdet's detectors on COCO, or on the user's own folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mmengine import Config
from mmengine.model import BaseTTAModel
from mmengine.structures import InstanceData
from pycocotools import mask as mask_tools
from torchvision.ops import batched_nms

import hybridzoo.train.registration  # noqa: F401 - our backbone and necks, and mmcv's operators before mmdet asks
from hybridzoo.train import coco, measures, scenes, views
from hybridzoo.train.data import labels
from hybridzoo.train.data.report import divided, how_of, place_of
from hybridzoo.train.layouts import SPLITS, Layout, OnBad, Place, detection_layout, inspect_detection
from hybridzoo.train.lost import SkipsLost
from hybridzoo.train.nodes import dicts

with scenes.quietly():
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.api_wrappers import COCO, COCOeval
    from mmdet.evaluation import CocoMetric
    from mmdet.registry import DATASETS, METRICS, MODELS
    from mmdet.structures.bbox import bbox_flip
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)


_KINDS = {"bbox": "box", "segm": "mask"}
# mmdet's names of pycocotools' results, in pycocotools' order.
_ITEMS = {
    "mAP": 0,
    "mAP_50": 1,
    "mAP_75": 2,
    "mAP_s": 3,
    "mAP_m": 4,
    "mAP_l": 5,
    "AR@100": 6,
    "AR@300": 7,
    "AR@1000": 8,
    "AR_s@1000": 9,
    "AR_m@1000": 10,
    "AR_l@1000": 11,
}


class _Annotations(COCO):  # type: ignore[misc]
    """mmdet's interface to COCO annotations, for annotations that are already in memory."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self.dataset = content
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


@DATASETS.register_module()
class CocoScenes(SkipsLost, CocoDataset):
    """mmdet's COCO dataset, with annotations repaired by `hybridzoo.train.coco`.

    Args:
        skipped: full paths of images to leave out.
        masks: whether masks are used.
        on_bad: if a training image cannot be read any more: "stop", or "skip" it with a message and use another one.
        source: the result of `Place.source` in `hybridzoo.train.data.report`; default plain COCO.
        *args, **kwargs: mmdet's; the class names in `metainfo` give the order of the labels.
    """

    METAINFO: ClassVar[dict[str, Any]] = {}  # no palette for COCO's 80 classes

    def __init__(
        self,
        *args: Any,
        skipped: Sequence[str] = (),
        masks: bool = False,
        on_bad: OnBad = "stop",
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.source = source
        self.skipped = [Path(path) for path in skipped]
        self.masks = masks
        with scenes.quietly():  # pycocotools prints
            super().__init__(*args, **kwargs)
        self.skip_lost(on_bad)

    def COCOAPI(self, file: str) -> _Annotations:
        folder = Path(self.data_prefix["img"])
        place = place_of(folder, Path(file), self.source)
        return _load(place, self.metainfo["classes"], self.masks, self.skipped)


@METRICS.register_module()
class CocoScenesMetric(CocoMetric):
    """COCO's average precision, over the same annotations and the predicted images.

    Args:
        ann_file: the annotations.
        folder: where the images lie.
        classes: names in the order of the labels.
        skipped: full paths of images that were left out.
        source: see `CocoScenes`.
        **kwargs: mmdet's.
    """

    def __init__(
        self,
        ann_file: str = "",
        folder: str = "",
        classes: Sequence[str] = (),
        skipped: Sequence[str] = (),
        source: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.details: measures.Details | None = None  # of the last validation, in the first process
        with scenes.quietly():
            masks = "segm" in self.metrics
            place = place_of(Path(folder), Path(ann_file), source)
            self._coco_api = _load(place, classes, masks, [Path(path) for path in skipped])

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """mmdet's metrics, not rounded; 0 if nothing was detected, for which mmdet gives no score."""
        self.img_ids = [truth["img_id"] for truth, _ in results]
        if self.format_only or not set(self.metrics) <= _KINDS.keys():
            with scenes.quietly():
                return super().compute_metrics(results)
        self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])
        found = [answer for _, answer in results]
        metrics: dict[str, float] = {}
        evaluated: dict[str, Any] = {}
        for kind in self.metrics:
            evaluation = self._evaluate(found, kind)
            evaluated[_KINDS[kind]] = evaluation.eval
            nothing = not any(len(answer["bboxes"]) for answer in found)
            for item in self.metric_items or list(_ITEMS)[:6]:
                metrics[f"{kind}_{item}"] = 0.0 if nothing else float(evaluation.stats[_ITEMS[item]])
        counts = self._confused(found)
        self.details = measures.detection(len(results), counts, self.dataset_meta["classes"], evaluated)
        return metrics

    def _evaluate(self, found: Sequence[dict[str, Any]], kind: str) -> COCOeval:
        """pycocotools' finished evaluation of "bbox" or "segm"."""
        objects: list[dict[str, Any]] = []
        for image, answer in zip(self.img_ids, found, strict=True):
            scores = answer.get("mask_scores", answer["scores"]) if kind == "segm" else answer["scores"]
            for i, (left, top, right, bottom) in enumerate(answer["bboxes"].tolist()):
                entry = {"image_id": image, "category_id": self.cat_ids[answer["labels"][i]], "iscrowd": 0}
                entry |= {"id": len(objects) + 1, "score": float(scores[i])}
                if kind == "segm":
                    entry |= {"segmentation": answer["masks"][i], "area": float(mask_tools.area(answer["masks"][i]))}
                else:
                    width, height = right - left, bottom - top
                    entry |= {"bbox": [left, top, width, height], "area": width * height}
                objects.append(entry)
        truth = self._coco_api.dataset
        with scenes.quietly():  # pycocotools prints
            answers = _Annotations({**truth, "annotations": objects})
            evaluation = COCOeval(self._coco_api, answers, kind)
            evaluation.params.catIds, evaluation.params.imgIds = self.cat_ids, self.img_ids
            evaluation.params.maxDets, evaluation.params.iouThrs = list(self.proposal_nums), self.iou_thrs
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _confused(self, found: Sequence[dict[str, Any]]) -> measures.Counts:
        """(true, predicted) numbers of objects, matched by boxes; the last row and column mean "nothing"."""
        classes = len(self.cat_ids)
        counts = np.zeros((classes + 1, classes + 1), np.int64)
        index = {number: i for i, number in enumerate(self.cat_ids)}
        for image, answer in zip(self.img_ids, found, strict=True):
            truth = [entry for entry in self._coco_api.imgToAnns[image] if entry["category_id"] in index]
            crowd = np.array([bool(entry.get("iscrowd")) for entry in truth], bool)
            sure = np.argsort(-answer["scores"], kind="stable")
            sure = sure[answer["scores"][sure] >= measures.SCORE]
            boxes = np.asarray(answer["bboxes"][sure], np.float64).reshape(-1, 4)
            boxes[:, 2:] -= boxes[:, :2]
            true_boxes = np.array([entry["bbox"] for entry in truth], np.float64).reshape(-1, 4)
            overlaps = np.zeros((len(boxes), len(truth)))
            if overlaps.size:
                overlaps = mask_tools.iou(boxes, true_boxes, crowd.astype(np.uint8))
            true = np.array([index[entry["category_id"]] for entry in truth], np.int64)
            for pair in measures.matched(true, np.asarray(answer["labels"])[sure], overlaps, crowd):
                counts[pair] += 1
        return counts


@MODELS.register_module()
class ViewsOfObjects(BaseTTAModel):
    """Merges a detector's results in several views of an image, including masks, which mmdet's version does not.

    Args:
        most: number of objects to keep.
        **kwargs: mmengine's, with the detector as `module`.
    """

    def __init__(self, most: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.most = most

    def merge_preds(self, data_samples_list: Sequence[Sequence[Any]]) -> list[Any]:
        """Merge the views of an image, which may be mirrored: keeps objects that no better one of their class
        overlaps."""
        return [self._merged(samples) for samples in data_samples_list]

    def _merged(self, samples: Sequence[Any]) -> Any:
        found = []
        for sample in samples:
            objects = sample.pred_instances
            if sample.metainfo.get("flip"):
                objects.bboxes = bbox_flip(objects.bboxes, sample.ori_shape, sample.flip_direction)
                if "masks" in objects:
                    objects.masks = objects.masks.flip(-1)
            found.append(objects)
        objects = InstanceData.cat(found)
        kept = batched_nms(objects.bboxes, objects.scores, objects.labels, views.OVERLAP)[: self.most]
        samples[0].pred_instances = objects[kept]
        return samples[0]


def _load(place: Place, classes: Sequence[str], masks: bool, skipped: Sequence[Path]) -> _Annotations:
    content = labels.read(place)
    fixed = coco.repaired(content, place.labels, place.images, classes=classes, masks=masks, skipped=skipped)
    return _Annotations(fixed)


def configure(
    config: Config, data: Path | None, *, splits: Sequence[str] = SPLITS, classes: Sequence[str] | None = None
) -> None:
    """Put the data's place and classes into `config`, in place, after checking the data.

    A folder in the layout of the config's own dataset (the one that its `ann_file` names, e.g.
    `annotations/instances_train2017.json`) keeps the config's classes, if its categories are among them; any other
    folder must have one of the layouts in `hybridzoo.train.layouts`. All are checked in the same way, except datasets
    that read their files in their own way.

    Args:
        config: of a detection run.
        data: the user's folder; default the config's own data.
        splits: the parts that will be used; they are checked.
        classes: names of a trained model's classes, in order; default those of the training annotations.

    Raises:
        UserError: no data, or data that cannot be trained on.
    """
    root = scenes.find_root(config, data)
    scenes.read_by_ours(config)
    _drop_empty_boxes(config)
    used = [dataset for split in splits for dataset in scenes.datasets(config, split)]
    if "test" not in splits and all(
        dataset.get("ann_file") and (root / dataset.ann_file).is_file() for dataset in used
    ):
        layout = _own_layout(config, root, used)
        if layout is None:
            print(f"data {root}: read by mmdet's {used[0].type}, and not checked")
            for split in SPLITS:
                for dataset in scenes.datasets(config, split):
                    dataset.data_root = str(root)
            for metric in scenes.evaluators(config, "CocoMetric"):
                metric.ann_file = str(root / next(scenes.datasets(config, "val")).ann_file)
            return
    else:
        layout = detection_layout(root)

    masks = "mask_head" in (config.model.get("roi_head") or config.model)
    how = how_of(config, splits, classes)
    layout = divided(layout, how, root)
    report = inspect_detection(root, how, masks=masks, layout=layout)
    report.tell()
    names, left_out = report.classes, [str(path) for path in report.skipped]
    tested = "test" if "test" in splits else "val"
    for split in SPLITS:
        place = layout.places[tested if split == "val" else split]
        for dataset in scenes.datasets(config, split):
            dataset.update(type="CocoScenes", data_root=str(root), ann_file=scenes.below(place.labels, root))
            dataset.update(data_prefix={"img": f"{scenes.below(place.images, root)}/"}, skipped=left_out, masks=masks)
            scenes.say(dataset, source=place.source())
    for kind in ("CocoMetric", "CocoScenesMetric"):
        for metric in scenes.evaluators(config, kind):
            metric.update(type="CocoScenesMetric", ann_file=str(layout.places[tested].labels))
            metric.update(folder=str(layout.places[tested].images), classes=names, skipped=left_out)
            scenes.say(metric, source=layout.places[tested].source())
    for dataset in scenes.datasets(config, "train"):
        dataset.on_bad = how.on_bad
    scenes.set_classes(config, names)


def _own_layout(config: Config, root: Path, used: Sequence[Any]) -> Layout | None:
    """The places of the config's own datasets; None if mmdet reads them in another way."""
    with DATASETS.switch_scope_and_registry(config.get("default_scope", "mmdet")) as registry:
        kinds = [registry.get(node.type) if isinstance(node.type, str) else node.type for node in used]
    ours = kinds[0] is CocoScenes
    if any(node.get("source") for node in used):  # not plain COCO: detect the folder's layout instead
        return detection_layout(root)
    for kind, node in zip(kinds, used, strict=True):
        own_names = not ours and (node.get("metainfo") or {}).get("classes") is not None
        if kind not in (CocoDataset, CocoScenes) or own_names or node.get("backend_args"):
            return None
    places: dict[str, Place] = {}
    for split in SPLITS:
        for node in scenes.datasets(config, split):
            place = Place(root / node.data_prefix.get("img", ""), root / node.get("ann_file", ""))
            if places.setdefault(split, place) != place:
                return None
    return Layout(places, None if ours else CocoDataset.METAINFO["classes"])


def _drop_empty_boxes(config: Config) -> None:
    """Remove boxes of which a crop has left nothing, before the sample is packed for training.

    `RandomCrop(recompute_bbox=True)` gives [0, 0, 0, 0] for an object whose box overlaps the crop and whose mask does
    not; its box loss is infinite. A sample without any other object is replaced by another one, as `RandomCrop` does.
    """
    for loader in dicts(config.get("train_dataloader")):
        steps = loader.get("pipeline")
        kinds = [str(step.get("type")).split(".")[-1] for step in steps or []]
        if "PackDetInputs" in kinds and "FilterAnnotations" not in kinds:
            steps.insert(kinds.index("PackDetInputs"), dict(type="FilterAnnotations", min_gt_bbox_wh=(0.01, 0.01)))
