"""Draws attention, and writes its numbers, for a network or a run and a picture."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hybridzoo.train import names, networks, published, trained
from hybridzoo.train.errors import UserError
from hybridzoo.train.show import picture
from hybridzoo.train.show.attentions import Layer, find_layers
from hybridzoo.train.show.probe import Seen, look
from hybridzoo.train.weights import find_weights, load_matching, read_parts

COLUMNS = 4  # most panels in a row, unless layers were chosen
MOST_PIXELS = 1024**2  # limit for the network's input, because memory grows with the number of tokens


@dataclasses.dataclass(frozen=True)
class Network:
    """The network in evaluation mode, its name, the origin of its weights, and the side of its input image."""

    model: Any
    name: str
    weights: str
    side: int


def find_network(name_or_run: str, weights: str | None, img_size: int | None) -> Network:
    """A network by name, with published, given or random weights; or the network of a run's folder or checkpoint.

    Raises:
        UserError: there is no such network or run, or `weights` is given for a run.
    """
    if names.is_model(name_or_run):
        return _named(name_or_run, weights, img_size)
    place = Path(name_or_run).expanduser()
    if not place.exists():
        names.check_model(name_or_run)
    if weights is not None:
        raise UserError(f"--weights {weights}: a run or checkpoint has its own; give a network name instead of {place}")
    from hybridzoo.train.engine import build_for_inference

    checkpoint = trained.find(place)
    whole = build_for_inference(None, checkpoint, "cpu")
    model: Any = next(m for m in whole.modules() if hasattr(m, "pretrained_cfg") and hasattr(m, "forward_features"))
    name = model.pretrained_cfg["architecture"]
    return Network(model, name, str(checkpoint), img_size or _trained_side(checkpoint) or _side(model))


def _trained_side(checkpoint: Path) -> int | None:
    """The side of a classifier's test images in pixels; None for other tasks."""
    setup = trained.read(checkpoint)
    size = setup["input"].get("input_size") if setup is not None and setup["task"] == "classification" else None
    return size if size is None or isinstance(size, int) else min(size[-2:])


def _named(name: str, weights: str | None, img_size: int | None) -> Network:
    names.check_model(name)
    if weights not in (None, "none"):
        names.check_weights(str(weights))
    torch.manual_seed(0)
    ours = name.partition(".")[0] in names.our_models()
    arguments: dict[str, Any] = {} if img_size is None or not ours else {"img_size": img_size}
    model = networks.create("model", name, arguments).eval()
    find_layers(model, name)  # reports a network without attention before the download
    try:
        file = None if weights == "none" else find_weights(weights, name) if weights else published.weights_of(name)
    except published.Unavailable as reason:
        print(f"random weights: there are no weights of {name} on this machine ({reason}); give --weights FILE")
        file = None
    if file is not None:
        load_matching(model, read_parts(file, model).network, allow_head_mismatch=True, source=file)
    source = "random weights" if file is None else file.name if weights else "published weights"
    return Network(model, name, source, img_size or _side(model))


def _side(model: Any) -> int:
    return int(model.pretrained_cfg["input_size"][-1])


def read_input(path: Path, network: Network) -> tuple[Image.Image, Tensor, tuple[float, float, float, float]]:
    """Prepare a picture for a network: in RGB, as a tensor, and the visible part (left, top, right, bottom).

    The shorter side is resized to the network's image side. Networks for one size get only the middle square.

    Raises:
        UserError: the picture cannot be read, or is far too long.
    """
    from hybridzoo.train.predict import read_image

    image = read_image(path)
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if not type(network.model).__module__.startswith("hybridzoo."):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    scale = network.side / min(box[2] - box[0], box[3] - box[1])
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    if size[0] * size[1] > MOST_PIXELS:
        raise UserError(f"{path}: {size[0]} x {size[1]} px is too large; choose a smaller --img-size")
    image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    cfg = network.model.pretrained_cfg
    channels = cfg["input_size"][0]
    mean, std = (torch.tensor(cfg[key], dtype=torch.float32)[:, None, None] for key in ("mean", "std"))
    pixels = np.array(image if channels == 3 else image.convert("L"), np.float32) / 255
    tensor = torch.from_numpy(pixels).reshape(size[1], size[0], -1).permute(2, 0, 1)
    return image, ((tensor - mean) / std)[None], box


def point_in(query: str | None, box: Sequence[float]) -> tuple[float, float]:
    """The query as fractions of the width and height of the visible part; default 0.5 and 0.5.

    Args:
        query: `X,Y`: fractions of the picture if a number has a decimal point, otherwise pixels.
        box: the visible part of the picture, in pixels.

    Raises:
        UserError: `query` is not two such numbers, or the point is not visible.
    """
    left, top, right, bottom = box
    if query is None:
        return 0.5, 0.5
    try:
        across, down = (float(word) for word in query.split(","))
    except ValueError:
        raise UserError(
            f"--query {query}: give X,Y in pixels, such as 120,80, or as fractions, such as 0.5,0.25"
        ) from None
    if "." in query:
        across, down = across * (left + right), down * (top + bottom)  # the visible part is in the middle
    else:
        across, down = across + 0.5, down + 0.5
    if not (left <= across <= right and top <= down <= bottom):
        whole = f"{left + right:.0f} x {top + bottom:.0f}"
        seen = f"{left:.0f}..{right:.0f} across and {top:.0f}..{bottom:.0f} down"
        raise UserError(f"--query {query}: is outside of the visible part of the picture of {whole} px ({seen})")
    return (across - left) / (right - left), (down - top) / (bottom - top)


def show(
    name_or_run: str,
    image: Path,
    out: Path,
    *,
    query: str | None = None,
    stage: int | None = None,
    block: int | None = None,
    head: int | None = None,
    weights: str | None = None,
    img_size: int | None = None,
    data: Path | None = None,
) -> list[Seen]:
    """Draw what one query of a picture sees in the attention layers of a network.

    Args:
        name_or_run: the name of a network, or the folder or checkpoint of a run.
        image: the picture.
        out: the file to write; its format must be in `picture.FORMATS`.
        query: see `point_in`.
        stage, block, head: numbers from 1; default: every stage, the last block of each type, the mean of all heads.
        weights: name of published weights, a file, or "none" for random weights; default: the published weights of the
            network.
        img_size: the shorter side of the picture for the network, in pixels; default see docs/show.md.
        data: a JSON file to write the weights to.

    Returns:
        The layers that were drawn.

    Raises:
        UserError: an argument is not valid; the message names it.
    """
    for file in filter(None, (out, data)):
        if file.exists() and file.samefile(image):
            raise UserError(f"{file}: is the picture itself; choose another file")
    file_format = out.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    if file_format not in picture.FORMATS:
        raise UserError(f"--out {out}: give a name that ends in one of .{', .'.join(picture.FORMATS)}")
    network = find_network(name_or_run, weights, img_size)
    layers = choose(find_layers(network.model, network.name), stage, block)
    heads = min(len(layer.heads) for layer in layers)
    if head is not None and not 1 <= head <= heads:
        raise UserError(f"--head {head}: the layers have heads 1 to {heads}")
    pixels, tensor, box = read_input(image, network)
    point = point_in(query, box)
    panels = look(network.model, tensor, layers, point)
    number = None if head is None else head - 1
    title = f"{network.name}, {network.weights}: what one query (+) of {image.name} sees"
    _write(out, "--out", picture.draw(pixels, panels, point, number, title, file_format))
    if data is not None:
        content = as_data(network, image, tensor, box, point, panels)
        _write(data, "--json", (json.dumps(content) + "\n").encode())
    return panels


def as_data(
    network: Network, image: Path, tensor: Tensor, box: Sequence[float], point: Sequence[float], panels: Sequence[Seen]
) -> dict[str, Any]:
    """The numbers of a picture, in the form that `docs/show.md` describes."""
    return {
        "network": network.name,
        "weights": network.weights,
        "image": str(image),
        "seen_part": [round(edge, 3) for edge in box],
        "input_size": [tensor.shape[3], tensor.shape[2]],
        "query": [point[0] * tensor.shape[3], point[1] * tensor.shape[2]],
        "layers": [
            {
                "name": seen.layer.name,
                "stage": seen.layer.place[0],
                "block": seen.layer.place[1],
                "kind": seen.layer.sort,
                "detail": seen.layer.detail,
                "cell": seen.cell,
                "query": list(seen.query),
                "weights": seen.weights.tolist(),
                "extra": seen.extra.tolist(),
                "beyond": seen.beyond.tolist(),
                **({} if seen.places is None else {"places": seen.places.tolist()}),
                **({} if seen.region is None else {"region": list(seen.region)}),
            }
            for seen in panels
        ],
    }


def _write(file: Path, option: str, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{option} {file}: cannot be written ({error.strerror or error})") from error


def choose(layers: Sequence[Layer], stage: int | None, block: int | None) -> list[Layer]:
    """The layers to draw: the last one of each type in every stage, or those of one stage, one block, or both.

    Raises:
        UserError: there is no attention at that place; the message lists the stages or blocks with attention.
    """
    places = sorted({layer.place for layer in layers})
    if stage is not None and stage not in {place[0] for place in places}:
        raise UserError(f"--stage {stage}: has no attention; stages with attention: {_listed(p[0] for p in places)}")
    chosen = [layer for layer in layers if stage in (None, layer.place[0]) and block in (None, layer.place[1])]
    if not chosen:
        blocks = _listed(place[1] for place in places if stage in (None, place[0]))
        raise UserError(f"--block {block}: has no attention; blocks with attention: {blocks}")
    single = len({layer.place[0] for layer in layers}) == 1
    column = {layer.name: layer.place if single else layer.place[0] for layer in chosen}
    last = {(column[layer.name], layer.sort): layer for layer in chosen}
    columns = list(dict.fromkeys(column[layer.name] for layer in last.values()))
    if len(columns) > COLUMNS:
        columns = [columns[round((i + 1) * len(columns) / COLUMNS) - 1] for i in range(COLUMNS)]
    return [layer for layer in last.values() if column[layer.name] in columns]


def _listed(numbers: Any) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
