"""A layer and its activation in one kernel: the same values, and only where nobody could tell."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.layers import ConvNormAct, GELUTanh, linear, onednn
from hybridzoo.layers.gelu import GELU
from hybridzoo.layers.linear import Linear, linear_act, linear_rows
from hybridzoo.layers.onednn import conv_act

ACTIVATIONS = [
    nn.ReLU(inplace=True),
    nn.Hardswish(inplace=True),
    nn.GELU(),
    nn.GELU("tanh"),
    GELU(),
    GELUTanh(inplace=True),
]
needs_onednn = pytest.mark.skipif(
    onednn.CONVOLUTION is None or onednn.LINEAR is None, reason="this PyTorch was built without oneDNN"
)


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(linear, "SMALL", 0)


@pytest.fixture
def calls(monkeypatch):
    """What went along in each call of oneDNN's kernels."""
    counted = []
    for name in ("CONVOLUTION", "LINEAR"):
        operator = getattr(onednn, name)
        monkeypatch.setattr(onednn, name, lambda *args, o=operator: counted.append(args[-3]) or o(*args))
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
        torch.testing.assert_close(conv_act(conv, x, act), expected)
    assert len(calls) == 1


@needs_onednn
@pytest.mark.parametrize("act", [*ACTIVATIONS, None], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 9, 7), "strided", (0,)], ids=str)
def test_linear_layer_equals_one_after_the_other(calls, act, bias, shape):
    torch.manual_seed(0)
    layer = Linear(8, 16, bias=bias).eval()
    x = torch.randn(3, 8, 11).mT if shape == "strided" else torch.randn(*shape, 8)
    expected = layer(x) if act is None else act(layer(x))
    before = x.clone()
    assert not calls  # there was a gradient to record
    with torch.no_grad():
        out = layer(x) if act is None else linear_act(layer, x, act)
        torch.testing.assert_close(out, expected.detach())
        torch.testing.assert_close(layer.rows(x, 3, 9, act), expected[..., 3:9].detach())
    assert len(calls) == 2
    assert torch.equal(x, before)


@needs_onednn
def test_a_linear_layer_orders_its_weights_once(monkeypatch):
    """And again whenever they have changed; it keeps nothing that a copy, a file or training would carry along."""
    ordered = []
    monkeypatch.setattr(onednn, "reorder", lambda weight, o=onednn.reorder: ordered.append(1) or o(weight))
    layer, plain = Linear(8, 16).eval(), nn.Linear(8, 16)
    x = torch.randn(5, 8)

    def check(times):
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), plain(x))
            torch.testing.assert_close(layer(x), plain(x))
        assert len(ordered) == times

    check(1)
    with torch.no_grad():
        layer.weight.mul_(2)
    check(2)
    layer.load_state_dict(nn.Linear(8, 16).state_dict())
    check(3)
    layer.weight.data.add_(1)  # counts no version
    check(4)
    layer(x).sum().backward()
    assert len(ordered) == 4
    layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert not layer._results
    check(5)
    assert layer._results
    assert not layer.train()._results
    check(5)


@needs_onednn
def test_small_products_are_pytorchs_own(calls, monkeypatch):
    monkeypatch.setattr(linear, "SMALL", 5 * 8 * 16)
    layer = Linear(8, 16).eval()
    with torch.no_grad():
        layer(torch.randn(4, 8))
        layer.rows(torch.randn(5, 8), 0, 15)
        assert not calls
        assert not layer._results
        layer(torch.randn(5, 8))
        linear_act(layer, torch.randn(1, 8), nn.GELU())  # saves a pass
    assert calls == ["none", "gelu"]


@needs_onednn
def test_weights_that_cannot_be_kept_are_not_ordered(calls, monkeypatch):
    """Those that count no versions: to order them for every batch would cost more than it spares."""
    monkeypatch.setattr(onednn, "reorder", lambda weight: pytest.fail("ordered for one product"))
    with torch.inference_mode():
        layer = Linear(8, 16).eval()
        x = torch.randn(5, 8)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert calls


@needs_onednn
def test_a_large_weight_stays_as_it_is(calls, monkeypatch):
    monkeypatch.setattr("hybridzoo.layers.linear.BUDGET", 8 * 16 * 4 - 1)
    layer = Linear(8, 16).eval()
    with torch.no_grad():
        layer(torch.randn(5, 8))
    assert calls
    assert not layer._results


def test_what_stands_in_a_linear_layers_place_is_called():
    """Adapted, quantized, parametrized, watched: for some of its rows too."""
    x, act = torch.randn(5, 8), nn.ReLU()
    seen = []
    watched = Linear(8, 16).eval()
    watched.register_forward_hook(lambda *_: seen.append(1))
    parametrized = nn.utils.parametrizations.weight_norm(Linear(8, 16).eval())
    with torch.no_grad():
        for layer in (nn.Sequential(Linear(8, 16), nn.Tanh()).eval(), nn.Linear(8, 16), Doubled(8, 16), parametrized):
            torch.testing.assert_close(linear_rows(layer, x, 3, 9), layer(x)[:, 3:9])
            torch.testing.assert_close(linear_act(layer, x, act), act(layer(x)))
        linear_rows(watched, x, 3, 9)
        linear_act(watched, x, act)
    assert len(seen) == 2


class Coded(torch.Tensor):
    """What quantizers put in a weight's place; says that it is float32."""


@needs_onednn
def test_weights_of_another_class_are_left_to_that_class(calls):
    layer = Linear(8, 16).eval()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Coded))
    with torch.no_grad():
        assert type(layer(torch.randn(5, 8))) is Coded
    assert not calls


@needs_onednn
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_runs_apart_where_it_must(calls, kind):
    act = nn.ReLU()
    if kind == "conv":
        layer, x, run = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 5, 5), conv_act
        other = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    else:
        layer, x, run = Linear(3, 4).eval(), torch.randn(25, 3), linear_act
        other = Doubled(3, 4)
    assert run(layer, x, act).grad_fn is not None
    with torch.no_grad():
        assert run(layer.double(), x.double(), act).dtype == torch.float64
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert run(layer, x, act).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            run(layer, x, act)
        assert counter.get_total_flops() == 2 * 3 * 4 * 25
        assert not calls
        run(layer, x, nn.SiLU())
        torch.testing.assert_close(run(other, x, act), act(other(x)))
        for watched in (layer, act):
            seen = []
            hook = watched.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            run(layer, x, act)
            assert seen
            hook.remove()
        assert set(calls) <= {"none"}
        run(layer, x, act)
    assert calls[-1] == "relu"


@needs_onednn
def test_a_folded_brick_takes_it(calls):
    brick = ConvNormAct(3, 8, 3, act_layer=nn.ReLU).eval()
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = brick(x)
        assert not calls  # a norm stands between
        torch.testing.assert_close(brick.fuse()(x), expected)
    assert calls
