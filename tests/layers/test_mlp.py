"""The MLP: timm's numbers, a few tokens at a time where memory is dear."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

import hybridzoo.layers.slicing as slicing
from hybridzoo.layers import GELUTanh
from hybridzoo.layers.gelu import GELU
from hybridzoo.layers.mlp import Mlp


@pytest.mark.parametrize("act", [GELU, GELUTanh, nn.SiLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_timms_mlp_sliced_or_whole_and_leaves_its_input(monkeypatch, act, dtype):
    torch.manual_seed(0)
    ours, theirs = Mlp(8, 24, act).to(dtype), timm.layers.Mlp(8, 24, act_layer=act).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 7, 8, dtype=dtype)
    before = x.clone()
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected)
    ours.eval()
    for limit in (slicing.SLICE, 24 * 20):
        monkeypatch.setattr(slicing, "SLICE", limit)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected)
    assert torch.equal(x, before)
    rows = []
    ours.fc1.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected)
    assert sum(rows) == 70
    assert len(rows) == -(-70 // 20)


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_hooks_keep_is_not_overwritten(everywhere):
    torch.manual_seed(0)
    mlp, x, kept = Mlp(8, 24).eval(), torch.randn(5, 8), []

    def keep(module, args, out):
        if module is mlp.fc1:
            kept.append(out)

    register = nn.modules.module.register_module_forward_hook if everywhere else mlp.fc1.register_forward_hook
    hook = register(keep)
    try:
        with torch.no_grad():
            mlp(x)
    finally:
        hook.remove()
    torch.testing.assert_close(kept[0], mlp.fc1(x))
