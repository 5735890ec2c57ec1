"""Test-time augmentation, and sliding windows over large pictures.

Classification averages the probabilities of an image and its mirror image. Detection and segmentation use three sizes,
each unchanged and mirrored: mmseg averages the probabilities of every pixel; overlapping objects are merged by their
scores, with their masks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from mmengine import Config
from mmengine.model import is_model_wrapper
from torch import nn

from hybridzoo.train.errors import UserError

SIZES = (0.75, 1.0, 1.25)  # of the image's own in detection and segmentation
OVERLAP = 0.5  # IoU above which two objects of one class, found in two views, are one


class Slide(NamedTuple):
    """Windows of a segmentor: side and step, in pixels of the image as the pipeline resizes it."""

    crop: int
    stride: int


def apply(config: Config, *, tta: bool = False, slide: Slide | None = None) -> None:
    """Add test-time augmentation or windows to a config's model and test pipeline, in place.

    Raises:
        UserError: this task or model does not have the option.
    """
    if slide is not None:
        _slide(config, slide)
    if not tta:
        return
    if config.task == "classification":
        config.model.tta = True
        return
    loader = config.test_dataloader
    loader.dataset.pipeline = pipeline(loader.dataset.pipeline, config.task)
    config.model = wrapped(config.model, config)


def _slide(config: Config, slide: Slide) -> None:
    crop, stride = slide
    if config.task != "segmentation":
        raise UserError(f"--slide {crop}: windows are for segmentation, this is {config.task}")
    if not 32 <= crop <= 1 << 14 or not 1 <= stride <= crop:
        raise UserError(f"--slide {crop} --stride {stride}: give a side of 32 to 16384 px, and a step up to the side")
    config.model.test_cfg = {"mode": "slide", "crop_size": (crop, crop), "stride": (stride, stride)}


def wrapped(model: Any, config: Config) -> dict[str, Any]:
    """The config of a model that merges a detector's or segmentor's results for several views.

    Args:
        model: built, or its config.
        config: of the run.
    """
    if config.task == "segmentation":
        return {"type": "SegTTAModel", "module": model}
    heads = config.model.get("test_cfg") or {}
    return {"type": "ViewsOfObjects", "module": model, "most": (heads.get("rcnn") or heads).get("max_per_img", 100)}


def inner(model: nn.Module) -> Any:
    """The model itself inside what mmengine or `wrapped` put around it."""
    found: Any = model.module if is_model_wrapper(model) else model
    return getattr(found, "module", found)


def pipeline(steps: Sequence[Any], task: str) -> list[dict[str, Any]]:
    """A test pipeline whose images come in `SIZES`, each also mirrored.

    Args:
        steps: of the pipeline, which reads the image first, and packs it last.
        task: "detection" or "segmentation".

    Raises:
        UserError: it already has several views, or does not pack its images.
    """
    steps = [copy.deepcopy(dict(step)) for step in steps]
    kinds = [str(step["type"]).rpartition(".")[2] for step in steps]
    if "TestTimeAug" in kinds or not kinds or not kinds[-1].startswith("Pack"):
        raise UserError(
            f"--tta: the test pipeline ({', '.join(kinds)}) has views of its own, or does not end in packing"
        )
    if kinds[-1] == "PackDetInputs" and (keys := steps[-1].get("meta_keys")):
        steps[-1]["meta_keys"] = (*keys, *(key for key in ("flip", "flip_direction") if key not in keys))
    # The truth is loaded last: it is compared with the merged result for the original image.
    truth = [step for step, kind in zip(steps, kinds, strict=True) if kind == "LoadAnnotations"]
    steps = [step for step, kind in zip(steps, kinds, strict=True) if kind != "LoadAnnotations"]
    steps[-1:-1] = truth
    kinds = [str(step["type"]).rpartition(".")[2] for step in steps]
    at = next((i for i, kind in enumerate(kinds) if "Resize" in kind), None)
    first = at if at is not None else next(i for i, kind in enumerate(kinds) if not kind.startswith("LoadImage"))
    rest = steps[first + (at is not None) :]
    sizes = [_resized(steps[at] if at is not None else None, size) for size in SIZES]
    flips = [{"type": "RandomFlip", "prob": 1.0, "direction": "horizontal"}, {"type": "RandomFlip", "prob": 0.0}]
    return [*steps[:first], {"type": "TestTimeAug", "transforms": [sizes, flips, *([step] for step in rest)]}]


def _resized(step: dict[str, Any] | None, size: float) -> dict[str, Any]:
    """A step that resizes, to `size` times what it did."""
    if step is None:
        return {"type": "Resize", "scale_factor": size, "keep_ratio": True}
    step = dict(step)
    if step.get("scale") is not None:
        scale = step["scale"]
        step["scale"] = (
            tuple(max(1, round(side * size)) for side in scale)
            if isinstance(scale, list | tuple)
            else round(scale * size)
        )
    else:
        step["scale_factor"] = (step.get("scale_factor") or 1.0) * size
    return step
