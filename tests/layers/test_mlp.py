"""The hosts' MLP: timm's numbers, token by token where memory is dear."""

from __future__ import annotations

import timm.layers
import torch

import hybridzoo.layers.slicing as slicing
from hybridzoo.layers.mlp import Mlp


def test_equals_timms_mlp_sliced_or_whole_and_leaves_its_input(monkeypatch):
    torch.manual_seed(0)
    ours, theirs = Mlp(8, 24).double(), timm.layers.Mlp(8, 24).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 7, 8, dtype=torch.double)
    before = x.clone()
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected)
    rows = []
    ours.fc1.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    ours.eval()
    for limit in (slicing.SLICE, 24 * 20):
        monkeypatch.setattr(slicing, "SLICE", limit)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected)
    assert rows[0] == 70
    assert sum(rows[1:]) == 70
    assert 1 < len(rows[1:]) == -(-70 // 20)
    assert torch.equal(x, before)
