"""The attention layer against the published modules, and what it does where regions do not fit."""

from __future__ import annotations

import goldens
import pytest
import timm
import torch

from hybridzoo.kernels.routed.grid import Grid
from hybridzoo.layers import BiLevelRoutingAttention

MODULES = [n for n in goldens.names("ops", numeric=True) if n.startswith("bra_module_")]


@pytest.mark.parametrize("name", MODULES)
def test_published_module_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    padding = {"legacy": "bias", "nchw": "zeros"}[meta["semantics"]]
    dim = data["x"].shape[-1]
    layer = BiLevelRoutingAttention(dim, meta["heads"], meta["topk"], regions=meta["n_win"], padding=padding).double()
    assert layer.region_grid(*data["x"].shape[1:3]) == (tuple(meta["regions"]), tuple(meta["region_size"]))
    ours = {"qkv": "qkv", "lepe": "lepe", "wo": "proj"}
    layer.load_state_dict(
        {f"{our}.{part}": data[f"{theirs}_{part}"] for theirs, our in ours.items() for part in ("weight", "bias")}
    )
    x = data["x"].requires_grad_()
    out = layer(x)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    for theirs, our in ours.items():
        for part in ("weight", "bias"):
            goldens.assert_close(layer.get_parameter(f"{our}.{part}").grad, data[f"grad_{theirs}_{part}"])


@pytest.mark.parametrize("padding", ["zeros", "mask"])
def test_paddings_agree_if_regions_divide_the_map(padding):
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(16, 2, 3, regions=(3, 4))
    other = BiLevelRoutingAttention(16, 2, 3, regions=(3, 4), padding=padding)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 12, 16)
    torch.testing.assert_close(layer(x), other(x))


def test_zeros_padding_routes_by_means_over_real_tokens():
    """Side 9 in two regions of four: a third, single row of regions, nine tenths of whose padded mean are zeros."""
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(8, 1, 1, regions=2, padding="zeros")
    assert layer.region_grid(9, 9) == ((3, 3), (4, 4))
    key = torch.randn(1, 9, 9, 1, 8)
    query = torch.zeros(1, 9, 9, 1, 8)
    edges = [(0, 4), (4, 8), (8, 9)]
    means = torch.stack([key[0, a:b, c:d].mean((0, 1)).flatten() for a, b in edges for c, d in edges])
    for wanted in range(9):
        query[0, :4, :4, 0] = means[wanted] / means[wanted].square().sum()  # dot product 1 with its own mean
        best = (means @ query[0, 0, 0, 0]).argmax()
        routes = layer._route(query, key, Grid(3, 3, 4, 4), torch.zeros(3, 1, 8))
        assert routes[0, 0, 0] == best


def test_tokens_beyond_the_map_are_not_attended_to_with_mask_padding():
    """With all regions routed, masked attention at an odd size is plain attention over the map."""
    torch.manual_seed(0)
    layer = BiLevelRoutingAttention(16, 2, 4, regions=2, padding="mask").double()
    x = torch.randn(1, 5, 7, 16, dtype=torch.float64)
    full = layer(x)
    layer.topk = 3  # through the routed operator; region 3 is left out somewhere
    assert not torch.allclose(layer(x), full)
    q, k, v = layer.qkv(x).view(1, 35, 3, 2, 8).permute(2, 0, 3, 1, 4)
    plain = torch.softmax(q @ k.transpose(-1, -2) * 16**-0.5, -1) @ v
    local = layer.lepe(layer.qkv(x)[..., 32:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = layer.proj(plain.transpose(1, 2).reshape(1, 5, 7, 16) + local)
    torch.testing.assert_close(full, expected)


@pytest.mark.parametrize("padding", ["bias", "zeros", "mask"])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 7), (9, 23)])
@pytest.mark.parametrize("regions", [dict(regions=7), dict(region_size=4)])
def test_any_map_size(padding, size, regions):
    layer = BiLevelRoutingAttention(8, 2, 4, padding=padding, **regions)
    out = layer(torch.randn(2, *size, 8))
    out.sum().backward()
    assert out.shape == (2, *size, 8)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("regions", [dict(regions=3), dict(regions=2), dict(region_size=4)], ids=str)
def test_an_empty_batch(regions):
    """Routed, and with every region routed to every other."""
    layer = BiLevelRoutingAttention(8, 2, 4, **regions)
    x = torch.randn(0, 7, 9, 8, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 7, 9, 8)


def test_a_network_of_such_layers_takes_an_empty_batch():
    x = torch.zeros(0, 3, 96, 64, requires_grad=True)
    logits = timm.create_model("biformer_tiny", num_classes=3)(x)
    logits.sum().backward()
    assert logits.shape == (0, 3)
    assert x.grad.shape == x.shape


def test_repr_shows_the_settings_of_the_layer():
    layer = BiLevelRoutingAttention(8, 2, 4, regions=[7, 5])
    assert layer.regions == (7, 5)
    assert layer.extra_repr() == "num_heads=2, topk=4, regions=(7, 5), padding='bias'"
    layer = BiLevelRoutingAttention(8, 2, 4, region_size=4, padding="mask")
    assert layer.extra_repr() == "num_heads=2, topk=4, region_size=4, padding='mask'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3, regions=7), "dim must be a positive multiple of num_heads; got dim=8, num_heads=3"),
        (dict(num_heads=0, regions=7), "dim must be a positive multiple of num_heads; got dim=8, num_heads=0"),
        (dict(num_heads=-2, regions=7), "dim must be a positive multiple of num_heads; got dim=8, num_heads=-2"),
        (dict(topk=0, regions=7), "topk must be a positive whole number; got 0"),
        (dict(topk=-1, regions=7), "topk must be a positive whole number; got -1"),
        (dict(topk=1.5, regions=7), "topk must be a positive whole number; got 1.5"),
        (dict(regions=(7,)), r"regions must be a positive whole number or a pair .*; got \(7,\)"),
        (dict(regions=7.0), "regions must be a positive whole number or a pair .*; got 7.0"),
        (dict(regions=(7, 0)), "regions must be a positive whole number or a pair"),
        (dict(region_size=2.5), "region_size must be a positive whole number; got 2.5"),
        (dict(regions=7, lepe_kernel=0), "lepe_kernel must be a positive whole number; got 0"),
        (dict(regions=7, lepe_kernel=4), "lepe_kernel must be odd, .*; got 4"),
        (dict(num_heads=2), "give either regions or region_size"),
        (dict(num_heads=2, regions=7, region_size=4), "give either regions or region_size"),
        (dict(num_heads=2, regions=7, padding="reflect"), "padding must be one of bias, zeros, mask; got 'reflect'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRoutingAttention(8, **{"num_heads": 2, "topk": 4, **arguments})
