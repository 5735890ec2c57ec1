"""Fusing: what evaluation can merge into a neighbour is merged, and the network computes the same, faster.

One way, in place: folded weights are no longer those of a checkpoint, and training them would train another function.
A rule says for one class of module how it is folded; layers' rules are in this folder, families' in
`hybridzoo.backbones.fusing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

Fold = TypeVar("Fold", bound=Callable[[Any], None])

_FOLDS: dict[type[nn.Module], Callable[[Any], None]] = {}


class FusedError(RuntimeError):
    """A fused network is asked for what only an ordinary one can do."""

    def __init__(self, asked: str) -> None:
        super().__init__(
            f"{asked}: this network is fused, for inference only; make it anew and load its weights, or fuse a"
            " copy.deepcopy() of the one that is still needed"
        )


class Fusible(nn.Module):
    """A network with the door to fast inference.

    Attributes:
        fused: whether `fuse()` was called; then `train()` and `load_state_dict()` raise `FusedError`, and there are no
            parameters left that an optimizer could take.
    """

    fused: bool = False

    def fuse(self) -> Self:
        """Fold norms into their neighbours, in place and for good: faster, for inference only.

        Returns:
            The network itself, in evaluation. All weights are buffers now.
        """
        fuse(self)
        return self

    def train(self, mode: bool = True) -> Self:
        if mode and self.fused:
            raise FusedError("train()")
        return super().train(mode)


def folds(kind: type[nn.Module]) -> Callable[[Fold], Fold]:
    """Decorator of the rule that folds modules of exactly this class in place."""

    def register(rule: Fold) -> Fold:
        _FOLDS[kind] = rule
        return rule

    return register


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """As `Fusible.fuse`, of any module: a wrapper around networks of ours, or a layer."""
    model.eval()
    for module in list(model.modules()):  # a list: folding replaces modules
        if rule := _FOLDS.get(type(module)):
            rule(module)
    for module in model.modules():
        if isinstance(module, Fusible) and not module.fused:
            module.fused = True
            module.register_load_state_dict_pre_hook(_refuse_weights)
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    model.eval()  # what took another's place too


def _refuse_weights(*args: Any) -> None:
    raise FusedError("load_state_dict()")
