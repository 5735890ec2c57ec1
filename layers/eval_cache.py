"""Tensors that depend on a module's weights and a size, never on the image: computed once in evaluation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hybridzoo.layers.slicing import transformed

# Bytes of results that a module keeps: sizes come and go in dense evaluation. To make a large result takes no longer
# than to use it, so what alone exceeds this is made anew for every batch.
BUDGET = 2**23

_steps = 0  # of all optimizers: fused ones write to parameters without counting a version


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _Kept(NamedTuple):
    steps: int
    tensors: list[weakref.ref[Tensor]]
    stamps: list[tuple[Any, ...]]
    result: Any
    size: int  # bytes

    def serves(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors that the result was made of, not written to. (On every layer's way: quick.)"""
        # An address and a version of 0 say little: what is freed is given to the next tensor.
        return (
            self.steps == _steps
            and len(tensors) == len(self.tensors)
            and all(old() is t for old, t in zip(self.tensors, tensors, strict=True))
            and self.stamps == [_stamp(t) for t in tensors]
        )


class EvalCache(nn.Module):
    """Base of modules that remember such results (position biases, folded weights) between evaluation batches.

    A result is kept while the module is in eval mode and no gradient has to flow into it. It serves calls under the
    same autocast as long as the module's parameters and buffers are the same tensors, not written to:
    `load_state_dict`, `.to(…)`, other weights by assignment or `functional_call`, a step of any optimizer, a call of
    `train()` or `eval()` all end it. Only writing through `tensor.data`, or by a kernel that PyTorch does not know of,
    goes unnoticed; call `eval()` after it. The oldest results go where all of a module's would take more than `BUDGET`
    bytes. They are neither in the state dict nor in copies and pickles of the module. Nothing is kept while tracing,
    compiling or exporting, by replicas of `nn.DataParallel` (which share the original's attributes), of inference
    tensors (which count no writing) or of weights inside `torch.func`'s transforms.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._results: dict[Hashable, _Kept] = {}

    def cached(self, key: Hashable, compute: Callable[[], Any], otherwise: Callable[[], Any] | None = None) -> Any:
        """`compute()`, or what that was for an equal `key` and these weights.

        That is a tensor, an array or bytes, or a tuple or list of some. Where nothing can be kept, `otherwise()`, if it
        is given, because `compute()` pays only more than once.
        """
        otherwise = otherwise or compute
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return otherwise()
        tensors = self._tensors()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return otherwise()
        key = (key, _autocast(tensors))
        kept = self._results.get(key)
        if kept and kept.serves(tensors):
            return kept.result
        if getattr(self, "_is_replica", False) or not all(_is_plain(t) for t in tensors):
            return otherwise()
        stamps = [_stamp(t) for t in tensors]
        with torch.inference_mode(False), torch.no_grad():  # so that a later backward may save the result
            result = compute()
        self._keep(key, _Kept(_steps, [weakref.ref(t) for t in tensors], stamps, result, _size(result)))
        return result

    def _keep(self, key: Hashable, new: _Kept) -> None:
        self._results.pop(key, None)  # it may be there with other weights; the new one is the youngest
        if new.size > BUDGET:
            return
        self._results[key] = new
        while sum(kept.size for kept in list(self._results.values())) > BUDGET:
            self._results.pop(next(iter(self._results)), None)

    def _tensors(self) -> list[Tensor]:
        if self._modules:
            return [*self.parameters(), *self.buffers()]
        own = (*self._parameters.values(), *self._buffers.values())  # no search where there is nothing below
        return [t for t in own if t is not None]

    def train(self, mode: bool = True) -> Any:
        self._results.clear()
        return super().train(mode)

    # What is held weakly cannot be swapped (`torch.utils.swap_tensors`, PyTorch's coming way of moving and loading).
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._results.clear()  # `.half().float()` may end at the address that it started from
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._results.clear()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_results": {}}


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device


def _is_plain(tensor: Tensor) -> bool:
    """Inference tensors count no versions, those inside `torch.func`'s transforms have no address."""
    return not (tensor.is_inference() or transformed(tensor))


def _autocast(tensors: list[Tensor]) -> torch.dtype | None:
    kind = tensors[0].device.type if tensors else "cpu"
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _size(result: Any) -> int:
    """Bytes of tensors, arrays and bytes, and of what holds some."""
    if isinstance(result, bytes):
        return len(result)
    return result.nbytes if hasattr(result, "nbytes") else sum(_size(part) for part in result)
