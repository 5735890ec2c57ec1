"""Fusing: what evaluation can merge into a neighbour is merged, and the network computes the same, faster.

One way, in place: folded weights are no longer those of a checkpoint, and training them would train another function.
Rules say what becomes of one class of module: `folds` changes a module in place, `swaps` puts another in its place,
from the innermost modules outwards. Layers' rules are in this folder, families' in `hybridzoo.backbones.fusing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

Rule = TypeVar("Rule", bound=Callable[[Any], Any])

_FOLDS: dict[type[nn.Module], Callable[[Any], None]] = {}
_SWAPS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}
_SWAPS_FOR_CPU: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}
FOLDED, SWAPPED, SWAPPED_FOR_CPU = "folded", "swapped", "swapped for a CPU"


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
        forms: what `fuse()` has done: "folded", "swapped", "swapped for a CPU"; nothing before it is called. Then
            `train()`, `load_state_dict()` and `reset_classifier()` raise `FusedError`, and there are no parameters left
            that an optimizer could take.
    """

    forms: frozenset[str] = frozenset()

    @property
    def fused(self) -> bool:
        """Whether `fuse()` was called."""
        return bool(self.forms)

    def fuse(
        self,
        image_size: int | tuple[int, int] | None = None,
        *,
        device: str | torch.device | None = None,
        portable: bool = False,
    ) -> Self:
        """Fold norms, and swap modules for faster ones that compute the same; in place and for good.

        For a CPU, in float32, linear layers and convolutions are also oneDNN's, with packed weights and their
        activation, and large blocks take a few images at a time. A network fused for one device runs on another too,
        and in another dtype, in PyTorch's own kernels; copies and pickles pack their weights anew. Fused once more, it
        gets the tables of another image size, or the forms of another device as well.

        All weights become buffers: `parameters()` is empty, and PyTorch's optimizers and timm's `create_optimizer_v2`
        raise their own `ValueError` ("optimizer got an empty parameter list"). The message is PyTorch's: an optimizer
        sees the list alone, and `parameters()` must not raise, because tools call it to count, print and move.
        While a network is trained, fuse a `copy.deepcopy()` of it, the averaged weights already in it: what averages
        or swaps weights (EMA) would find none.

        Args:
            image_size: position tables are fixed for images of this size, in pixels, one number or (height, width); by
                default the one that the weights were published for. Others work, and make their tables every time.
            device: what the network is to run on, "cpu", "cuda", ...; it is not moved there. Default: where it is.
            portable: fold norms only, to export: into operators that every runtime knows.

        Returns:
            The network itself, in evaluation.

        Raises:
            ValueError: there is no such kind of device.
            FusedError: `portable`, of a network that is fused in another way already.
        """
        fuse(self, None if portable else self.example_image(image_size), device=device, portable=portable)
        return self

    def example_image(self, size: int | tuple[int, int] | None) -> Tensor | None:
        """What to fix position tables with, if the network has any."""
        return None

    def train(self, mode: bool = True) -> Self:
        if mode and self.fused:
            raise FusedError("train()")
        return super().train(mode)


def folds(kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator of the rule that folds modules of exactly this class in place."""
    return _registered(_FOLDS, kind)


def swaps(kind: type[nn.Module], *, on_cpu: bool = False) -> Callable[[Rule], Rule]:
    """Decorator of the rule that makes another module of one of exactly this class, or returns it as it is.

    `on_cpu`: only for float32 weights on a CPU, and after the other rules.
    """
    return _registered(_SWAPS_FOR_CPU if on_cpu else _SWAPS, kind)


@torch.no_grad()
def fuse(
    model: nn.Module,
    image: Tensor | None = None,
    *,
    device: str | torch.device | None = None,
    portable: bool = False,
) -> None:
    """As `Fusible.fuse`, of any module: a wrapper around networks of ours, or a layer."""
    kind = _kind(device)
    networks = [module for module in model.modules() if isinstance(module, Fusible)]
    if portable and any(SWAPPED in network.forms for network in networks):
        raise FusedError("fuse(portable=True)")
    model.eval()
    for module in list(model.modules()):  # a list: folding replaces modules
        if fold := _FOLDS.get(type(module)):
            fold(module)
    forms = {FOLDED}
    if not portable:
        forms.add(SWAPPED)
        _swap(model, _SWAPS, SWAPPED)
        weights = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        if all((kind or w.device.type) == "cpu" and w.dtype == torch.float32 for w in weights):
            forms.add(SWAPPED_FOR_CPU)
            _swap(model, _SWAPS_FOR_CPU, SWAPPED_FOR_CPU)
    for network in networks:
        if not network.fused:
            network.register_load_state_dict_pre_hook(_refuse_weights)
        network.forms |= forms
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    model.eval()  # what took another's place too
    if image is not None:
        fix(model, image)


def _kind(device: str | torch.device | None) -> str | None:
    """Its kind of device; None of none.

    Raises:
        ValueError: PyTorch knows none of this name.
    """
    if device is None:
        return None
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be a device of PyTorch\'s ("cpu", "cuda", ...); got {device!r}') from None


class Fixed(nn.Module):
    """A module whose result depends on sizes alone: remembered for those that `fix` meets, else computed anew."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.results: dict[tuple[Any, ...], Tensor] = {}
        self.remembers = False

    def forward(self, *sizes: Any) -> Tensor:
        result = self.results.get(sizes)
        if result is None:
            result = self.module(*sizes)
            if self.remembers:
                self.results[sizes] = result.contiguous()
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.results = {sizes: fn(result) for sizes, result in self.results.items()}
        return super()._apply(fn, recurse)


def fix(model: nn.Module, image: Tensor) -> None:
    """Let every `Fixed` remember what the model asks it for on this image."""
    fixed = [module for module in model.modules() if isinstance(module, Fixed)]
    if fixed:
        for module in fixed:
            module.remembers = True
        model(image)
        for module in fixed:
            module.remembers = False


def _registered(rules: dict[type[nn.Module], Any], kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        rules[kind] = rule
        return rule

    return register


def _swap(module: nn.Module, rules: dict[type[nn.Module], Callable[[Any], nn.Module]], form: str) -> None:
    """Swap what has a rule, innermost first; networks of this form already stay as they are."""
    if isinstance(module, Fusible) and form in module.forms:
        return
    for name, child in list(module.named_children()):
        if not isinstance(child, Fixed):  # runs once
            _swap(child, rules, form)
        if rule := rules.get(type(child)):
            setattr(module, name, rule(child))


def _refuse_weights(*args: Any) -> None:
    raise FusedError("load_state_dict()")
