"""Prediction on images: reads them, runs a trained model, draws the results, for all three tasks."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from hybridzoo.train import draw, images, testing, trained, views
from hybridzoo.train.classification import eval_transform
from hybridzoo.train.engine import build_for_inference
from hybridzoo.train.errors import UserError
from hybridzoo.train.notes import Notes
from hybridzoo.train.plain import printable

TOP = 5  # classes in a classifier's prediction
LINE_EVERY = 30.0  # seconds between lines without a progress bar


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image; the lists are parallel, best first.

    Attributes:
        image: the file that was read.
        drawn: the picture that was written, or None.
        task: "classification", "detection" or "segmentation".
        labels: class names: the five most probable, one for each object, or those present in the map.
        scores: probability, confidence, or fraction of the image's pixels; 0 to 1.
        boxes: (N, 4) left, top, right, bottom in pixels of the image; detection only.
        areas: pixels in each object's mask; detectors with masks only.
        indices: indices of the classes in `labels`.
        name: the image's path below the given folder, for messages and files.
        size: (width, height) of the image in pixels, upright.
        runs: each object's or class's mask as COCO's compressed run lengths, if requested.
    """

    image: Path
    drawn: Path | None
    task: str
    labels: list[str]
    scores: list[float]
    boxes: Tensor | None = None
    areas: list[int] | None = None
    indices: tuple[int, ...] = ()
    name: str = ""
    size: tuple[int, int] = (0, 0)
    runs: list[dict[str, Any]] | None = None


def predict(
    config: Config | None,
    checkpoint: Path,
    source: Path | Sequence[Path],
    out: Path,
    *,
    score: float = 0.3,
    device: str | None = None,
    tta: bool = False,
    slide: views.Slide | None = None,
) -> list[Prediction]:
    """Run a checkpoint on an image, or on every image below a folder, and draw each result.

    Files that cannot be read are named on stderr and left out. For many images, see `Predictions`.

    Args:
        config: the config of the training; None uses the checkpoint's.
        checkpoint: a file that training wrote, or the folder of a run.
        source: an image file or a folder, or several.
        out: folder for the pictures; created if missing.
        score: objects below this confidence are left out (detection only).
        device: "cpu", "cuda", "cuda:1", ...; default: the first GPU, else the CPU.
        tta, slide: see `hybridzoo.train.views.apply`.

    Raises:
        UserError: no image, no readable image, a picture that would replace an input or cannot be written, or an error
            of `build_for_inference`.
    """
    seen = Predictions(config, checkpoint, source, out, score=score, device=device, tta=tta, slide=slide)
    found = list(seen)
    seen.tell()
    return found


class Predictions:
    """An iterator over images that gives a `Prediction` for each; can be used once.

    Images come in the order of their paths. An image that cannot be read or predicted is added to `failed`. Pictures
    are PNG files in the same folder structure; an input is never overwritten.

    Args:
        config, checkpoint, source, out, score, device, tta, slide: see `predict`.
        pictures: draw each result.
        masks: keep masks as run lengths in `Prediction.runs`.

    Attributes:
        task: the checkpoint's task.
        paths: paths of all images.
        failed: a line for each image that could not be read or predicted.

    Raises:
        UserError: see `predict`; raised at creation or during iteration.
    """

    def __init__(
        self,
        config: Config | None,
        checkpoint: Path,
        source: Path | Sequence[Path],
        out: Path,
        *,
        score: float = 0.3,
        device: str | None = None,
        tta: bool = False,
        slide: views.Slide | None = None,
        pictures: bool = True,
        masks: bool = False,
    ) -> None:
        self.notes, self.failed = Notes(), list[str]()
        self.score, self.masks = score, masks
        sources = [source] if isinstance(source, Path) else list(source)
        named = _named(sources, self.notes)
        self.paths = list(named)
        self._names = named
        self._drawings = _pictures(self.paths, sources, out) if pictures else {}
        checkpoint = trained.find(checkpoint)
        config = trained.load(checkpoint) if config is None else copy.deepcopy(config)
        if slide is not None:
            views.apply(config, slide=slide)
        self.task, self.config = config.task, config
        model = build_for_inference(config, checkpoint, device)
        testing.fuse(model, len(self.paths))
        look = {"classification": _classify, "detection": _detect, "segmentation": _segment}[config.task]
        self._see = look(config, model, tta)
        self._source = sources[0] if len(sources) == 1 else None

    def __iter__(self) -> Iterator[Prediction]:
        done, last = 0, time.monotonic()
        terminal = Console(stderr=True)
        paths = track(self.paths, "predicting", console=terminal, transient=True, disable=not terminal.is_terminal)
        for number, path in enumerate(paths):
            if not terminal.is_terminal and time.monotonic() - last > LINE_EVERY:
                last = time.monotonic()
                print(f"predicting: {number:,} of {len(self.paths):,} images", flush=True)
            try:
                found = self._look_at(path)
            except UserError as error:
                if path == self._source:
                    raise
                self.failed.append(str(error))
                continue
            yield found
            done += 1
        if not done:
            raise UserError(f"{self._source or 'PICTURES'}: none of {len(self.paths)} images can be read; "
                            f"the first: {self.failed[0]}")  # fmt: skip

    def _look_at(self, path: Path) -> Prediction:
        image = read_image(path, self.config.get("white_value"))
        try:
            seen, picture = self._see(image, self.score, self.masks, path in self._drawings)
        except (RuntimeError, ValueError, AssertionError) as error:  # too small for the network, too large for memory
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: {image.width}x{image.height} px, cannot be predicted ({reason})") from error
        drawn = self._drawings.get(path)
        if picture is not None and drawn is not None:
            _save(picture, drawn)
        return Prediction(image=path, drawn=drawn, task=self.task, name=self._names[path], size=image.size, **seen)

    def tell(self) -> None:
        """Print to stderr which images were left out, and other notes."""
        console = Console(stderr=True)
        for line in [*(f"skipped: {line}" for line in self.failed), *self.notes.lines()]:
            console.print(printable(line), style="yellow", markup=False, highlight=False, soft_wrap=True)


def _named(sources: Sequence[Path], notes: Notes) -> dict[Path, str]:
    """All images in some files and folders, each once, with their names."""
    named: dict[Path, str] = {}
    for source in sources:
        for path in find_images(source, notes):
            below = str(path.relative_to(source)) if path != source else path.name
            named.setdefault(path, below if len(sources) == 1 else str(path))
    return named


def find_images(source: Path, notes: Notes | None = None) -> list[Path]:
    """`source` itself, or the image files below it in the order of their paths, without hidden ones.

    Args:
        notes: collects what is left out of a folder.

    Raises:
        UserError: the path does not exist, or the folder has no image.
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
        notes.add("files without a picture's suffix: left out", path)
    return sorted(found.images)


def read_image(path: Path, white_value: float | None = None) -> Image.Image:
    """Decode a whole image as RGB, upright, see `hybridzoo.train.images`.

    Raises:
        UserError: it cannot be read, or has 16 bits and is nearly black.
    """
    picture = images.read_picture(path, white_value=white_value)
    if picture.highest is not None and 0 < picture.highest < images.DARK and white_value is None:
        raise UserError(
            f"{path}: 16 bits and no value above {picture.highest}, which would be nearly black; set white_value, "
            "the value of white (65535 if the picture is really dark)"
        )
    return picture.image


# Each of the three returns a function for one image: (image, least score, whether to keep masks, whether to draw) ->
# (fields of Prediction, drawn picture).
See = Callable[[Image.Image, float, bool, bool], tuple[dict[str, Any], Image.Image | None]]


def _classify(config: Config, model: Any, tta: bool) -> See:
    transform = eval_transform(config)
    model.tta = tta

    def see(image: Image.Image, score: float, masks: bool, drawn: bool) -> tuple[dict[str, Any], Image.Image | None]:
        with torch.no_grad():
            inputs = transform(image)[None].to(model.data_preprocessor.device)
            shares = model(inputs, mode="predict")[0]["scores"].cpu()
        values, indices = shares.topk(min(TOP, len(shares)))
        names = _names(model, indices)
        best = [(names[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
        seen = {
            "labels": [name for name, _ in best],
            "indices": tuple(indices.tolist()),
            "scores": [value for _, value in best],
        }
        return seen, draw.draw_classification(image, best) if drawn else None

    return see


def _detect(config: Config, model: nn.Module, tta: bool) -> See:
    infer = _mm_inference(config, model, tta)

    def see(image: Image.Image, score: float, masks: bool, drawn: bool) -> tuple[dict[str, Any], Image.Image | None]:
        objects = infer(image).pred_instances.cpu()
        objects = objects[objects.scores >= score]
        objects = objects[objects.scores.argsort(descending=True, stable=True)]
        names = _names(model, objects.labels)
        shapes = objects.masks if "masks" in objects else None
        seen = {
            "labels": [names[i] for i in objects.labels.tolist()],
            "indices": tuple(objects.labels.tolist()),
            "scores": objects.scores.tolist(),
            "boxes": objects.bboxes,
            "areas": None if shapes is None else shapes.flatten(1).sum(1).tolist(),
            "runs": _runs(shapes) if masks and shapes is not None else None,
        }
        if not drawn:
            return seen, None
        return seen, draw.draw_boxes(image, objects.bboxes, objects.labels, objects.scores, shapes, names)

    return see


def _segment(config: Config, model: nn.Module, tta: bool) -> See:
    infer = _mm_inference(config, model, tta)

    def see(image: Image.Image, score: float, masks: bool, drawn: bool) -> tuple[dict[str, Any], Image.Image | None]:
        classes = infer(image).pred_sem_seg.data.squeeze().cpu()
        names = _names(model, classes)
        counts = classes.flatten().long().bincount(minlength=len(names)).tolist()
        order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: -counts[i])
        seen = {
            "labels": [names[i] for i in order],
            "indices": tuple(order),
            "scores": [counts[i] / classes.numel() for i in order],
            "runs": _runs(torch.stack([classes == i for i in order])) if masks else None,
        }
        return seen, draw.draw_segmentation(image, classes, names) if drawn else None

    return see


def _runs(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) masks as COCO's compressed run lengths: `size` (height, width) and `counts`, a text."""
    from pycocotools import mask as mask_tools

    found = mask_tools.encode(np.asfortranarray(masks.numpy().astype(np.uint8).transpose(1, 2, 0)))
    return [{"size": [int(side) for side in run["size"]], "counts": run["counts"].decode()} for run in found]


def _names(model: Any, indices: Tensor) -> list[str]:
    """Names of all class indices up to the largest given: those of the training data, or numbers.

    Published weights, unlike checkpoints from `train`, have no names.
    """
    known = list(model.dataset_meta["classes"])
    needed = int(indices.max()) + 1 if indices.numel() else 0
    return known + [str(i) for i in range(len(known), needed)]


def _mm_inference(config: Config, model: Any, tta: bool) -> Callable[[Image.Image], Any]:
    """Image -> mmdet's or mmseg's data sample, with the test pipeline without its file reading."""
    steps = (config.get("test_dataloader") or config.val_dataloader).dataset.pipeline
    steps = [step for step in steps if not step["type"].split(".")[-1].startswith("Load")]
    steps = [{"type": "LoadImageFromNDArray"}, *steps]
    with DefaultScope.overwrite_default_scope(config.default_scope):
        if tta:
            steps = views.pipeline(steps, config.task)
            model = MODELS.build(views.wrapped(model, config))
        pipeline = Compose(steps)

    def infer(image: Image.Image) -> Any:
        pixels = np.asarray(image)[:, :, ::-1].copy()  # OpenMMLab's images are BGR
        packed = pipeline({"img": pixels, "img_id": 0, "img_path": ""})
        with torch.no_grad():
            return model.test_step(pseudo_collate([packed]))[0]

    return infer


def _pictures(paths: Sequence[Path], sources: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The path of each image's drawing: out/<path below the folder>.png; keeps the old suffix if two would be equal."""
    inputs = {image.resolve() for image in paths}
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            # The next run would read the drawings as images.
            raise UserError(f"--out {out}: is in the folder of the images; choose a folder outside {source}")
    pictures: dict[Path, Path] = {}
    taken: set[Path] = set()
    for image in paths:
        root = next((source for source in sources if source.is_dir() and image.is_relative_to(source)), image.parent)
        below = image.relative_to(root)
        target = (out / below).with_suffix(".png")
        if target in taken:
            target = out / f"{below}.png"
        number = 1
        while target in taken:  # of several folders
            number += 1
            target = (out / below).with_name(f"{below.stem}-{number}.png")
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
