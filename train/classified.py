"""Datasets of classified images: folders with our reader, and whatever timm opens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_dataset, create_transform
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from hybridzoo.train.data.classification import split_folder
from hybridzoo.train.data.holdout import holdout_of
from hybridzoo.train.errors import UserError
from hybridzoo.train.images import ImageError, natural_key, read_image
from hybridzoo.train.layouts import OnBad, classified_images
from hybridzoo.train.lost import Lost


class FolderDataset(Dataset[tuple[Any, int]]):
    """The images of a split of a classification folder, giving (image (C, H, W), class index).

    Args:
        root: folder with `<split>/<class name>/` in it, see `hybridzoo.train.layouts`.
        split: "train" or "val".
        classes: class names in the order of their indices.
        exclude: image files to leave out.
        white_value: see `hybridzoo.train.images`.
        transform: PIL image -> tensor.
        on_bad: if an image cannot be read any more: "stop", or "skip" it with a message and use the next one.
        holdout: options of the `Holdout` that takes a validation set from the training images; `split` chooses the
            part.

    Raises:
        UserError: no images, or an image in a folder that is not a class; on access, an image that cannot be read.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        classes: Sequence[str] = (),
        exclude: Sequence[str] = (),
        white_value: float | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        on_bad: OnBad = "stop",
        holdout: dict[str, Any] | None = None,
    ) -> None:
        part = holdout_of(holdout)
        self.folder = split_folder(root, split, part)
        if not self.folder.is_dir():
            raise UserError(f"data {root} (split {split}): no such folder")
        bad = {Path(path) for path in exclude}
        found = [(path, name) for path, name in classified_images(root, split, None, part) if path not in bad]
        index = {name: i for i, name in enumerate(classes or sorted({name for _, name in found}, key=natural_key))}
        unknown = sorted({name for _, name in found} - index.keys())
        if unknown or not found:
            problem = f"a class {unknown[0]!r} beside {', '.join(index)}" if unknown else "no images"
            raise UserError(f"data {root} (split {split}): {problem}")
        self.samples = [(path, index[name]) for path, name in found]
        self.white_value = white_value
        self.transform = transform
        self.lost = Lost(len(found)) if on_bad == "skip" else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        path, label = self.samples[i]
        try:
            image = read_image(path, white_value=self.white_value)
        except ImageError as error:
            if self.lost is None:
                raise
            self.lost.add(i, error)  # which ends the run when most images are lost
            return self[(i + 1) % len(self)]
        return (image if self.transform is None else self.transform(image)), label

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """The files in order, as in timm's datasets: paths below the split's folder, or names, or whole paths."""
        return [
            path.name if basename else str(path if absolute else path.relative_to(self.folder))
            for path, _ in self.samples
        ]


class _Upright:
    """PIL image -> PIL image turned by its EXIF orientation, for readers that decode images themselves."""

    def __call__(self, image: Any) -> Any:
        return ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image


class ReaderDataset(Dataset[tuple[Any, int]]):
    """Files from one of timm's readers (Hugging Face datasets, tar files), decoded by our image reader.

    Raises:
        UserError: on access, an image that cannot be read.
    """

    def __init__(self, reader: Any, white_value: float | None) -> None:
        self.reader = reader
        self.white_value = white_value
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        file, label, *_ = self.reader[i]
        with contextlib.closing(file):
            image = read_image(file, name=str(self.reader.filename(i)), white_value=self.white_value)
        return (image if self.transform is None else self.transform(image)), -1 if label is None else label


@DATASETS.register_module()
def TimmDataset(
    transform: dict[str, Any],
    name: str = "",
    root: str | None = None,
    split: str = "train",
    classes: Sequence[str] = (),
    exclude: Sequence[str] = (),
    white_value: float | None = None,
    on_bad: OnBad = "stop",
    holdout: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A dataset giving (image (C, H, W), class index): an image folder, or one of ``timm.data.create_dataset``.

    Args:
        transform: arguments of ``timm.data.create_transform``.
        name: ``""`` for an image folder, else timm's ``hfds/...``, ``wds/...``, ``torch/...``, ...
        root: folder with a subfolder per split.
        split: ``"train"``, ``"val"`` or the dataset's own name of a part.
        classes: class names in the order of their indices.
        exclude: image files to leave out.
        white_value: see `hybridzoo.train.images`; not for datasets that decode images themselves (``wds``, ``torch``).
        on_bad: see `FolderDataset`; other datasets always stop.
        holdout: see `FolderDataset`.
        **options: passed to ``create_dataset``.

    Raises:
        UserError: timm cannot open the dataset.
    """
    made = create_transform(**transform)
    dataset: Any
    if not name and root is not None:
        dataset = FolderDataset(Path(root), split, classes, exclude, white_value, on_bad=on_bad, holdout=holdout)
    else:
        try:
            dataset = create_dataset(name, root, split=split, **options)
        except Exception as error:  # readers raise the exceptions of their libraries
            raise UserError(f"data {name or root} (split {split}): {error}") from error
        if isinstance(dataset, ImageDataset):
            dataset = ReaderDataset(dataset.reader, white_value)
        else:
            made = Compose([_Upright(), made])
    dataset.transform = made
    dataset.metainfo = {"classes": list(classes)}
    return dataset
