"""Evaluation a few images at a time, and the tanh GELU that goes with it, against the plain computation."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from hybridzoo.layers import ConvNormAct, GELUTanh, gelu, slicing
from hybridzoo.layers.slicing import SLICE, by_images, lean, watched

SHALLOW = {
    "maxvit_tiny": dict(depths=(1, 1, 1, 1)),
    "fastervit_0": dict(depths=(1, 1, 2, 1), dim=16, num_heads=(2, 4)),
}


class Counted:
    """Doubles its argument and remembers how many images came at a time."""

    def __init__(self):
        self.seen: list[int] = []

    def __call__(self, x):
        self.seen.append(len(x))
        return 2 * x


@pytest.mark.parametrize(
    ("batch", "elements", "slices"),
    [
        (8, SLICE // 8, [8]),
        (8, SLICE // 4, [4, 4]),
        (8, SLICE // 3, [3, 3, 2]),
        (3, 10 * SLICE, [1, 1, 1]),
        (0, SLICE, [0]),
        (2, 0, [2]),
    ],
)
def test_slices_are_as_large_as_the_cache_allows(batch, elements, slices):
    x, function = torch.randn(batch, 2, 5, 3), Counted()
    with torch.no_grad():
        assert torch.equal(by_images(function, x, elements, training=False), 2 * x)
    assert function.seen == slices


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_batches_stay_whole_where_a_gradient_batch_statistics_or_a_graph_need_them():
    x, function = torch.randn(4, 3), Counted()
    by_images(function, x, SLICE, training=False)
    with torch.no_grad():
        by_images(function, x, SLICE, training=True)
        by_images(function, x.to("meta"), SLICE, training=False)
    assert function.seen == [4, 4, 4]
    with torch.no_grad():
        assert lean(x)
        assert not torch.compile(lean, backend="eager", fullgraph=True)(x)
        traced = torch.jit.trace(lambda t: by_images(torch.neg, t, SLICE, training=False), x)
        assert "aten::neg" in str(traced.graph)
        assert "aten::cat" not in str(traced.graph)
    assert not lean(x)


def test_batches_inside_a_transform_stay_whole():
    x, function = torch.randn(3, 4, 3), Counted()
    with torch.no_grad():
        torch.func.vmap(lambda x: by_images(function, x, SLICE, training=False))(x)
    assert function.seen == [4]


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(print),
        lambda m: m.register_forward_pre_hook(print),
        lambda m: nn.modules.module.register_module_forward_hook(print),
        lambda m: nn.modules.module.register_module_forward_pre_hook(print),
    ],
)
def test_hooks_watch(register):
    module, other = nn.ReLU(), nn.ReLU()
    assert not watched(module, other)
    handle = register(other)
    assert watched(module, other)
    handle.remove()
    assert not watched(module, other)


def test_what_a_hook_kept_of_a_norm_is_not_overwritten():
    brick, kept = ConvNormAct(3, 8, act_layer=lambda: nn.ReLU(inplace=True)), []
    brick.norm.register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        brick(torch.randn(1, 3, 8, 8))
    assert kept[0].min() < 0


@pytest.mark.parametrize("name", SHALLOW)
def test_models_compute_the_same_in_slices(name, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **SHALLOW[name]).double()
    x = torch.randn(3, 3, 90, 70, dtype=torch.float64)
    with torch.no_grad():
        model.train()(x)  # running statistics that are not a fresh norm's
    block = model.stages[0].blocks[0]
    seen = []
    (block.conv if name == "maxvit_tiny" else block.conv1).register_forward_hook(lambda m, i, o: seen.append(len(o)))
    expected = model.eval()(x).detach()
    monkeypatch.setattr(slicing, "SLICE", 1)
    monkeypatch.setattr(gelu, "SLICE", 1000)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        assert seen == [3, 1, 1, 1]
        assert model.train()(x).shape == (3, 5)
    assert seen == [3, 1, 1, 1, 3]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["contiguous", "channels-last", "strided", "small"])
def test_gelu_equals_pytorchs(order, dtype, inplace):
    x = 4 * torch.randn(2, 33, 64, 65, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, :4] = torch.tensor([-1e4, 1e4, 0.0, float("inf")])
    x = x.to(dtype)
    if order == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif order != "contiguous":
        x = x[:, :, ::2] if order == "strided" else x[:, :1, :2]
    assert (x.numel() >= gelu.SLICE) == (order != "small")
    expected, given = F.gelu(x, approximate="tanh"), x.clone()
    with torch.no_grad():
        out = GELUTanh(inplace)(x)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride()
    if not inplace:
        assert torch.equal(x, given)


def test_gelu_keeps_its_input_for_the_backward_pass():
    x = torch.randn(300, 300, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    GELUTanh(inplace=True)(1 * x).sum().backward()
    F.gelu(reference, approximate="tanh").sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_gelu_overwrites_only_if_asked_and_compiles_to_pytorchs():
    x = torch.randn(300, 300)
    with torch.no_grad():
        assert GELUTanh()(x) is not x
        assert GELUTanh(inplace=True)(x) is x
    exported = torch.export.export(nn.Sequential(GELUTanh(inplace=True)), (x,))
    assert "aten.gelu.default" in str(exported.graph)
    assert repr(GELUTanh(inplace=True)) == "GELUTanh(inplace=True)"
