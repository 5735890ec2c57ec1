"""Prepares the network of a run for export: a classifier, a segmentor, or a one-stage detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine import Config
from torch import Tensor, nn

from hybridzoo.train.engine import build_for_inference
from hybridzoo.train.errors import UserError
from hybridzoo.train.export.sources import Source, describe

SIZE = (512, 512)  # for detection and segmentation, if a config has no size


class Segmentor(nn.Module):
    """Scores of an mmseg model before the softmax: image (B, 3, H, W) -> (B, classes, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        shape = {"img_shape": image.shape[2:], "pad_shape": image.shape[2:]}
        return self.model.encode_decode(image, [shape])  # one for all images of a batch


class SingleStage(nn.Module):
    """All boxes of an mmdet model with anchors (RetinaNet), before any selection.

    Image (B, 3, H, W) -> boxes (B, N, 4): left, top, right, bottom in pixels of this image, clipped to it; scores
    (B, N, classes): 0 to 1, independent for each class. The reader must do what mmdet's `predict` does next: select the
    best boxes, and non-maximum suppression.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        head, batch = self.model.bbox_head, image.shape[0]
        logits, deltas = head(self.model.extract_feat(image))
        anchors = torch.cat(head.prior_generator.grid_priors([level.shape[2:] for level in logits], logits[0].dtype,
                                                             device=image.device))  # fmt: skip
        scores = torch.cat([_by_anchor(level, head.cls_out_channels) for level in logits], 1).sigmoid()
        moves = torch.cat([_by_anchor(level, 4) for level in deltas], 1)
        anchors = anchors.expand(batch, -1, -1).flatten(0, 1)
        boxes = head.bbox_coder.decode(anchors, moves.flatten(0, 1), max_shape=image.shape[2:])
        return boxes.unflatten(0, (batch, -1)), scores


def _by_anchor(level: Tensor, width: int) -> Tensor:
    """(B, anchors * width, H, W) -> (B, H * W * anchors, width), in the order of the anchors."""
    return level.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width))


def from_run(config: Config, checkpoint: Path) -> Source:
    """The network of a checkpoint.

    Args:
        config: of the run, see `hybridzoo.train.trained.load`.
        checkpoint: the file.

    Raises:
        UserError: a detector that cannot be exported, or a checkpoint that cannot be read.
    """
    return from_model(config, build_for_inference(config, checkpoint, "cpu"), checkpoint)


def from_model(config: Config, model: Any, checkpoint: Path) -> Source:
    """Like `from_run`, for a model that is already built; the checkpoint's name is added to the metadata."""
    classes = [str(name) for name in model.dataset_meta["classes"]]
    if config.task == "classification":
        return _classifier(config, model, classes, checkpoint)
    if config.task == "segmentation":
        return _dense(config, Segmentor(model), ("logits",), classes, checkpoint)
    if type(model).__name__ != "RetinaNet" or not model.bbox_head.use_sigmoid_cls:
        raise UserError(
            f"{checkpoint}: {type(model).__name__} cannot be exported: which regions it looks at, and how many, "
            "follows from the image; RetinaNet can (hybridzoo train retinanet), and the network alone by its NAME with "
            "--features"
        )
    more = {"boxes": "left, top, right, bottom in pixels of the input, before non-maximum suppression",
            "iou_threshold": float(model.test_cfg.nms.iou_threshold)}  # fmt: skip
    return _dense(config, SingleStage(model), ("boxes", "scores"), classes, checkpoint, **more)


def _classifier(config: Config, model: Any, classes: list[str], checkpoint: Path) -> Source:
    look = dict(config.val_dataloader.dataset.transform)
    side = look.get("input_size", 224)
    channels, *size = side if isinstance(side, list | tuple) else (3, side, side)
    cfg = model.model.pretrained_cfg
    metadata = describe(
        "classification",
        config.model.name,
        mean=look.get("mean") or cfg["mean"],
        std=look.get("std") or cfg["std"],
        size=size,
        resize={key: look[key] for key in ("interpolation", "crop_pct", "crop_mode") if look.get(key) is not None},
        classes=classes,
        weights=checkpoint.name,
    )
    return Source(model.model.eval(), ("logits",), (size[0], size[1]), channels, metadata)


def _dense(
    config: Config, network: Any, outputs: tuple[str, ...], classes: list[str], checkpoint: Path, **more: Any
) -> Source:
    before = network.model.data_preprocessor
    if not getattr(before, "_channel_conversion", False):
        raise UserError(f"{checkpoint}: is for images in the order blue, green, red, which export does not write")
    steps = (config.get("test_dataloader") or config.val_dataloader).dataset.pipeline
    resize: dict[str, Any] = next((step for step in steps if step["type"].rpartition(".")[2] == "Resize"), {})
    scale = resize.get("scale") or SIZE
    size = tuple(-(-int(side) // 32) * 32 for side in (scale if isinstance(scale, list | tuple) else (scale, scale)))
    metadata = describe(
        config.task,
        config.model.backbone.name,
        mean=(before.mean.flatten() / 255).tolist(),
        std=(before.std.flatten() / 255).tolist(),
        size=size[::-1],
        resize={"interpolation": "bilinear", "keep_ratio": bool(resize.get("keep_ratio", False))},
        classes=classes,
        weights=checkpoint.name,
        **more,
    )
    return Source(network.eval(), outputs, (size[1], size[0]), 3, metadata)
