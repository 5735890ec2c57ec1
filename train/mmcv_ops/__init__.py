"""`mmcv._ext` without a compiler: the operators mmdet and mmseg call, from torchvision and plain PyTorch.

mmcv's Python side asks its compiled extension for functions by name. If it is missing, `install()` provides a module
with the same name. Signatures, in-place outputs and index conventions are those of the extension, so that `mmcv.ops`
works unchanged; each operator is tested against its definition in `tests/train/test_mmcv_ops.py`.
Names that we do not provide exist too, because mmcv looks them up at import; they raise `OperatorNotProvided` when
called.

boxes: non-maximum suppression and overlaps · pooling: RoI Align · sampling: deformable convolution and attention ·
losses: focal loss. These are what the recipes of `configs/` use.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hybridzoo.train.errors import UserError
from hybridzoo.train.mmcv_ops.missing import OperatorNotProvided, not_provided

__all__ = ["OperatorNotProvided", "install"]

NAME = "mmcv._ext"
_MODULES = ("boxes", "losses", "pooling", "sampling")


class _Loader:
    """Loads the replacement module. A loader class makes `pkgutil`, `importlib.util.find_spec` and reload work."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None  # use the default module object

    def exec_module(self, module: ModuleType) -> None:
        for part in _MODULES:
            operators = importlib.import_module(f"{__name__}.{part}")
            module.__dict__.update({name: getattr(operators, name) for name in operators.__all__})
        module.__dict__["get_compiler_version"] = lambda: "none (operators from hybridzoo and torchvision)"
        module.__dict__["get_compiling_cuda_version"] = lambda: "none (operators from hybridzoo and torchvision)"
        module.__dict__["__getattr__"] = _missing


def _missing(name: str) -> Callable[..., Any]:
    if name.startswith("__"):  # Python itself looks for such names; no operator has one
        raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

    def operator(*_: Any, **__: Any) -> Any:
        raise not_provided(name)

    operator.__name__ = name
    return operator


def install() -> None:
    """Make `mmcv.ops` importable and usable without mmcv's compiled extension.

    Does nothing if the real `mmcv._ext` is installed (a broken one keeps its ImportError), or if called again. Call it
    before anything imports `mmcv.ops`, mmdet or mmseg.

    Raises:
        UserError: mmcv itself is not installed.
    """
    try:
        importlib.import_module(NAME)
        return
    except ModuleNotFoundError as missing:
        if missing.name == "mmcv":
            raise UserError("mmcv is not installed: pip install 'hybridzoo[detection,segmentation]'") from None
        if missing.name != NAME:
            raise
    spec = importlib.machinery.ModuleSpec(NAME, _Loader())  # type: ignore[arg-type]
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sys.modules["mmcv"]._ext = module  # type: ignore[attr-defined]
