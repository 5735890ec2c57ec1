"""Deformable attention against the published modules and operators, and what it promises at other sizes."""

from __future__ import annotations

import goldens
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridzoo.checkpoints import convert
from hybridzoo.layers import DeformableAttention, DepthwiseMlp, ShiftedWindowAttention, deformable_attention, sampling
from hybridzoo.layers.heads import softmax_attention

OPS = goldens.names("ops", numeric=True)
CORES = [n for n in OPS if n.startswith("deform_attn_core_")]
MODULES = [n for n in OPS if n.startswith("deform_attn_module_")]
BLOCK = "stages.3.attns.1."  # a deformable one in both generations


def reference_map(x, places):
    """`sample_map` as the sum over all entries, each with the weight that its distance along both axes leaves it."""
    weight = reading(places[..., 0], x.shape[1])[..., :, None] * reading(places[..., 1], x.shape[2])[..., None, :]
    groups = x.unflatten(3, (places.shape[1], -1))
    return torch.einsum("bgkhw,bhwgc->bkgc", weight, groups).flatten(2)


def reference_differences(table, rows, columns, places):
    """`sample_differences`, likewise."""
    down, along = ((line[:, None] - places[:, :, None, :, axis]) / 2 for axis, line in enumerate((rows, columns)))
    down, along = (
        reading(down, table.shape[1]),
        reading(along, table.shape[2]),
    )
    by_group = table.unflatten(0, (places.shape[1], -1))
    return torch.einsum("bgikh,bgjkw,gnhw->bgnijk", down, along, by_group).flatten(3, 4).flatten(1, 2)


def reading(coordinate, count):
    """How much a linear reading at each coordinate takes of each of an axis' entries, `(..., count)`."""
    position = (coordinate[..., None] + 1) / 2 * (count - 1)
    return (1 - (position - torch.arange(count)).abs()).clamp(min=0)


def test_published_sampling_values_and_gradients():
    data = goldens.numbers("ops", "deform_sample_2x3x7x9_m12")
    x, places = data["x"].requires_grad_(), data["pos"].requires_grad_()
    out = sampling.sample_map(x.permute(0, 2, 3, 1), places[:, None])
    goldens.assert_close(out, data["out"].transpose(1, 2))
    out.backward(data["grad_out"].transpose(1, 2))
    goldens.assert_close(x.grad, data["grad_x"])
    goldens.assert_close(places.grad, data["grad_pos"])


@pytest.mark.parametrize("name", CORES)
def test_published_operator_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    names = ("q", "k", "v", "rpe_table", "pos")
    query, key, value, table, places = inputs = [data[n].requires_grad_() for n in names]
    line = deformable_attention._centres if "_v1_" in name else deformable_attention._corners
    rows, columns = line(meta["H"], query), line(meta["W"], query)
    bias = sampling.sample_differences(table, rows, columns, places)
    out = softmax_attention(query, key, value, bias)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    for tensor, n in zip(inputs, names, strict=True):
        goldens.assert_close(tensor.grad, data[f"grad_{n}"])


def ours(data: dict[str, torch.Tensor], group: str, model: str, block: str) -> dict[str, torch.Tensor]:
    """A module's published parameters, or their gradients, under our names and shapes."""
    published = {block + k.removeprefix(group): v for k, v in data.items() if k.startswith(group)}
    return {k.partition(".attn." if "attns" in block else ".mlp.")[2]: v for k, v in convert(published, model).items()}


def assert_published(layer, data, model, block):
    """NCHW outside, as published."""
    parameters, grads = (ours(data, group, model, block) for group in ("param.", "grad."))
    layer = layer.double()
    layer.load_state_dict(parameters)
    x = data["x"].requires_grad_()
    out = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    assert grads.keys() == parameters.keys()
    for key, grad in grads.items():
        got = layer.get_parameter(key).grad
        if key == "key.bias":  # adds the same to all scores of a query: no gradient but rounding
            assert got.abs().max() < 1e-12
        else:
            goldens.assert_close(got, grad)


@pytest.mark.parametrize("name", MODULES)
def test_published_module_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    first = "_v1_" in name
    dim, size = data["x"].shape[1], (data["param.rpe_table"].shape[1] + 1) // 2
    numbers = dim, meta["heads"], meta["groups"], size, meta["stride"], meta["offset_kernel"]
    layer = DeformableAttention(*numbers, offset_range=1.0 if first else None)
    assert_published(layer, data, "dat_tiny" if first else "dat_plus_tiny", BLOCK)
    if "pos" in data:
        with torch.no_grad():
            goldens.assert_close(layer.places(layer.query(data["x"].permute(0, 2, 3, 1))), data["pos"])


def test_published_shifted_windows_and_mlp():
    data = goldens.numbers("ops", "dat_window_attn_shift_1x14x14_c16_h2_w7")
    assert_published(ShiftedWindowAttention(16, 2, 7, shift=4), data, "dat_tiny", "stages.0.attns.1.")
    data = goldens.numbers("ops", "dat_mlp_conv_1x6x7_c8")
    assert_published(DepthwiseMlp(8, 32, residual=True), data, "dat_plus_tiny", "stages.0.mlps.0.")


@given(
    heads=st.integers(1, 3),
    groups=st.integers(1, 2),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    entries=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    keys=st.integers(1, 4),
    reach=st.sampled_from((0.5, 1.0, 3.0)),
    seed=st.integers(0, 2**16),
)
def test_sampling_is_bilinear(heads, groups, sides, entries, keys, reach, seed):
    """At places beyond the map too."""
    torch.manual_seed(seed)
    table = torch.randn(heads * groups, *entries, dtype=torch.float64)
    x = torch.randn(2, *sides, groups * heads, dtype=torch.float64)
    places = reach * (2 * torch.rand(2, groups, keys, 2, dtype=torch.float64) - 1)
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in sides)
    for functions, given_ in (
        ((sampling.sample_map, reference_map), (x,)),
        ((sampling.sample_differences, reference_differences), (table, rows, columns)),
    ):
        results = []
        for function in functions:
            inputs = [t.clone().requires_grad_() for t in (given_[0], places)]
            out = function(inputs[0], *given_[1:], inputs[1])
            out.square().sum().backward()
            results.append((out, *(t.grad for t in inputs)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def layer_of(**kwargs) -> DeformableAttention:
    """A small layer whose table and offsets are large enough to matter."""
    torch.manual_seed(0)
    layer = DeformableAttention(16, 4, 2, 5, **kwargs)
    torch.nn.init.normal_(layer.bias.table)
    return layer


@pytest.mark.parametrize("offset_range", [None, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 1), (9, 6)])
def test_any_size_has_finite_values_and_gradients(size, offset_range):
    layer = layer_of(stride=2, offset_kernel=5, offset_range=offset_range)
    x = torch.randn(2, *size, 16, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_single_key_is_sampled_in_the_middle():
    layer = layer_of(stride=8)
    layer.offset.proj.weight.data.zero_()
    places = layer.places(torch.randn(1, 6, 17, 16))[0, 0, 0]
    torch.testing.assert_close(places, torch.tensor([[0, -0.5], [0, 0.5], [0, 1]]))  # the last one is kept inside


@pytest.mark.parametrize("offset_range", [None, 1.0])
def test_large_maps_are_processed_in_parts_and_need_little_memory(monkeypatch, offset_range):
    layer = layer_of(stride=2, offset_range=offset_range).double()
    x = torch.randn(1, 24, 20, 16, dtype=torch.float64)
    results, kept = [], []
    for scores in (2**23, 4 * 20 * 120 * 3):  # of all rows at once, of three
        monkeypatch.setattr(deformable_attention, "SCORES", scores)
        layer.zero_grad()
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        image = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = layer(image)
        out.square().sum().backward()
        results.append([out, image.grad, *(p.grad for p in layer.parameters())])
        kept.append(total)
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    assert kept[1] < 0.3 * kept[0]
    assert kept[1] < 4 * 24 * 20 * 120  # one score for each pair and head


def test_bfloat16_computes_places_exactly():
    """A coordinate in bfloat16 would be off by a token on a map of 200."""
    layer = layer_of(stride=4, offset_kernel=5)
    x = torch.randn(1, 16, 200, 16)
    expected = layer.places(x)
    with torch.autocast("cpu", torch.bfloat16):
        places = layer.places(x)
        error = (layer(x).float() - layer(x.bfloat16()).float()).abs().max()
    torch.testing.assert_close(places, expected)
    assert error < 0.05
    low = layer.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert low.isfinite().all()


def test_a_table_of_another_size_is_resized_while_it_is_loaded():
    small, large = layer_of(), DeformableAttention(16, 4, 2, 9)
    large.load_state_dict(small.state_dict())
    assert large.bias.table.shape == (4, 17, 17)
    torch.testing.assert_close(large.bias.table[:, 8, 8], small.bias.table[:, 4, 4], rtol=0, atol=0.3)
    small.load_state_dict(layer_of().state_dict())
    assert torch.equal(small.bias.table, layer_of().bias.table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "dim must be a positive multiple of num_heads"),
        (dict(groups=3), "groups must divide num_heads; got groups=3, num_heads=4"),
        (dict(groups=0), "groups must be a positive whole number"),
        (dict(table_size=1), "table_size must be 2 tokens or more; got 1"),
        (dict(offset_kernel=4), "offset_kernel must be odd"),
        (dict(stride=0), "stride must be a positive whole number"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformableAttention(**dict(dim=16, num_heads=4, groups=2, table_size=5) | arguments)
