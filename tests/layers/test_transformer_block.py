"""The block around any attention."""

from __future__ import annotations

import torch
from timm.layers import LayerScale
from torch import nn

from hybridzoo.layers import TransformerBlock


class Shifted(nn.Module):
    """An attention that shows what it was given."""

    def forward(self, x, by, *, times=1):
        return times * x + by


def test_both_updates_are_added_and_arguments_are_passed_on():
    torch.manual_seed(0)
    block = TransformerBlock(8, Shifted(), 2.5, eps=0.1, layer_scale=0.5).double()
    assert block.mlp.fc1.out_features == 20
    x = torch.randn(3, 4, 8, dtype=torch.double)
    norm = lambda x: torch.nn.functional.layer_norm(x, (8,), eps=0.1)  # noqa: E731
    middle = x + 0.5 * (3 * norm(x) + 2.0)
    expected = middle + 0.5 * block.mlp(norm(middle))
    torch.testing.assert_close(block(x, 2.0, times=3), expected)


def test_layer_scale_and_stochastic_depth_are_options():
    plain = TransformerBlock(8, Shifted())
    assert not any(isinstance(m, LayerScale) for m in plain.modules())
    assert plain.norm1.eps == 1e-5
    block = TransformerBlock(8, Shifted(), drop_path=0.5).train()
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8)
    kept = (block(x, 1.0) != x).flatten(1).any(1).sum().item()  # at least one of the two updates
    assert 35 < kept < 62
    assert (block.eval()(x, 1.0) != x).flatten(1).any(1).all()
