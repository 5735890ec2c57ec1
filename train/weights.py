"""Weights from a file into a model: read any usual container safely, load completely or not at all."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridzoo import checkpoints
from hybridzoo.train.errors import UserError

# Where training scripts put the weights: mmengine and timm, DeiT and its descendants, torch.hub.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
# Prefixes that wrappers put before the backbone's own names: DDP, torch.compile, our ImageClassifier.
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The whole content of a checkpoint file, tensors on the CPU; nothing in the file is executed.

    Args:
        path: a ``.safetensors`` file or anything ``torch.save`` wrote.

    Raises:
        UserError: the file is missing, is no checkpoint, is cut short, or asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless_types()), _statistics_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in reason or "Unsupported" in reason or "GLOBAL" in str(error):
            reason = "it contains Python objects that only arbitrary code could rebuild; save its weights alone"
        raise UserError(f"checkpoint {path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def read_state_dict(path: str | Path, *, strip: bool = True) -> dict[str, Tensor]:
    """The weights in a file, whatever wrote it: plain, timm, DeiT-style or mmengine, ``.pth`` or safetensors.

    Args:
        path: the checkpoint file.
        strip: reduce the names to those of the backbone itself: of a detector's or segmentor's weights only
            ``backbone.*`` is kept, and the prefixes ``backbone.``, ``module.`` and ``model.`` go.  With False the names
            stay as the file has them.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        UserError: the file cannot be read or holds no tensors.
    """
    content: Any = read_checkpoint(path)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"checkpoint {path}: holds no weights (its keys: {', '.join(map(str, list(content)[:5]))})")
    return strip_prefixes(state) if strip else state


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the backbone itself has them: see :func:`read_state_dict`."""
    for part in ("backbone.model.", "backbone."):  # a detector's: its necks and heads stay outside
        if any(name.startswith(part) for name in state):
            state = {name[len(part) :]: value for name, value in state.items() if name.startswith(part)}
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def load_matching(model: nn.Module, state: dict[str, Tensor], *, allow_head_mismatch: bool) -> None:
    """Load ``state`` into ``model``: every name and shape has to fit, or nothing is loaded.

    Args:
        model: a timm model, or a detector or segmentor.
        state: name -> tensor, under our names or those of the authors' published files.
        allow_head_mismatch: let the classifier differ (another number of classes, or no classifier on either side).
            Its fitting part is loaded, the rest keeps its values.

    Raises:
        UserError: names the first tensors that do not fit; the model is untouched.
    """
    own, state = model.state_dict(), _in_our_names(model, state)
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    reshaped = [name for name in state if name in own and state[name].shape != own[name].shape]
    if allow_head_mismatch:
        # A classifier on one side only, e.g. num_classes=0, is a mismatch as well.
        missing, unexpected, reshaped = (
            [name for name in names if not _in_head(model, name)] for names in (missing, unexpected, reshaped)
        )
    if missing or unexpected or reshaped:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing, first {missing[0]!r}")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected, first {unexpected[0]!r}")
        if reshaped:
            first = reshaped[0]
            shapes = f"{tuple(state[first].shape)}, the model has {tuple(own[first].shape)}"
            parts.append(f"{len(reshaped)} of another shape, first {first!r}: {shapes}")
        raise UserError(f"the weights do not fit {_name(model)}: {'; '.join(parts)}")
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)


def _in_our_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names become ours where the model's family has a key map; our own names stay as they are."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture", "")
    return checkpoints.convert(state, architecture) if checkpoints.cards(architecture) else state


def _in_head(model: nn.Module, name: str) -> bool:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    classifier = cfg.get("classifier")
    if classifier:
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        return name.startswith(tuple(f"{prefix}." for prefix in names))
    # Detectors and segmentors call every part with class outputs something_head.
    return any(part.endswith("head") for part in name.split(".")[:-1])


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__


@contextlib.contextmanager
def _statistics_kept() -> Iterator[None]:
    """Unpickling a HistoryBuffer overwrites the methods that all of them share, with what we put in getattr's place."""
    try:
        from mmengine.logging import HistoryBuffer
    except ImportError:
        yield
        return
    kept = dict(HistoryBuffer._statistics_methods)
    try:
        yield
    finally:
        HistoryBuffer._statistics_methods.clear()
        HistoryBuffer._statistics_methods.update(kept)


def _harmless_types() -> list[Any]:
    """Types that published checkpoints carry beside their tensors and that only hold data."""
    types: list[Any] = [argparse.Namespace]
    with contextlib.suppress(ImportError):
        import numpy as np
        from mmengine.logging import HistoryBuffer

        numeric = {type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.uint8, np.bool_)}
        core = getattr(np, "_core", None) or np.core  # NumPy 1 has no _core
        # A HistoryBuffer names its methods by getattr; nothing here calls them, so they need not be found.
        types += [(_nothing, f"{module}.getattr") for module in ("builtins", "__builtin__")]
        types += [HistoryBuffer, np.ndarray, np.dtype, core.multiarray._reconstruct, core.multiarray.scalar, *numeric]
    return types


def _nothing(*args: Any) -> None:
    """Stands in for a function that a checkpoint names and that reading weights does not need."""
