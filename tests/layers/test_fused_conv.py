"""A convolution and its activation in one kernel: the same values, and only where nobody could tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.layers import ConvNormAct, GELUTanh, fused_conv
from hybridzoo.layers.fused_conv import conv_act

ACTIVATIONS = [nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.GELU(), nn.GELU("tanh"), GELUTanh(inplace=True)]
needs_onednn = pytest.mark.skipif(fused_conv._OPERATOR is None, reason="this PyTorch was built without oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """How often the fused kernel ran."""
    counted, operator = [], fused_conv._OPERATOR
    monkeypatch.setattr(fused_conv, "_OPERATOR", lambda *args: counted.append(1) or operator(*args))
    return counted


@needs_onednn
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("geometry", [dict(), dict(kernel_size=3, stride=2, padding=1), dict(groups=8, bias=False)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_one_after_the_other(calls, act, geometry, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, **{"kernel_size": 1, **geometry})
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    expected = act(conv(x)).detach()
    with torch.no_grad():
        torch.testing.assert_close(conv_act(conv, act, x), expected)
    assert len(calls) == 1


@needs_onednn
def test_runs_apart_where_it_must(calls):
    conv, act, x = nn.Conv2d(3, 4, 1), nn.ReLU(), torch.randn(1, 3, 5, 5)
    assert conv_act(conv, act, x).grad_fn is not None
    with torch.no_grad():
        assert conv_act(conv.double(), act, x.double()).dtype == torch.float64
        conv.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert conv_act(conv, act, x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            conv_act(conv, act, x)
        assert counter.get_total_flops() == 2 * 3 * 4 * 25
        conv_act(conv, nn.SiLU(), x)
        conv_act(conv, nn.Identity(), x)
        conv_act(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), act, x)
        seen = []
        hook = act.register_forward_hook(lambda *_: seen.append(1))
        conv_act(conv, act, x)
        assert seen
        assert not calls
        hook.remove()
        conv_act(conv, act, x)
    assert len(calls) == 1


@needs_onednn
def test_a_folded_brick_takes_it(calls):
    brick = ConvNormAct(3, 8, 3, act_layer=nn.ReLU).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = brick(x)
        assert not calls  # a norm stands between
        torch.testing.assert_close(brick.fuse()(x), expected)
    assert calls
