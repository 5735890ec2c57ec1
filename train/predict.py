"""Prediction on images: read, run a trained model, draw.  One function serves the three tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from hybridzoo.layers.inference import Fusible
from hybridzoo.train import draw, images
from hybridzoo.train.classification import eval_transform
from hybridzoo.train.engine import build_for_inference
from hybridzoo.train.errors import UserError
from hybridzoo.train.notes import Notes
from hybridzoo.train.plain import printable

TOP = 5  # classes that a classifier's prediction lists
WORTH_FUSING = 8  # images: to fuse a network takes about as long as to look at one or two


@dataclass(frozen=True)
class Prediction:
    """What a model saw in one image; the lists run in parallel, best first.

    Attributes:
        image: the file that was read.
        drawn: the picture that was written.
        task: "classification", "detection" or "segmentation".
        labels: class names: the five likeliest, one for each object found, or those present in the map.
        scores: probability, confidence, or share of the image's pixels; each 0 to 1.
        boxes: (N, 4) left, top, right, bottom in pixels of the image; detection only.
        areas: pixels in each object's mask; detectors with masks only.
    """

    image: Path
    drawn: Path
    task: str
    labels: list[str]
    scores: list[float]
    boxes: Tensor | None = None
    areas: list[int] | None = None


def predict(
    config: Config,
    checkpoint: Path,
    source: Path,
    out: Path,
    *,
    score: float = 0.3,
    device: str | None = None,
) -> list[Prediction]:
    """Run a checkpoint on an image, or on every image below a folder, and draw each result.

    Images are visited in the order of their paths.  In a folder, files that cannot be read are named on stderr and
    left out.  Pictures are PNG files that keep the folder's structure; no input is ever overwritten.

    Args:
        config: the config that the checkpoint was trained with.
        checkpoint: a file that training wrote.
        source: an image file or a folder.
        out: folder for the pictures; made when missing.
        score: objects below this confidence are left out (detection only).
        device: "cpu", "cuda", "cuda:1", ...; default: the first GPU, else the CPU.

    Raises:
        UserError: there is no image, none can be read, a picture would replace an input or cannot be written, or
            `build_for_inference` refuses the checkpoint.
    """
    notes = Notes()
    paths = find_images(source, notes)
    pictures = _pictures(paths, source, out)
    model = build_for_inference(config, checkpoint, device)
    if len(paths) >= WORTH_FUSING:
        for network in [module for module in model.modules() if isinstance(module, Fusible)]:
            network.fuse()
    see = {"classification": _classify, "detection": _detect, "segmentation": _segment}[config.task](config, model)

    found: list[Prediction] = []
    unreadable: list[str] = []
    quiet = Console(stderr=True)
    for path in track(paths, "predicting", console=quiet, transient=True, disable=not quiet.is_terminal):
        try:
            image = read_image(path, config.get("white_value"))
        except UserError as error:
            if path == source:
                raise
            unreadable.append(str(error))
            continue
        seen, picture = see(image, score)
        _save(picture, pictures[path])
        found.append(Prediction(image=path, drawn=pictures[path], task=config.task, **seen))
    if not found:
        raise UserError(f"{source}: none of {len(paths)} images can be read; the first: {unreadable[0]}")
    for line in [*(f"skipped: {line}" for line in unreadable), *notes.lines()]:
        quiet.print(printable(line), style="yellow", markup=False, highlight=False, soft_wrap=True)
    return found


def find_images(source: Path, notes: Notes | None = None) -> list[Path]:
    """`source` itself, or the image files below it in the order of their paths, hidden ones left out.

    Args:
        notes: collects what is left out of a folder.

    Raises:
        UserError: nothing is there, or the folder holds no image.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such image or folder")
    found = images.find_images(source)
    if not found.images:
        raise UserError(f"{source}: no image below this folder (looked for {' '.join(sorted(images.SUFFIXES))})")
    notes = notes if notes is not None else Notes()
    for path in found.others:
        notes.add("files that are no pictures by their suffix: left out", path)
    return sorted(found.images)


def read_image(path: Path, white_value: float | None = None) -> Image.Image:
    """Decode a whole image as RGB, upright, see `hybridzoo.train.images`.

    Raises:
        UserError: it cannot be read, or holds 16 bits and is nearly black.
    """
    picture = images.read_picture(path, white_value=white_value)
    if picture.highest is not None and 0 < picture.highest < images.DARK and white_value is None:
        raise UserError(
            f"{path}: 16 bits and no value above {picture.highest}, which would be nearly black; set white_value, "
            "the value that is white (65535 if it is dark indeed)"
        )
    return picture.image


# Each of the three returns what looks at one image: (image, least score) -> (fields of Prediction, drawn picture).
See = Callable[[Image.Image, float], tuple[dict[str, Any], Image.Image]]


def _classify(config: Config, model: nn.Module) -> See:
    transform = eval_transform(config)

    def see(image: Image.Image, score: float) -> tuple[dict[str, Any], Image.Image]:
        with torch.no_grad():
            inputs = transform(image)[None].to(model.data_preprocessor.device)
            shares = model(inputs, mode="predict")[0]["scores"].cpu()
        values, indices = shares.topk(min(TOP, len(shares)))
        names = _names(model, indices)
        best = [(names[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
        seen = {"labels": [name for name, _ in best], "scores": [value for _, value in best]}
        return seen, draw.draw_classification(image, best)

    return see


def _detect(config: Config, model: nn.Module) -> See:
    infer = _mm_inference(config, model)

    def see(image: Image.Image, score: float) -> tuple[dict[str, Any], Image.Image]:
        objects = infer(image).pred_instances.cpu()
        objects = objects[objects.scores >= score]
        objects = objects[objects.scores.argsort(descending=True, stable=True)]
        names = _names(model, objects.labels)
        masks = objects.masks if "masks" in objects else None
        seen = {
            "labels": [names[i] for i in objects.labels.tolist()],
            "scores": objects.scores.tolist(),
            "boxes": objects.bboxes,
            "areas": None if masks is None else masks.flatten(1).sum(1).tolist(),
        }
        return seen, draw.draw_boxes(image, objects.bboxes, objects.labels, objects.scores, masks, names)

    return see


def _segment(config: Config, model: nn.Module) -> See:
    infer = _mm_inference(config, model)

    def see(image: Image.Image, score: float) -> tuple[dict[str, Any], Image.Image]:
        classes = infer(image).pred_sem_seg.data[0].cpu()
        names = _names(model, classes)
        counts = classes.flatten().bincount(minlength=len(names)).tolist()
        order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i])
        seen = {"labels": [names[i] for i in order], "scores": [counts[i] / classes.numel() for i in order]}
        return seen, draw.draw_segmentation(image, classes, names)

    return see


def _names(model: Any, indices: Tensor) -> list[str]:
    """Names for all class indices up to the largest given: those of the training data, else numbers.

    Published weights, unlike what `train` writes, carry no names.
    """
    known = list(model.dataset_meta["classes"])
    needed = int(indices.max()) + 1 if indices.numel() else 0
    return known + [str(i) for i in range(len(known), needed)]


def _mm_inference(config: Config, model: Any) -> Callable[[Image.Image], Any]:
    """Image -> mmdet's or mmseg's data sample, through the test pipeline without its reading of files."""
    steps = config.test_dataloader.dataset.pipeline
    steps = [step for step in steps if not step["type"].split(".")[-1].startswith("Load")]
    with DefaultScope.overwrite_default_scope(config.default_scope):
        pipeline = Compose([{"type": "LoadImageFromNDArray"}, *steps])

    def infer(image: Image.Image) -> Any:
        pixels = np.asarray(image)[:, :, ::-1].copy()  # OpenMMLab's images are BGR
        packed = pipeline({"img": pixels, "img_id": 0})
        with torch.no_grad():
            return model.test_step({"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]})[0]

    return infer


def _pictures(paths: list[Path], source: Path, out: Path) -> dict[Path, Path]:
    """Where each image's drawing goes: out/<path below the folder>.png, with the old suffix kept if two would meet."""
    inputs = {image.resolve() for image in paths}
    root = source if source.is_dir() else source.parent
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        # The next run would take the drawings for images.
        raise UserError(f"--out {out}: lies in the folder of the images; choose a folder outside {source}")
    pictures: dict[Path, Path] = {}
    taken: set[Path] = set()
    for image in paths:
        target = (out / image.relative_to(root)).with_suffix(".png")
        if target in taken:
            target = out / f"{image.relative_to(root)}.png"
        if target.resolve() in inputs:
            raise UserError(f"--out {out}: the drawing would replace {image}; choose another folder")
        taken.add(target)
        pictures[image] = target
    return pictures


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error.strerror or error})") from error
