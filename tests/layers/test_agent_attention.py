"""Agent attention against the published modules, and what it promises at other sizes and grids."""

from __future__ import annotations

import importlib
from pathlib import Path

import goldens
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.checkpoints import convert
from hybridzoo.layers import AgentAttention
from hybridzoo.layers.agent_attention import agent_attention
from hybridzoo.layers.resize import adaptive_pool, resize_map

CORES = [n for n in goldens.names("ops", numeric=True) if n.startswith("agent_core_")]
MODULES = [n for n in goldens.names("ops", numeric=True) if n.startswith("agent_module_")]


def layer_of(**kwargs) -> AgentAttention:
    """A small layer whose tables are large enough to matter."""
    torch.manual_seed(0)
    layer = AgentAttention(16, 2, 3, 8, **kwargs).double()
    for name, parameter in layer.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("name", CORES)
def test_published_operator_values_and_gradients(name):
    data = goldens.numbers("ops", name)
    inputs = [data[k].requires_grad_() for k in ("q", "agent", "k", "v", "bias1", "bias2")]
    out = agent_attention(*inputs)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    for key, tensor in zip(("q", "agent", "k", "v", "bias1", "bias2"), inputs, strict=True):
        goldens.assert_close(tensor.grad, data[f"grad_{key}"])


def ours(data: dict[str, torch.Tensor], group: str) -> dict[str, torch.Tensor]:
    """A module's published parameters, or their gradients, under our names and shapes."""
    prefix = "stages.0.blocks.0.attn."
    published = {prefix + k.removeprefix(group): v for k, v in data.items() if k.startswith(group)}
    return {k.removeprefix(prefix): v for k, v in convert(published, "agent_deit_tiny").items()}


@pytest.mark.parametrize("name", MODULES)
def test_published_module_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    parameters, grads = (ours(data, group) for group in ("param.", "grad."))
    rows, columns = parameters["ah_bias"].shape[2], parameters["aw_bias"].shape[2]
    trained = int(parameters["an_bias"].shape[1] ** 0.5)
    layer = AgentAttention(
        data["x"].shape[-1],
        meta["heads"],
        trained,
        (rows, columns),
        grid=tuple(meta["agent_grid"]),
        class_token="ac_bias" in parameters,
    ).double()
    layer.load_state_dict(parameters)
    x = data["x"].requires_grad_()
    out = layer(x, tuple(meta.get("map_size", meta.get("window"))))
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    for key, parameter in layer.named_parameters():
        goldens.assert_close(parameter.grad, grads[key])


def test_an_empty_batch_is_valid():
    layer = AgentAttention(16, 2)
    assert layer(torch.empty(0, 5, 6, 16)).shape == (0, 5, 6, 16)
    with torch.no_grad():
        assert layer(torch.empty(0, 5, 6, 16)).shape == (0, 5, 6, 16)


def test_a_map_is_its_tokens():
    layer = layer_of()
    x = torch.randn(2, 5, 7, 16, dtype=torch.double)
    torch.testing.assert_close(layer(x).flatten(1, 2), layer(x.flatten(1, 2), (5, 7)))


def test_the_grid_can_be_changed_afterwards():
    """A constant table stays the same constant on any grid, and so does a map of equal tokens."""
    layer = layer_of()
    for name, parameter in layer.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.constant_(parameter, 0.5)
    x = torch.randn(1, 1, 16, dtype=torch.double).expand(1, 54, 16)
    before = layer.eval()(x, (6, 9))
    layer.grid = (5, 2)
    assert layer.biases((6, 9))[0].shape == (2, 10, 54)
    torch.testing.assert_close(layer(x, (6, 9)), before)


def test_large_maps_fit_into_float16():
    torch.manual_seed(0)
    layer = AgentAttention(64, 2, 3, 14).eval()
    x = 3 * torch.randn(1, 128, 128, 1) + torch.randn(1, 128, 128, 64)
    with torch.no_grad():
        torch.nn.init.normal_(layer.qkv.weight, std=0.1)
        expected = layer(x)
        with torch.autocast("cpu", torch.float16):
            outs = [layer(x), layer.half()(x.half())]
    for out in outs:
        assert (out.float() - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize(("old", "new"), [((7, 7), (14, 9)), ((8, 8), (3, 8)), ((5, 5), (5, 1)), ((4, 6), (4, 6))])
def test_resize_is_bilinear_with_half_pixel_centres(old, new):
    x = torch.randn(2, 3, *old, dtype=torch.double, requires_grad=True)
    expected = interpolate(x, new, mode="bilinear", align_corners=False)
    out, grad = resize_map(x, new), torch.randn_like(expected)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, x, grad))


def test_autocast_rounds_no_table():
    x = torch.randn(2, 3, 7, 7)
    expected = interpolate(x, (14, 9), mode="bilinear", align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resize_map(x, (14, 9)), expected)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "for compilers"])
@pytest.mark.parametrize(
    ("old", "new"), [((56, 14), (3, 9)), ((5, 7), (7, 7)), ((1, 2), (3, 4)), ((6, 6), (3, 2)), ((8, 8), (3, 3))]
)
def test_pooling_is_adaptive_average_pooling(monkeypatch, old, new, compiles):
    x = torch.randn(2, *old, 4, dtype=torch.double)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), new).permute(0, 2, 3, 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiles)
    torch.testing.assert_close(adaptive_pool(x, new), expected)


@torch.library.custom_op("test_agent_attention::fused", mutates_args=())
def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Stands for PyTorch's fused attention on a GPU, one operator in each direction; a CPU has none with a gradient."""
    return query.new_zeros(query.shape)


@torch.library.custom_op("test_agent_attention::fused_backward", mutates_args=())
def fused_backward(grad: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(x) for x in inputs]


fused.register_autograd(
    lambda ctx, grad: tuple(fused_backward(grad, ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Launched(TorchDispatchMode):
    """Counts operators that compute something; views and fresh memory launch no kernel on a GPU."""

    NOTHING = ("_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not (operator.is_view or operator.overloadpacket.__name__ in self.NOTHING)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("side", "agents", "class_token"),
    [(14, 7, True), (14, 9, True), (56, 3, False), (28, 4, False), (14, 7, False), (7, 7, False)],
)
def test_a_layer_launches_no_more_than_its_plain_form(monkeypatch, side, agents, class_token, trains):
    """At the published sizes, also where cells of pooling differ (56 / 3)."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    attend = lambda q, k, v, bias, *rest, **options: fused(q, k, v, bias.expand(len(q), -1, -1, -1))  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    plain = importlib.import_module("benchmarks.plain.hosts").PlainAgent
    layer = AgentAttention(16, 2, agents, side, class_token=class_token)
    x = torch.randn(1, side * side + class_token, 16, requires_grad=trains)
    counts = []
    for form in (layer, plain(layer)):
        layer.zero_grad()
        with torch.set_grad_enabled(trains), Launched() as launched:
            out = form(x, (side, side))
            if trains:
                out.sum().backward()
        counts.append(launched.count)
    ours, theirs = counts
    assert 10 < ours <= theirs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dim=15), "dim must be a multiple of num_heads"),
        (dict(agents=0), "agents must be positive"),
        (dict(table_size=(3, 0)), "table_size must be positive"),
        (dict(grid=(0, 2)), "grid must be positive"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(**{"dim": 16, "num_heads": 2, **kwargs})


def test_tokens_without_their_size_are_refused():
    layer = AgentAttention(16, 2, class_token=True)
    with pytest.raises(ValueError, match="31 tokens less the class token"):
        layer(torch.randn(1, 31, 16), (5, 7))
    with pytest.raises(ValueError, match="size must be"):
        AgentAttention(16, 2)(torch.randn(1, 31, 16))
