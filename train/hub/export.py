"""`hybridzoo hub export`: a run's checkpoint as a folder that others load."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import DEFAULT_CROP_MODE, DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf

import hybridzoo
from hybridzoo import checkpoints
from hybridzoo.checkpoints import writing
from hybridzoo.train import engine, provenance, results, trained
from hybridzoo.train.classification import ImageClassifier
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub import card, licences
from hybridzoo.train.hub.folder import CARD, CONFIG, OWN, WEIGHTS, encoded
from hybridzoo.train.plain import printable

_OURS = (WEIGHTS, CONFIG, CARD)
_OF_THE_CLASSIFIER = {*inspect.signature(ImageClassifier.__init__).parameters, "type"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: with `model.safetensors`, `config.json` and `README.md`.
        warning: one line about the licence, for the person who publishes the model; or empty.
    """

    folder: Path
    warning: str


def export(
    run_or_file: str | Path,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    licence: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a trained model as a folder for the hub, completely or not at all.

    A classifier's folder is in timm's layout: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it. A
    detector's or segmentor's holds the whole model; `hybridzoo test`, `predict` and their Python functions take the
    folder in place of a run.

    Args:
        run_or_file: a run's folder, or a checkpoint that contains its config.
        out: the folder to write; default `hub` beside the checkpoint.
        title: title of the model card; default the run's name.
        licence: the hub's identifier, e.g. `mit`; default the one that follows from the weights that the run started
            from.
        force: replace the three files in an existing folder.

    Raises:
        UserError: nothing to export, a checkpoint without its config, a licence that the start weights do not allow, or
            a folder that exists or cannot be written.
    """
    path = trained.find(run_or_file)
    target = _place(path.parent / "hub" if out is None else Path(out).expanduser(), path, force)
    setup = trained.read(path)
    if setup is None:
        raise UserError(
            f"checkpoint {path}: does not contain its config (weights of others, or of an older hybridzoo); "
            "only what `hybridzoo train` wrote can be exported"
        )
    meta = trained.meta_of(path)
    training = provenance.clean(meta.get(provenance.KEY))
    settled = licences.licence_of(training["start"], meta.get("started") is True, licence)
    model: Any = engine.build_for_inference(None, path, "cpu")
    names = [str(name) for name in model.dataset_meta["classes"]]
    setup = {**setup, "data": None}  # a path of this machine
    own = {"format": 1, "version": hybridzoo.__version__, "setup": encoded(setup), "training": training}
    own["licence"] = settled.word
    facts = card.Facts(
        title=printable(title or str(setup["name"])),
        task=setup["task"],
        setup=setup,
        names=names,
        training=training,
        licence=settled,
        results=_results(path),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kind=type(model).__name__,
    )
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        if setup["task"] == "classification":
            _write_classifier(model.model, setup, names, own, settled, new)
        else:
            _write_dense(model, setup, names, own, new)
        (new / CARD).write_text(card.text(facts), encoding="utf-8")
        _move(new, target)
    except OSError as error:
        raise UserError(f"--out {target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Exported(target, settled.warning)


def _place(target: Path, source: Path, force: bool) -> Path:
    if not target.name:
        raise UserError(f"--out {str(target)!r}: is not a folder name")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {target}: is a file; name a folder")
    if source.parent.resolve() == target.resolve():
        raise UserError(f"--out {target}: is the folder of the weights themselves; name another one")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise UserError(f"--out {target}: exists already; name another folder, or give --force to replace its files")
    return target


def _results(checkpoint: Path) -> dict[str, Any]:
    """The scores in a checkpoint's folder, if they belong to this checkpoint; otherwise none."""
    if not (checkpoint.parent / results.NAME).is_file():
        return {}
    try:
        found = results.read(checkpoint.parent)
    except UserError:
        return {}
    return found if Path(str(found.get("checkpoint", ""))).name == checkpoint.name else {}


def _write_classifier(
    network: Any,
    setup: Mapping[str, Any],
    names: list[str],
    own: dict[str, Any],
    settled: licences.Licence,
    folder: Path,
) -> None:
    """timm writes its own layout, from the network's configuration, which is first set to the trained one's values."""
    name, _, tag = str(setup["model"]["name"]).partition(".")
    arguments = checkpoints.model_args(name, tag)
    arguments |= {key: value for key, value in setup["model"].items() if key not in _OF_THE_CLASSIFIER}
    arguments = {key: value for key, value in arguments.items() if not key.endswith(("drop_rate", "drop_path_rate"))}
    network.pretrained_cfg = {
        **{k: v for k, v in network.pretrained_cfg.items() if k not in _OF_THE_START},
        **_input(setup["input"], network.pretrained_cfg),
        "architecture": name,
        "num_classes": network.num_classes,
        "license": settled.name or settled.word,
    }
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.contiguous()  # as safetensors needs them
    extra = {"label_names": names, "library_name": card.library(name), OWN: own}
    save_for_hf(network, str(folder), model_config=extra, model_args=arguments, safe_serialization=True)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors writes files that only the owner can read


# Keys that describe the published weights, which these are not any more.
_OF_THE_START = {
    *("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag", "custom_load"),
    *("test_input_size", "min_input_size", "test_crop_pct", "pool_size", "test_pool_size"),
    *("label_offset", "label_names", "label_descriptions", "description", "origin_url", "notes"),
}


def _input(given: Mapping[str, Any], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of the evaluation, with timm's keys.

    A missing key means the default of `timm.data.create_transform`, not the value that the network was published with.
    """
    found = {
        "mean": given.get("mean", IMAGENET_DEFAULT_MEAN),
        "std": given.get("std", IMAGENET_DEFAULT_STD),
        "interpolation": given.get("interpolation", "bilinear"),
        "crop_pct": given.get("crop_pct") or DEFAULT_CROP_PCT,
        "crop_mode": given.get("crop_mode") or DEFAULT_CROP_MODE,
    }
    size = given.get("input_size", cfg["input_size"])
    if isinstance(size, int):
        size = (size, size)
    return {**found, "input_size": tuple(size) if len(size) == 3 else (len(found["mean"]), *size)}


def _write_dense(model: Any, setup: Mapping[str, Any], names: list[str], own: dict[str, Any], folder: Path) -> None:
    writing.write(model.state_dict(), {}, folder / WEIGHTS)
    writing.note_of(folder / WEIGHTS).unlink()
    config = {
        "library_name": "hybridzoo",
        "task": setup["task"],
        "model_type": type(model).__name__,
        "backbone": setup["model"].get("backbone", {}).get("name"),
        "num_classes": len(names),
        "label_names": names,
        OWN: own,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _move(new: Path, target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        for name in _OURS:
            os.replace(new / name, target / name)
        return
    if target.is_dir():
        target.rmdir()
    os.rename(new, target)
