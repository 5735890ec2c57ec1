"""Reads weights from a file safely: returns tensors and plain data, and never executes anything from the file.

Safetensors contain only tensors. Every other file is a pickle and is read by PyTorch's restricted unpickler
(`weights_only=True`), which allows tensors and containers. Published files contain some more types besides tensors.
`_INERT` lists each of them with the files that need it. They are replaced by empty placeholders, so neither their code
nor their package is needed; every other name is refused. NumPy's types have placeholders too, because the real ones use
memory addresses from a file without checks.

The result is plain: dictionaries, lists, tuples, text, numbers, placeholders, and tensors without extra attributes, in
a structure limited by `_DEEPEST` and `_MOST`. Every size in a file is compared with the file's content before it is
used.
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
    """A file that may be complete, but that needs code to be executed."""


_DEEPEST = 64  # depth of nested containers; training scripts have about ten
_MOST = 5_000_000  # number of values; a value that is referred to twice counts twice
_LONGEST_NAME = 512  # characters of a tensor's name

# Keys of the weights in files of training scripts: mmengine and timm, DeiT and code based on it, torch.hub.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
# Prefixes that wrappers add to the network's names: DDP, torch.compile, our ImageClassifier.
_PREFIXES = ("module.", "_orig_mod.", "model.")


class _Inert:
    """Empty placeholder for a type or function that a file names and that is not needed to read weights."""

    def __new__(cls, *args: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Full name in the pickle -> its replacement.
_INERT: dict[str, Any] = {
    # options of the training script, `args`: FasterViT (timm's saver), BiFormer, code based on DeiT
    "argparse.Namespace": _Inert,
    # the same for scripts that keep their options in OmegaConf, as BiFormer's may
    "omegaconf.dictconfig.DictConfig": _Inert,
    "omegaconf.listconfig.ListConfig": _Inert,
    "omegaconf.base.ContainerMetadata": _Inert,
    "omegaconf.base.Metadata": _Inert,
    "omegaconf.nodes.AnyNode": _Inert,
    "typing.Any": _Inert,
    # `config`: Agent and InLine attention. A CfgNode is a dictionary with attributes, like this type
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
        CheckpointError: the file is missing, empty, cut short, or not a checkpoint.
    """
    return _read(Path(path), lazily=False)


def peek(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint; the values of tensors are read from the disk only when they are used.

    For the file's metadata, such as the progress of a run. Checksums are not compared. Otherwise like
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
            # with a path, torch.load trusts the suffix; but only a path can be memory-mapped
            source: Any = str(path.resolve()) if mapped else file
            content = _Copy().of(torch.load(source, map_location="cpu", weights_only=True, mmap=mapped))
    except CheckpointError:
        raise
    except _StructureError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from error
    except Exception as error:  # zip, pickle and safetensors raise different exceptions
        text = str(error).strip()
        # The last case: the pickle uses a placeholder as data, for example a NumPy object inside another type.
        if any(word in text for word in ("weights_only", "Unsupported", "GLOBAL", _Inert.__name__)):
            reason = "it contains Python objects that only arbitrary code can rebuild; save only its weights"
            raise UnsafeError(f"checkpoint {path}: cannot be read ({reason})") from error
        reason = text.splitlines()[0][:200] if text else f"{type(error).__name__}: not a checkpoint, or cut short"
        raise CheckpointError(f"checkpoint {path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


class _StructureError(ValueError):
    """Data that is safe, but too large or too deep to process."""


class _Copy:
    """Plain data from an unpickler's result: a file may set any attributes of objects, even ones that hide methods."""

    def __init__(self) -> None:
        self.count = 0
        self.tensors: dict[int, Tensor] = {}

    def of(self, value: Any, depth: int = 0) -> Any:
        self.count += 1
        if self.count > _MOST or depth > _DEEPEST:
            raise _StructureError("its data is nested or repeated too much")
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
    """The weights in a file in any of these forms: plain, timm, DeiT or mmengine; pickle or safetensors.

    Args:
        path: the checkpoint file.
        wrapper_key: key of the weights in the file, as on its card; default: search for it. A file whose weights have
            no wrapper can be read with any key.
        strip: remove prefixes so that the names are those of the backbone, see `strip_prefixes`. With False the names
            stay unchanged.

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
    """The weights in a checkpoint's content, and their key; empty if there is no wrapper.

    Args:
        content: of the file.
        path: of the file, for messages.
        wrapper_key: key of the weights; default: search for it.
        strict: use only `wrapper_key`, and do not search.

    Raises:
        CheckpointError: there are no weights.
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
            raise CheckpointError(f"checkpoint {path}: {repr(name)[:60]} is not a valid name of a tensor")
        if kind := strange(value):
            raise CheckpointError(f"checkpoint {path}: {name} {kind}, unlike all weights of these networks")
    if not state:
        expected = f" under {wrapper_key!r}" if wrapper_key else ""
        keys = ", ".join(str(key)[:60] for key in list(found)[:5])
        raise CheckpointError(f"checkpoint {path}: holds no weights{expected} (its keys: {keys})")
    return state, used


def strange(tensor: Tensor) -> str:
    """Why a tensor is not one that our training saves, in words; empty for an ordinary tensor.

    No memory of the tensor's size is allocated: a tensor with many values may be a view of a few.
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
    """Which tensors of a file have wrong numbers, by kind of error.

    Args:
        found: tensors of the file; none of them is `strange`.
        own: tensors of the network, possibly on the meta device. Tensors without the same name in `found` are ignored.

    Returns:
        `(error, names)` for each error that occurs: "of another kind of numbers" (for example integers instead of
        fractions), "not finite" (NaN, infinite), "too large for float32" (a finite number of a wider dtype).
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
        except (RuntimeError, NotImplementedError):  # types of a few bits, which no operator supports
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
    """Whether a tensor of fractions has only whole numbers where integers are expected (averaged counters)."""
    counts = value.is_floating_point() and not dtype.is_complex and dtype != torch.bool
    return counts and bool(((value == value.round()) & (value.abs() < 2**31)).all())


def strip_prefixes(state: Mapping[str, Tensor], *, dense: bool = True) -> dict[str, Tensor]:
    """Remove the prefixes `module.`, `_orig_mod.` and `model.`, so that the names are those of the network.

    Args:
        state: name -> tensor.
        dense: from the weights of a detector or segmentor (names `backbone.*`), keep only those of the backbone.
            Published classifiers of EfficientViT (MIT), which have a `backbone` and a `head`, are not changed.
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
