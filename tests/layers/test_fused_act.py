"""A layer and its activation in one kernel: the same values, and only where nobody could tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.layers import ConvNormAct, GELUTanh, fused_act
from hybridzoo.layers.fused_act import conv_act, linear_act
from hybridzoo.layers.gelu import GELU

ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.Hardswish(inplace=True),
    nn.GELU(),
    nn.GELU("tanh"),
    GELU(),
    GELUTanh(inplace=True),
]
needs_onednn = pytest.mark.skipif(
    fused_act._CONVOLUTION is None or fused_act._LINEAR is None, reason="this PyTorch was built without oneDNN"
)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused kernels ran."""
    counted = []
    for name in ("_CONVOLUTION", "_LINEAR"):
        operator = getattr(fused_act, name)
        monkeypatch.setattr(fused_act, name, lambda *args, o=operator: counted.append(1) or o(*args))
    return counted


@needs_onednn
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("geometry", [dict(), dict(kernel_size=3, stride=2, padding=1), dict(groups=8, bias=False)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_equals_one_after_the_other(calls, act, geometry, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, **{"kernel_size": 1, **geometry})
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    expected = act(conv(x)).detach()
    with torch.no_grad():
        torch.testing.assert_close(conv_act(conv, act, x), expected)
    assert len(calls) == 1


@needs_onednn
@pytest.mark.parametrize("act", [*ACTIVATIONS, None], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 9, 7), "strided", (0,)], ids=str)
def test_linear_layer_equals_one_after_the_other(calls, act, bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(8, 16, bias=bias)
    x = torch.randn(3, 8, 11).mT if shape == "strided" else torch.randn(*shape, 8)
    expected = linear(x) if act is None else act(linear(x))
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(linear_act(linear, act, x), expected.detach())
    assert len(calls) == 1
    assert torch.equal(x, before)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@needs_onednn
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_runs_apart_where_it_must(calls, kind):
    act = nn.ReLU()
    if kind == "conv":
        layer, x, run = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 5, 5), conv_act
        other = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    else:
        layer, x, run = nn.Linear(3, 4), torch.randn(25, 3), linear_act
        other = Doubled(3, 4)
    assert run(layer, act, x).grad_fn is not None
    with torch.no_grad():
        assert run(layer.double(), act, x.double()).dtype == torch.float64
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert run(layer, act, x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            run(layer, act, x)
        assert counter.get_total_flops() == 2 * 3 * 4 * 25
        run(layer, nn.SiLU(), x)
        torch.testing.assert_close(run(other, act, x), act(other(x)))
        for watched in (layer, act):
            seen = []
            hook = watched.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            run(layer, act, x)
            assert seen
            hook.remove()
        assert not calls
        run(layer, act, x)
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
