"""Parameter groups as in timm, and mixed precision that also runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.optim.lamb import Lamb
from torch import nn

from hybridzoo.train.errors import UserError

OPTIMIZERS.register_module(module=Lamb)


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """bfloat16 autocast on any device. bfloat16 has float32's range, so the loss needs no scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


def use_amp(optim_wrapper: dict[str, Any], dtype: str = "bfloat16") -> None:
    """Turn mixed precision on in the config of an optimizer wrapper, in place.

    Args:
        optim_wrapper: the config; its ``type`` is replaced.
        dtype: ``"bfloat16"`` (any device) or ``"float16"`` (GPU, with a dynamic loss scale).

    Raises:
        UserError: an unknown dtype, or float16 without a GPU.
    """
    if dtype == "bfloat16":
        optim_wrapper.pop("loss_scale", None)
        optim_wrapper["type"] = "AutocastOptimWrapper"
    elif dtype == "float16":
        if not torch.cuda.is_available():
            raise UserError("amp_dtype='float16' needs a GPU: use amp_dtype=bfloat16 here")
        optim_wrapper.setdefault("loss_scale", "dynamic")
        optim_wrapper.update(type="AmpOptimWrapper", dtype="float16")
    else:
        raise UserError(f"amp_dtype={dtype!r}: choose bfloat16 or float16")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmParamGroups:
    """Weight decay and layer-wise learning rates from the backbone's own ``no_weight_decay`` and ``group_matcher``.

    Used in a config as::

        optim_wrapper = dict(
            constructor="TimmParamGroups",
            optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay=0.8),
        )

    Biases and other 1-D parameters are not decayed.  A detector's or segmentor's neck and heads learn at the full rate.

    Args:
        optim_wrapper_cfg: config of the wrapper, with ``optimizer``.
        paramwise_cfg: ``layer_decay``: factor from each layer to the one below it, counted from the head, default none;
            ``decay_1d``: also decay 1-D parameters, default False.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        options = dict(paramwise_cfg or {})
        self.layer_decay: float | None = options.pop("layer_decay", None)
        self.exclude_1d = not options.pop("decay_1d", False)
        if options:
            raise UserError(
                f"paramwise_cfg {', '.join(options)}: unknown; TimmParamGroups takes layer_decay and decay_1d"
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)  # DDP
        optimizer = dict(self.wrapper.pop("optimizer"))
        groups = self.groups(model, float(optimizer.get("weight_decay", 0.0)))
        for group in groups:
            group["lr"] = optimizer["lr"] * group.pop("lr_scale", 1.0)
        built = OPTIMIZERS.build({**optimizer, "params": groups})
        self.wrapper.setdefault("type", "OptimWrapper")
        return OPTIM_WRAPPERS.build(self.wrapper, default_args={"optimizer": built})

    def groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups with ``params``, ``weight_decay`` and, below a full rate, ``lr_scale``."""
        prefix, trunk = _trunk(model)
        skip = set(getattr(trunk, "no_weight_decay", lambda: ())())
        if self.layer_decay is None:
            skip = {prefix + name for name in skip}
            return param_groups_weight_decay(model, weight_decay, self.exclude_1d, no_weight_decay_list=skip)
        if not hasattr(trunk, "group_matcher"):
            raise UserError(
                f"layer_decay={self.layer_decay}: {type(trunk).__name__} has no group_matcher, leave it out"
            )
        groups = param_groups_layer_decay(
            trunk,
            weight_decay,
            no_weight_decay_list=skip,
            weight_decay_exclude_1d=self.exclude_1d,
            layer_decay=self.layer_decay,
        )
        inside = {id(parameter) for group in groups for parameter in group["params"]}
        rest = nn.Module()
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad and id(p) not in inside):
            rest.register_parameter(str(index), parameter)
        if any(True for _ in rest.parameters()):
            # The head is not part of the trunk here: timm gave the last layer the full rate, which belongs to the head.
            for group in groups:
                group["lr_scale"] *= self.layer_decay
            groups += param_groups_weight_decay(rest, weight_decay, self.exclude_1d)
        return groups


def _trunk(model: nn.Module) -> tuple[str, nn.Module]:
    """(prefix of its parameters' names, the backbone) of a classifier, detector or segmentor."""
    for name in ("backbone", "model"):
        if isinstance(getattr(model, name, None), nn.Module):
            return f"{name}.", getattr(model, name)
    return "", model
