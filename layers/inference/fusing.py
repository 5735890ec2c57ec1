"""Fusing: merges modules for evaluation, so that the network computes the same result faster.

It works in place and cannot be undone: folded weights are no longer those of a checkpoint, and training them would
train another function. A rule applies to one class of module: `folds` changes a module in place, `swaps` replaces it,
from the innermost modules outwards. Rules for layers are in this folder, rules for families in
`hybridzoo.backbones.fusing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from hybridzoo.kernels.open_sizes import is_open

if TYPE_CHECKING:
    from typing_extensions import Self

Rule = TypeVar("Rule", bound=Callable[[Any], Any])

_FOLDS: dict[type[nn.Module], Callable[[Any], None]] = {}
_SWAPS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}
_SWAPS_FOR_CPU: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}
FOLDED, SWAPPED, SWAPPED_FOR_CPU = "folded", "swapped", "swapped for a CPU"
KNOWN_LIBRARIES = ("torch.nn.modules.", "timm.layers.", "hybridzoo.")  # whose modules the rules were written for


class FusedError(RuntimeError):
    """A fused network cannot do what was asked; only an unfused one can."""

    def __init__(self, asked: str) -> None:
        super().__init__(
            f"{asked}: this network is fused, for inference only; make it anew and load its weights, or fuse a"
            " copy.deepcopy() of the one that is still needed"
        )


class Fusible(nn.Module):
    """A network with `fuse()`.

    Attributes:
        forms: what `fuse()` has done: "folded", "swapped", "swapped for a CPU"; empty before. Afterwards `train()`,
            `load_state_dict()` (of parts too) and `reset_classifier()` raise `FusedError`, and there are no parameters
            for an optimizer.
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
        """Fold norms, and replace modules by faster ones that compute the same; in place and permanently.

        On a CPU in float32, linear layers and convolutions also use oneDNN's kernels, with packed weights and fused
        activations, and large blocks process a few images at a time. A network fused for one device also runs on
        another, and in another dtype, with PyTorch's kernels; copies and pickles pack their weights again. Calling it
        again gives the tables for another image size, or the forms for another device.

        What other libraries changed stays in effect. Pruning and parametrizations are made permanent. Modules with
        adapters, quantized weights, hooks or parts of other classes are not replaced, so that they are not faster.
        Dropout and batch statistics are gone (except with `portable`): `train()` of a part changes no results.

        All weights become buffers: `parameters()` is empty, and PyTorch's optimizers and timm's `create_optimizer_v2`
        raise their own `ValueError` ("optimizer got an empty parameter list"). The message is PyTorch's: an optimizer
        sees the list alone, and `parameters()` must not raise, because tools call it to count, print and move.
        During training, fuse a `copy.deepcopy()` of the network that has the averaged weights: EMA code would find no
        parameters in a fused one.

        Args:
            image_size: size in pixels for which position tables are stored, one number or (height, width); by default
                the size that the weights were published for. Other sizes work, and compute their tables in each call.
            device: where the network will run, "cpu", "cuda", ...; it is not moved there. Default: its present device.
            portable: only fold norms, for export: the result has operators that every runtime knows.

        Returns:
            The network itself, in evaluation.

        Raises:
            ValueError: unknown type of device.
            FusedError: `portable`, but the network is already fused in another way.
        """
        fuse(self, None if portable else self.example_image(image_size), device=device, portable=portable)
        return self

    def example_image(self, size: int | tuple[int, int] | None) -> Tensor | None:
        """An image with which position tables are computed, if the network has any."""
        return None

    def train(self, mode: bool = True) -> Self:
        if mode and self.fused:
            raise FusedError("train()")
        return super().train(mode)


def folds(kind: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Decorator of the rule that folds modules of exactly this class in place."""
    return _registered(_FOLDS, kind)


def swaps(kind: type[nn.Module], *, on_cpu: bool = False) -> Callable[[Rule], Rule]:
    """Decorator of the rule that replaces modules of exactly this class, or returns them unchanged.

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
    """Like `Fusible.fuse`, for any module: a wrapper around our networks, or a layer."""
    kind = _kind(device)
    networks = [module for module in model.modules() if isinstance(module, Fusible)]
    if portable and any(SWAPPED in network.forms for network in networks):
        raise FusedError("fuse(portable=True)")
    model.eval()
    _make_permanent(model)
    for module in list(_without(FOLDED, model)):  # a list: folding replaces modules
        if (fold := _FOLDS.get(type(module))) and _unchanged(module):
            fold(module)
    forms = {FOLDED}
    if not portable:
        forms.add(SWAPPED)
        _swap(model, _SWAPS, SWAPPED)
        weights = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
        if all((kind or w.device.type) == "cpu" and w.dtype == torch.float32 for w in weights):
            forms.add(SWAPPED_FOR_CPU)
            _swap(model, _SWAPS_FOR_CPU, SWAPPED_FOR_CPU)
    for network in networks:
        if not network.fused:
            for module in network.modules():  # parts too: their weights are packed, and their tables stored
                module.register_load_state_dict_pre_hook(_refuse_weights)
        network.forms |= forms
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    model.eval()  # also modules that replaced others
    if image is not None:
        fix(model, image)


def _kind(device: str | torch.device | None) -> str | None:
    """The type of a device; None for None.

    Raises:
        ValueError: PyTorch has no device of this name.
    """
    if device is None:
        return None
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be a device of PyTorch\'s ("cpu", "cuda", ...); got {device!r}') from None


class Fixed(nn.Module):
    """A module whose result depends on sizes only: stored for the sizes that `fix` sees, otherwise computed.

    Stored results follow the network to another device and dtype, whatever of these is passed along with the sizes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.results: dict[tuple[Any, ...], Tensor] = {}
        self.remembers = False

    def forward(self, *given: Any) -> Tensor:
        sizes = tuple(value for value in given if not isinstance(value, torch.dtype | torch.device))
        numbers = [n for size in sizes for n in (size if isinstance(size, tuple) else (size,))]
        result = None if is_open(*numbers) else self.results.get(sizes)
        if result is None:
            result = self.module(*given)
            if self.remembers:
                self.results[sizes] = result.contiguous()
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.results = {sizes: fn(result) for sizes, result in self.results.items()}
        return super()._apply(fn, recurse)


def fix(model: nn.Module, image: Tensor) -> None:
    """Let every `Fixed` store its result for this image."""
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


def _without(form: str, module: nn.Module) -> Iterator[nn.Module]:
    """The module and its parts, except networks that have this form already."""
    if not (isinstance(module, Fusible) and form in module.forms):
        yield module
        for child in module.children():
            yield from _without(form, child)


def _make_permanent(model: nn.Module) -> None:
    """Store the weights that pruning and parametrizations (weight norm, …) compute before or in every call."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                parametrize.remove_parametrizations(module, name)
        for name, _ in list(module.named_parameters(recurse=False)):
            if name.endswith("_orig") and hasattr(module, name.removesuffix("_orig") + "_mask"):
                prune.remove(module, name.removesuffix("_orig"))


def _unchanged(module: nn.Module) -> bool:
    """Whether a module and its parts compute what their classes say, so that a rule may use their weights instead."""
    return all(
        type(part).__module__.startswith(KNOWN_LIBRARIES)
        and "forward" not in vars(part)
        # Without a public name: hooks may change inputs, weights and results.
        and not (part._forward_hooks or part._forward_pre_hooks)
        and all(type(t) in (nn.Parameter, Tensor) for t in (*part.parameters(False), *part.buffers(False)))
        for part in module.modules()
    )


def _swap(module: nn.Module, rules: dict[type[nn.Module], Callable[[Any], nn.Module]], form: str) -> None:
    """Replace modules that have a rule, innermost first; networks that have this form already are unchanged."""
    if isinstance(module, Fusible) and form in module.forms:
        return
    for name, child in list(module.named_children()):
        if not isinstance(child, Fixed):  # runs once
            _swap(child, rules, form)
        if (rule := rules.get(type(child))) and _unchanged(child):
            setattr(module, name, rule(child))


def _refuse_weights(*args: Any) -> None:
    raise FusedError("load_state_dict()")
