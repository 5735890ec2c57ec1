"""Loads weights from a file into a model: reads all usual formats safely, loads completely or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.checkpoints import reading
from hybridzoo.checkpoints.conversion import Parts, split
from hybridzoo.checkpoints.keymaps import sizes
from hybridzoo.train.errors import UserError
from hybridzoo.train.hub.folder import is_hub_name
from hybridzoo.train.names import check_weights
from hybridzoo.train.plain import printable


@contextlib.contextmanager
def _told_to_the_user() -> Iterator[None]:
    try:
        yield
    except reading.CheckpointError as error:
        raise UserError(str(error)) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """See :func:`hybridzoo.checkpoints.reading.read_checkpoint`; a bad file is a UserError here."""
    with _told_to_the_user():
        return reading.read_checkpoint(path)


def peek(path: str | Path) -> dict[str, Any]:
    """See :func:`hybridzoo.checkpoints.reading.peek`; a bad file is a UserError here."""
    with _told_to_the_user():
        return reading.peek(path)


def read_state_dict(path: str | Path, *, strip: bool = True) -> dict[str, Tensor]:
    """See :func:`hybridzoo.checkpoints.reading.read_state_dict`; a bad file is a UserError here."""
    with _told_to_the_user():
        return reading.read_state_dict(path, strip=strip)


def read_parts(path: str | Path, model: nn.Module) -> Parts:
    """The weights in a file for a timm model, with our names; other content of the file is ignored.

    Raises:
        UserError: the file cannot be read or holds no weights.
    """
    architecture = _name(model)
    wrapper_keys = [card.wrapper_key for card in checkpoints.cards(architecture) if card.wrapper_key]
    with _told_to_the_user():
        state, _ = reading.unwrap(reading.read_checkpoint(path), path, next(iter(wrapper_keys), None), strict=False)
    return split(state, architecture)


def find_weights(tag_or_file: str | Path, model: str = "") -> Path:
    """The file of some weights, downloaded if needed.

    Args:
        tag_or_file: value of the command line's `--weights`: a file; a run's folder or a folder for the hub; a model on
            the hub (`hf-hub:USER/NAME`); or published weights (`dinat_mini.in1k`).
        model: the network they are for; a published file of another one is refused before it is downloaded.

    Raises:
        UserError: unknown file or name, another network's weights, or a failed download.
    """
    path, name = Path(tag_or_file), str(tag_or_file)
    check_weights(name)
    if path.is_dir() or is_hub_name(name):
        from hybridzoo.train import trained  # which imports this module

        return trained.find(name)
    if path.exists():
        return path
    if model and name.partition(".")[0] != model:
        own = [card.name for card in checkpoints.cards(task=None) if card.url and card.model == model]
        hint = f"choose {', '.join(own)}" if own else "none are published of it"
        raise UserError(f"weights {name}: are not of {model}, which the config trains; {hint}")
    from hybridzoo.checkpoints import store
    from hybridzoo.checkpoints.transfer import DownloadError

    try:
        found = store.download(name)
    except (DownloadError, ValueError) as error:
        raise UserError(str(error)) from error
    if (notice := store.licence_notice(store.find(name))) and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {notice}", file=sys.stderr)
    return found


def load_matching(
    model: nn.Module, state: dict[str, Tensor], *, allow_head_mismatch: bool, source: str | Path = ""
) -> str:
    """Load ``state`` into ``model``: every name and shape must fit, or nothing is loaded.

    Position tables for another image, window or kernel size fit if the model's family has a rule to resize them.

    Args:
        model: a timm model, or a detector or segmentor.
        state: name -> tensor, under our names or those of the authors' published files.
        allow_head_mismatch: let the classifier differ (another number of classes, or no classifier on either side).
            Fitting tensors are loaded, the others keep their values.
        source: the file they come from, for messages.

    Returns:
        What was loaded, in words.

    Raises:
        UserError: names the first tensors that do not fit; the model is untouched.
    """
    own = model.state_dict()
    if hasattr(model, "pretrained_cfg"):  # timm's: a detector's names are its own
        state = split(state, _name(model)).network
    network: Any = model
    if hasattr(model, "fit_state"):
        state = dict(network.fit_state(state))
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = {name: value.shape for name, value in state.items() if name in own and value.shape != own[name].shape}
    state = sizes.fit(state, own)
    resized = [n for n in differing if state[n].shape == own[n].shape or sizes.takes(model, n, state[n])]
    reshaped = [name for name in differing if name not in resized]
    if allow_head_mismatch:
        # A classifier on one side only, e.g. num_classes=0, is a mismatch as well.
        missing, unexpected, reshaped = (
            [name for name in names if not _in_head(model, name)] for names in (missing, unexpected, reshaped)
        )
    fitting = {
        name: value
        for name, value in state.items()
        if name in own and (value.shape == own[name].shape or name in resized)
    }
    wrong = reading.wrong_numbers(fitting, own)
    if reasons := _listed(missing, unexpected, reshaped, wrong, state, own):
        which = f"weights {source}:" if source else "the weights"
        raise UserError(f"{which} do not fit {_name(model)}: {reasons}")
    report = f"{len(fitting)} of {len(own)} tensors"
    if resized:
        first = resized[0]
        change = f"{tuple(differing[first])} to {tuple(own[first].shape)}"
        report += f", {len(resized)} tables of positions resized (first {first}, {change})"
    if kept := [name for name in own if name not in fitting]:
        report += f"; newly initialised: {', '.join(sorted({name.rpartition('.')[0] for name in kept}))}"
    model.load_state_dict(fitting, strict=False)
    return report


def unlike(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The differences between `state` and the tensors in `own`, in words; empty if there are none."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [name for name in state if name in own and state[name].shape != own[name].shape]
    return _listed(missing, unexpected, reshaped, reading.wrong_numbers(state, own), state, own)


def _listed(
    missing: Sequence[str],
    unexpected: Sequence[str],
    reshaped: Sequence[str],
    wrong: Sequence[tuple[str, list[str]]],
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing, first {missing[0]!r}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected, first {unexpected[0]!r}")
    if reshaped:
        first = reshaped[0]
        shapes = f"{tuple(state[first].shape)}, the model has {tuple(own[first].shape)}"
        parts.append(f"{len(reshaped)} of another shape, first {first!r}: {shapes}")
    return "; ".join([*parts, *(f"{len(names)} {what}, first {names[0]!r}" for what, names in wrong)])


def fitting_out_norms(norms: nn.ModuleList, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's norms of a dense backbone's outputs, or an empty dict if their type or number differs."""
    own = norms.state_dict()
    fits = own.keys() == published.keys() and all(own[name].shape == published[name].shape for name in own)
    return published if fits else {}


def tell(line: str) -> None:
    """Print a line and write it to the run's log, in the main process only."""
    from mmengine.dist import is_main_process
    from mmengine.logging import print_log

    if is_main_process():
        print(printable(line), flush=True)
        print_log(line, logger="current")


def _in_head(model: nn.Module, name: str) -> bool:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    classifier = cfg.get("classifier")
    if classifier:
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        return name.startswith((*(f"{prefix}." for prefix in names), *getattr(model, "optional", ())))
    # Detectors and segmentors name every part with class outputs something_head.
    return any(part.endswith("head") for part in name.split(".")[:-1])


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


def load_weights(model: nn.Module, path: str | Path, *, allow_head_mismatch: bool) -> None:
    """Load a file into a model of any task; everything must fit, see :func:`load_matching`."""
    inner: Any = model.module if is_model_wrapper(model) else model
    if hasattr(inner, "load_weights"):
        inner.load_weights(path, allow_head_mismatch=allow_head_mismatch)
    else:
        state = read_state_dict(path, strip=False)
        report = load_matching(inner, state, allow_head_mismatch=allow_head_mismatch, source=path)
        if allow_head_mismatch:
            tell(f"weights {path}: {report}")


def start_from(model: nn.Module, path: Path) -> None:
    """Load a file's weights before training: all except other class heads, or only the backbone's.

    Raises:
        UserError: not even the backbone fits; the model is untouched.
    """
    inner: Any = model.module if is_model_wrapper(model) else model
    try:
        load_weights(inner, path, allow_head_mismatch=True)
    except UserError as error:
        if not hasattr(getattr(inner, "backbone", None), "load"):
            raise
        tell(f"{error}: using its backbone only")  # neck and heads of another detector or segmentor
        inner.backbone.load(path)


def is_whole_model(weights: str | Path) -> bool:
    """Whether a file has one of our detectors or segmentors; published ones have other names, and only their backbone
    fits."""
    return any(name.startswith("backbone.model.") for name in read_state_dict(weights, strip=False))
