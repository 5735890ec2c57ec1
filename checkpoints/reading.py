"""Weights out of a file, safely: tensors and plain data come back, nothing that a file says is ever executed.

Safetensors hold nothing but tensors. Everything else is a pickle and goes through PyTorch's restricted unpickler
(`weights_only=True`), which knows tensors and containers. Published files carry some further types beside their
tensors. Each of them is named in `_INERT` with the files that need it; an empty stand-in takes its place, so neither
its code nor its package is needed, and a name that is not in the list is refused. NumPy's types have stand-ins as well:
the real ones take memory addresses from a file at its word.

What comes back is plain: dictionaries, lists, tuples, text, numbers, stand-ins and tensors without attributes of their
own, in a structure that is no deeper and has no more places than `_DEEPEST` and `_MOST` say. No size that a file claims
is believed before it is compared with what the file holds.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridzoo.checkpoints.containers import HEAD, flaw, is_safetensors


class CheckpointError(ValueError):
    """A file that cannot be used as weights: one line that names the file, what is wrong and what to do."""


class UnsafeError(CheckpointError):
    """A file that may be whole, but asks for code to be run."""


_DEEPEST = 64  # containers inside each other; training scripts nest about ten
_MOST = 5_000_000  # values in all, counted as often as they are referred to
_LONGEST_NAME = 512  # letters of a tensor's name

# Where training scripts put the weights: mmengine and timm, DeiT and its descendants, torch.hub.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
# Prefixes that wrappers put before the network's own names: DDP, torch.compile, our ImageClassifier.
_PREFIXES = ("module.", "_orig_mod.", "model.")


class _Inert:
    """Stands in for a type or function that a file names and that reading weights does not need; keeps nothing."""

    def __new__(cls, *args: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Full name in the pickle -> what is made in its place.
_INERT: dict[str, Any] = {
    # options of the training script, `args`: FasterViT (timm's saver), BiFormer, DeiT's descendants
    "argparse.Namespace": _Inert,
    # the same where a script kept its options in OmegaConf, as BiFormer's may
    "omegaconf.dictconfig.DictConfig": _Inert,
    "omegaconf.listconfig.ListConfig": _Inert,
    "omegaconf.base.ContainerMetadata": _Inert,
    "omegaconf.base.Metadata": _Inert,
    "omegaconf.nodes.AnyNode": _Inert,
    "typing.Any": _Inert,
    # `config`: Agent and InLine attention. A CfgNode is a dictionary with attributes, which this type has too
    "yacs.config.CfgNode": collections.OrderedDict,
    # curves in `message_hub`: mmengine's checkpoints, ours among them; a HistoryBuffer names its methods by getattr
    "mmengine.logging.history_buffer.HistoryBuffer": _Inert,
    "builtins.getattr": _Inert,
    "__builtin__.getattr": _Inert,
    # arrays and numbers, e.g. the best accuracy so far, under the names of NumPy 1 and 2
    "numpy.ndarray": _Inert,
    "numpy.dtype": _Inert,
    **{f"numpy.{core}.multiarray.{name}": _Inert for core in ("core", "_core") for name in ("_reconstruct", "scalar")},
    **{
        f"numpy.dtypes.{kind}DType": _Inert
        for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "UInt8", "Bool", "Str", "Object")
    },
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The whole content of a checkpoint file, tensors on the CPU; nothing in the file is executed.

    Args:
        path: safetensors, or anything `torch.save` wrote.

    Raises:
        UnsafeError: the file asks for code to be run.
        CheckpointError: it is missing, empty, cut short, or something else than a checkpoint.
    """
    return _read(Path(path), lazily=False)


def peek(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content without its tensors' values, which come from the disk when somebody looks at them.

    For what the file says of itself, such as how far a run had come; checksums are not compared. Otherwise as
    `read_checkpoint`.
    """
    return _read(Path(path), lazily=True)


def _read(path: Path, *, lazily: bool) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if reason := flaw(path, sums=not lazily):
            raise CheckpointError(f"checkpoint {path}: cannot be read ({reason})")
        if is_safetensors(head):
            from safetensors.torch import load_file

            return load_file(path)
        allowed: list[Any] = [(stand_in, name) for name, stand_in in _INERT.items()]
        with path.open("rb") as file, torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = lazily and head.startswith(b"PK")
            # of a path it would believe the suffix; only a path can be mapped
            source: Any = str(path.resolve()) if mapped else file
            content = _Copy().of(torch.load(source, map_location="cpu", weights_only=True, mmap=mapped))
    except CheckpointError:
        raise
    except _StructureError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from error
    except Exception as error:  # zip, pickle and safetensors each raise their own kinds
        text = str(error).strip()
        # The last is a stand-in where the pickle wants data, as one does that hands NumPy's objects to another type.
        if any(word in text for word in ("weights_only", "Unsupported", "GLOBAL", _Inert.__name__)):
            reason = "it contains Python objects that only arbitrary code could rebuild; save its weights alone"
            raise UnsafeError(f"checkpoint {path}: cannot be read ({reason})") from error
        reason = text.splitlines()[0][:200] if text else f"{type(error).__name__}: no checkpoint, or cut short"
        raise CheckpointError(f"checkpoint {path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


class _StructureError(ValueError):
    """Data that is safe, but that nobody could walk through."""


class _Copy:
    """Plain data out of what an unpickler made: a file may give objects any attributes, also ones that hide methods."""

    def __init__(self) -> None:
        self.count = 0
        self.tensors: dict[int, Tensor] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        self.count += 1
        if self.count > _MOST or depth > _DEEPEST:
            raise _StructureError("its data is nested or repeated beyond all reason")
        if isinstance(value, Tensor):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = Tensor.detach(value)
            return self.tensors[id(value)]
        if isinstance(value, dict):
            return {self.of(key, depth + 1): self.of(item, depth + 1) for key, item in dict.items(value)}
        if isinstance(value, torch.Size | list):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, tuple | set):
            return type(value)(self.of(item, depth + 1) for item in value)
        plain = (type(None), bool, int, float, str, bytes, torch.dtype)
        return value if isinstance(value, plain) else _Inert()


def read_state_dict(path: str | Path, *, wrapper_key: str | None = None, strip: bool = True) -> dict[str, Tensor]:
    """The weights in a file, whatever wrote it: plain, timm, DeiT-style or mmengine, pickled or safetensors.

    Args:
        path: the checkpoint file.
        wrapper_key: where in the file the weights are, as the file's card says; default: looked for. A file whose
            weights are not wrapped at all is read with any key.
        strip: reduce the names to those of the backbone itself, see `strip_prefixes`. With False the names stay as the
            file has them.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        CheckpointError: the file cannot be read or holds no tensors.
    """
    state, _ = unwrap(read_checkpoint(path), path, wrapper_key)
    return strip_prefixes(state) if strip else state


def unwrap(
    content: Mapping[str, Any], path: str | Path, wrapper_key: str | None = None, *, strict: bool = True
) -> tuple[dict[str, Tensor], str]:
    """The weights in a checkpoint's content, and the key that they were under, empty for none.

    Args:
        content: of the file.
        path: of the file, for messages.
        wrapper_key: where the weights are; default: looked for.
        strict: with a `wrapper_key`, do not look elsewhere.

    Raises:
        CheckpointError: there are none.
    """
    wanted = [wrapper_key] if wrapper_key else []
    found: Mapping[str, Any] = content
    used = ""
    for wrapper in wanted if wanted and strict else [*wanted, *_WRAPPERS]:
        if isinstance(content.get(wrapper), dict):
            found, used = content[wrapper], wrapper
            break
    state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise CheckpointError(f"checkpoint {path}: {repr(name)[:60]} is no name of a tensor")
        if kind := strange(value):
            raise CheckpointError(f"checkpoint {path}: {name} {kind}, which no weights of these networks are")
    if not state:
        expected = f" under {wrapper_key!r}" if wrapper_key else ""
        keys = ", ".join(str(key)[:60] for key in list(found)[:5])
        raise CheckpointError(f"checkpoint {path}: holds no weights{expected} (its keys: {keys})")
    return state, used


def strange(tensor: Tensor) -> str:
    """What makes a tensor one that no training of ours saves, in words; empty for an ordinary one.

    Nothing of its size is allocated: a tensor of many values may be a view of few.
    """
    if tensor.is_meta:
        return "has no values (device meta)"
    if tensor.layout != torch.strided:
        return "is sparse"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has {tensor.numel():,} values, of which the file holds fewer"
    return ""


def wrong_numbers(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    """What is wrong with the numbers in a file's tensors, and the names of those where it is.

    Args:
        found: the file's; none of them `strange`.
        own: the network's of the same names; others are not looked at. Their device may be meta.

    Returns:
        Of these kinds, those that there are: "of another kind of numbers" (integers in place of fractions, for one),
        "not finite" (NaN, infinite), "too large for float32" (a finite number of a wider kind).
    """
    kinds: list[str] = []
    endless: list[str] = []
    large: dict[str, list[str]] = {}
    for name, value in found.items():
        if name not in own:
            continue
        dtype = own[name].dtype
        try:
            same = value.is_floating_point() == dtype.is_floating_point or _whole(value, dtype)
            good = same and bool(torch.isfinite(value.to(dtype)).all())
            wider = same and not good and value.dtype != dtype and bool(torch.isfinite(value).all())
        except (RuntimeError, NotImplementedError):  # kinds of a few bits, which nothing is computed with
            same = good = wider = False
        if not same:
            kinds.append(f"{name} {str(value.dtype).removeprefix('torch.')}")
        elif wider:
            large.setdefault(f"too large for {str(dtype).removeprefix('torch.')}", []).append(name)
        elif not good:
            endless.append(name)
    lists = [("of another kind of numbers", kinds), ("not finite", endless), *large.items()]
    return [(what, names) for what, names in lists if names]


def _whole(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether fractions hold nothing but whole numbers, in place of integers: counters that a script averaged."""
    counts = value.is_floating_point() and not dtype.is_complex and dtype != torch.bool
    return counts and bool(((value == value.round()) & (value.abs() < 2**31)).all())


def strip_prefixes(state: Mapping[str, Tensor], *, dense: bool = True) -> dict[str, Tensor]:
    """Names as the network itself has them, without the prefixes `module.`, `_orig_mod.` and `model.`.

    Args:
        state: name -> tensor.
        dense: of a detector's or segmentor's weights, which have `backbone.*`, keep the backbone's only.
            EfficientViT (MIT), whose published classifiers are a `backbone` and a `head`, is left as it is.
    """
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name[len(prefix) :]: value for name, value in state.items()}
    if dense and not any(".op_list." in name for name in state):
        for part in ("backbone.model.", "backbone."):
            if any(name.startswith(part) for name in state):
                inside = {name[len(part) :]: value for name, value in state.items() if name.startswith(part)}
                return strip_prefixes(inside)
    return state
