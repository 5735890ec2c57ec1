"""Tensors that depend on a module's weights and a size, never on the image: computed once in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

CAPACITY = 16  # results a module keeps: sizes come and go in dense evaluation


class EvalCache(nn.Module):
    """Base of modules that remember such results (position biases, folded weights) between evaluation batches.

    A result is kept while the module is in eval mode and no gradient has to flow into it, and dropped when a parameter
    or buffer of the module is replaced or written to (optimizer steps, `load_state_dict`, `.to(…)`), and at every call
    of `train()` or `eval()`. Only writing through `tensor.data` goes unnoticed; call `eval()` after it. Results are
    neither in the state dict nor in copies and pickles of the module. While tracing, compiling or exporting nothing is
    kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: dict[Hashable, tuple[Any, Any]] = {}

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it returned the last time for an equal `key` and the same weights."""
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        tensors = [*self.parameters(), *self.buffers()]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return compute()
        if any(t.is_inference() for t in tensors):  # they count no versions
            return compute()
        stamp = [(t.data_ptr(), t._version, t.dtype, t.device) for t in tensors]
        kept = self._results.get(key)
        if kept is None or kept[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():  # so that a later backward may save the result
                kept = (stamp, compute())
            while len(self._results) >= CAPACITY:
                self._results.pop(next(iter(self._results)), None)
            self._results[key] = kept
        return kept[1]

    def train(self, mode: bool = True) -> Any:
        self._results.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._results.clear()  # `.half().float()` may end at the address that it started from
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_results": {}}
