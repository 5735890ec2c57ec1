"""What a run trained, as something to export: the classifier, or the segmentor from image to scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine import Config
from torch import Tensor, nn

from hybridzoo.train.engine import build_for_inference
from hybridzoo.train.errors import UserError
from hybridzoo.train.export.sources import Source, describe

SIZE = (512, 512)  # of dense tasks, where a config does not say


class Segmentor(nn.Module):
    """Scores of an mmseg model before the softmax: image (B, 3, H, W) -> (B, classes, H, W)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        shape = {"img_shape": image.shape[2:], "pad_shape": image.shape[2:]}
        return self.model.encode_decode(image, [shape] * image.shape[0])


def from_run(config: Config, checkpoint: Path) -> Source:
    """What a checkpoint holds.

    Args:
        config: of the run, see `hybridzoo.train.trained.load`.
        checkpoint: the file.

    Raises:
        UserError: a detector that cannot be exported, or a checkpoint that cannot be read.
    """
    model: Any = build_for_inference(config, checkpoint, "cpu")
    classes = [str(name) for name in model.dataset_meta["classes"]]
    if config.task == "classification":
        return _classifier(config, model, classes, checkpoint)
    if config.task == "segmentation":
        return _dense(config, Segmentor(model), ("logits",), classes, checkpoint)
    raise UserError(f"{checkpoint}: {type(model).__name__} is a detector, which export does not write yet")


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
