"""Image classification: timm's transforms, mixing and losses for any timm model; its data: `classified`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS, MODELS
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import hybridzoo.train.classified  # noqa: F401 - registers the dataset
from hybridzoo.train import measures, networks
from hybridzoo.train.backbone import freeze
from hybridzoo.train.data.classification import class_folders, used_holdout
from hybridzoo.train.data.report import SPLIT_NAMES, how_of, no_split
from hybridzoo.train.data.shards import Shards, shards_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.layouts import SPLITS, inspect_classification
from hybridzoo.train.weights import load_matching, read_parts, tell


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A timm model with its training loss, for mmengine's runner.

    Args:
        name: name of the timm model.
        num_classes: number of classes; the engine sets it from the data.
        pretrained: load timm's weights for the name.
        mixup: arguments of ``timm.data.Mixup`` (``mixup_alpha``, ``cutmix_alpha``, ``switch_prob``, ...), or None.
        label_smoothing: amount, in [0, 1).
        aux_weight: weight of the loss of auxiliary logits, if the model returns them in training (OverLoCK's
            `aux_head`).
        frozen_stages: the stem (0), or the stem and the first k stages (k), do not learn and keep their statistics.
        binary: binary cross-entropy over the classes instead of softmax.
        tta: predict the mean over an image and its mirror image.
        data_preprocessor: mmengine's; the default moves the batch to the device.
        **model_args: passed to ``timm.create_model`` (``drop_path_rate``, ``img_size``, ...).

    Raises:
        UserError: unknown model; the message suggests the nearest names.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        pretrained: bool = False,
        mixup: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        binary: bool = False,
        aux_weight: float = 0.4,
        frozen_stages: int = -1,
        tta: bool = False,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(data_preprocessor)
        self.model = networks.create("model", name, model_args, pretrained=pretrained, num_classes=num_classes)
        self.frozen = freeze(self.model, frozen_stages)
        self.tta = tta
        self.aux_weight = aux_weight
        self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup) if mixup else None
        self.loss: nn.Module
        if binary:
            self.loss = BinaryCrossEntropy(smoothing=0.0 if mixup else label_smoothing)
        elif mixup:
            self.loss = SoftTargetCrossEntropy()
        else:
            self.loss = LabelSmoothingCrossEntropy(label_smoothing)

    def train(self, mode: bool = True) -> ImageClassifier:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def init_weights(self) -> None:
        """Does nothing: timm has initialised the model, and mmengine's default would overwrite loaded weights."""

    def load_weights(self, path: str | Path, *, allow_head_mismatch: bool) -> None:
        """Load a file's weights into the timm model, see :func:`hybridzoo.train.weights.load_matching`."""
        state = read_parts(path, self.model).network
        report = load_matching(self.model, state, allow_head_mismatch=allow_head_mismatch, source=path)
        if allow_head_mismatch:  # weights to start from; without a mismatch everything fits
            tell(f"weights {path}: {report}")

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        """Logits, losses or predictions.

        Args:
            inputs: (B, C, H, W), normalised.
            targets: (B,) class indices; required for ``mode="loss"``.
            mode: ``"tensor"`` -> (B, classes) logits; ``"loss"`` -> ``{"loss": scalar}``; ``"predict"`` -> a dict per
                image with ``scores`` (classes,), summing to 1, and ``target``.
        """
        if mode == "loss":
            assert targets is not None
            if self.mixup is not None:
                inputs, targets = self._mix(inputs, targets)
            made = self.model(inputs)
            logits, *auxiliary = made if isinstance(made, tuple) else (made,)
            loss = self.loss(logits.float(), targets)
            for more in auxiliary:
                loss = loss + self.aux_weight * self.loss(more.float(), targets)
            return {"loss": loss}
        logits = self.model(inputs)
        if mode == "tensor":
            return logits
        scores = logits.float().softmax(dim=-1)
        if self.tta:
            scores = (scores + self.model(inputs.flip(-1)).float().softmax(dim=-1)) / 2
        known: Sequence[Any] = [None] * len(scores) if targets is None else targets.tolist()
        return [{"scores": score, "target": target} for score, target in zip(scores, known, strict=True)]

    def _mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch's images and their targets, then (B, classes); timm mixes pairs, and an odd last image stays."""
        assert self.mixup is not None
        pairs = len(inputs) // 2 * 2
        if pairs == len(inputs):
            return self.mixup(inputs, targets)
        last = mixup_target(targets[pairs:], self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        mixed, soft = self.mixup(inputs[:pairs], targets[:pairs]) if pairs else (inputs[:0], last[:0])
        return torch.cat([mixed, inputs[pairs:]]), torch.cat([soft, last])


_BITS = 20  # of a class's number or place
_SHIFTS = (0, _BITS, 2 * _BITS)


@METRICS.register_module()
class TopK(BaseMetric):
    """Percentage of images whose class is among the k highest scores: ``accuracy/top1``, ``accuracy/top5``.

    Args:
        topk: values of k.
        **kwargs: passed to mmengine's ``BaseMetric``.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), **kwargs: Any) -> None:
        # "gpu" means over the process group: mmengine's "cpu" leaves a folder in the working directory.
        super().__init__(**{"collect_device": "gpu", **kwargs})
        if not isinstance(topk, list | tuple) or not topk or any(type(k) is not int or k < 1 for k in topk):
            raise UserError(f"val_evaluator.topk={topk!r}: give whole numbers from 1, e.g. (1, 5)")
        self.topk = tuple(topk)
        self.details: measures.Details | None = None  # of the last validation, in the first process

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        scores = torch.stack([sample["scores"] for sample in data_samples])
        targets = torch.as_tensor([sample["target"] for sample in data_samples], device=scores.device)
        order = scores.argsort(dim=1, descending=True, stable=True)
        # One integer per image encodes the rank of its class, its class and the predicted class. mmengine can then
        # drop the samples that only pad the processes to equal numbers, which sums over a batch would not allow.
        places = (order == targets[:, None]).int().argmax(dim=1)
        self.results.extend((places + (targets << _BITS) + (order[:, 0] << 2 * _BITS)).tolist())

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        places, true, predicted = ([number >> shift & (1 << _BITS) - 1 for number in results] for shift in _SHIFTS)
        names = (self.dataset_meta or {}).get("classes") or range(max(*true, *predicted) + 1)
        self.details = measures.classification(true, predicted, [str(name) for name in names])
        return {f"top{k}": 100.0 * sum(place < k for place in places) / len(places) for k in self.topk}


def configure(
    config: Config, data: Path | None, *, splits: Sequence[str] = SPLITS, classes: Sequence[str] | None = None
) -> None:
    """Put the data's place and classes into ``config``, in place, after checking the images.

    Args:
        config: of a classification run.
        data: image folder with ``train/<class>/`` and ``val/<class>/``; default the config's own.
        splits: the parts that will be used; they are checked.
        classes: names of a trained model's classes, in order; default those of the training images.

    Raises:
        UserError: no data, or data that cannot be trained on.
    """
    sets = [config[key].dataset for key in ("train_dataloader", "val_dataloader", "test_dataloader") if config.get(key)]
    packed = shards_of(data) if data is not None else None
    if packed is not None:
        _take_shards(config, packed, splits)
        data = packed.root
    named = sets[0].get("name", "")
    if data is not None and packed is None and named:
        for dataset in sets:  # the user's folder replaces the config's hfds/..., wds/...
            dataset.name = named = ""
    skipped: list[Path] = []
    how = how_of(config, splits, classes)
    root = data or (Path(config.data_root) if config.get("data_root") else None)
    if root is None and config.get("digits"):
        from hybridzoo.train.digits import digits_root

        root = digits_root(**config.digits)
    if packed is not None and packed.classes:
        names = config.class_names = list(packed.classes)
    elif packed is not None and not config.get("class_names"):
        raise UserError(f"data {packed.name}: has no class names; write them into classes.txt, or set class_names")
    elif named:  # not checked here: the config gives the number of classes
        names = list(config.get("class_names") or (str(index) for index in range(config.model.num_classes)))
    elif root is None:
        raise UserError("no data: give an image folder with train/ and val/ in it (--data DIR), or set data_root")
    else:
        for split in splits:  # without them timm would validate on the training images
            if root.is_dir() and (how.holdout is None or split == "test") and class_folders(root, split) is None:
                raise no_split(root, split)
        report = inspect_classification(root, how)
        how = replace(how, holdout=used_holdout(root, how))
        report.tell()
        names, skipped = report.classes, report.skipped
    if config.get("val_fraction") and named:
        raise UserError(
            f"val_fraction: {named} cannot divide this data; name its validation set in val_dataloader.dataset"
        )
    holdout = how.holdout if not named and "test" not in splits else None
    for key, split in (("train_dataloader", "train"), ("val_dataloader", "val")):
        if config.get(key) and not named:
            config[key].dataset.pop("holdout", None)
            if holdout is not None:
                config[key].dataset.holdout = holdout.part(split == "val").options()
    if "test" in splits and not named:
        for key in ("val_dataloader", "test_dataloader"):
            if config.get(key):
                config[key].dataset.split = "test"
    for dataset in sets:
        dataset.root = None if root is None else str(root)
        dataset.classes = names
        dataset.exclude = [str(path) for path in skipped]
        dataset.white_value = config.get("white_value")
    if config.get("train_dataloader"):
        config.train_dataloader.dataset.on_bad = config.get("on_bad", "stop")
    config.model.num_classes = len(names)


def _take_shards(config: Config, packed: Shards, splits: Sequence[str]) -> None:
    """Set a config's loaders to read packed data, in place.

    Raises:
        UserError: a required split is missing.
    """
    for key, split in (("train_dataloader", "train"), ("val_dataloader", "val"), ("test_dataloader", "val")):
        loader = config.get(key)
        if not loader:
            continue
        if split == "val" and "test" in splits:
            split = "test"
        if split in splits and not packed.splits[split]:
            raise UserError(
                f"data {packed.name}: has no split {split}; expected one of {', '.join(SPLIT_NAMES[split])}"
            )
        loader.dataset.update(name=packed.name, split=packed.splits[split] or split)
        if packed.stream:  # in file order, shuffled by timm
            loader.sampler = None
            loader.dataset.update(is_training=key == "train_dataloader", batch_size=loader.batch_size)


def eval_transform(config: Config) -> Any:
    """The transform of validation images in ``config``, PIL image -> (C, H, W)."""
    return create_transform(**config.val_dataloader.dataset.transform)
