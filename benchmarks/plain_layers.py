"""Linear layers, GELUs and MLPs as PyTorch has them, for the plain networks that ours are compared with."""

from __future__ import annotations

from torch import Tensor, nn

from hybridzoo.layers.gelu import GELU, GELUTanh
from hybridzoo.layers.linear import Linear
from hybridzoo.layers.mlp import Mlp


class PlainMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def use_plain_layers(model: nn.Module) -> nn.Module:
    """Replace all of ours in place; parameters and their names stay."""
    for name, module in list(model.named_modules()):
        if type(module) is Mlp:
            module.__class__ = PlainMlp
        elif (plain := _plain(module)) is not None:
            model.set_submodule(name, plain)
    return model


def _plain(module: nn.Module) -> nn.Module | None:
    if type(module) is Linear:
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        return plain
    if type(module) is GELU:
        return nn.GELU()
    return nn.GELU("tanh") if type(module) is GELUTanh else None
