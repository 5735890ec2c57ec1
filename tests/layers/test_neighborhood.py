"""The attention layer against the published modules, and what it does on maps that are smaller than its window."""

from __future__ import annotations

import goldens
import pytest
import timm
import torch
import torch.nn.functional as F

from hybridzoo.kernels import na2d
from hybridzoo.layers import NeighborhoodAttention2d
from hybridzoo.layers.neighborhood import fitting_dilation, resize_rpb

CASES = {name: case for name, case in goldens.manifest("ops", "na2d")["cases"].items() if case["kind"] == "module"}


def test_golden_outputs_of_modules_exist():
    assert len(CASES) == 3
    assert sum(case["padded_to"] != [case["H"], case["W"]] for case in CASES.values()) >= 2


@pytest.mark.parametrize("name", CASES)
def test_published_module_values_and_gradients(name):
    case, data = CASES[name], goldens.numbers("ops", name)
    kernel, dilation = tuple(case["kernel"]), tuple(case["dilation"])
    layer = NeighborhoodAttention2d(data["x"].shape[-1], case["heads"], kernel, dilation).double()
    ours = {name: name.replace(".", "_") for name, _ in layer.named_parameters()}
    layer.load_state_dict({name: data[theirs] for name, theirs in ours.items()})
    x = data["x"].requires_grad_()
    out = layer(x)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["dx"])
    for name, theirs in ours.items():
        goldens.assert_close(layer.get_parameter(name).grad, data[f"d_{theirs}"])


@pytest.mark.parametrize("size", [(4, 5), (4, 20), (20, 4), (7, 14)])
def test_bias_padding_is_zeros_before_the_projection(size):
    """Also on an axis that is long enough while the other is not; and never a query of the padding comes out."""
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(8, 2, kernel_size=(3, 5), dilation=(4, 2)).double()
    torch.nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    height, width = max(12, size[0]), max(10, size[1])
    padded = F.pad(x, (0, 0, 0, width - size[1], 0, height - size[0]))
    expected = layer(padded)[:, : size[0], : size[1]]
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - layer_without_padding(layer)(x)).abs().max() > 1e-3


def layer_without_padding(layer: NeighborhoodAttention2d) -> NeighborhoodAttention2d:
    other = NeighborhoodAttention2d(8, 2, (3, 5), (4, 2), padding="mask").double()
    other.load_state_dict(layer.state_dict())
    return other


def test_tokens_beyond_the_map_are_not_attended_to_with_mask_padding():
    """Where the map is smaller than the window, plain attention over the whole map remains."""
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(16, 2, kernel_size=9, rel_pos_bias=False, padding="mask").double()
    x = torch.randn(1, 5, 7, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(1, 35, 3, 2, 8).permute(2, 0, 3, 1, 4)
    plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 7, 16)
    torch.testing.assert_close(layer(x), layer.proj(plain))
    assert dict(layer.named_parameters()).keys() == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_paddings_agree_if_the_window_fits():
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(8, 2, (3, 5), (4, 2)).double()
    x = torch.randn(2, 12, 11, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer_without_padding(layer)(x))


@pytest.mark.parametrize(
    ("size", "dilation"), [((56, 56), 8), ((55, 80), 7), ((7, 90), 1), ((3, 3), 1), ((200, 336), 28)]
)
def test_auto_dilation_is_the_largest_that_fits(size, dilation):
    assert fitting_dilation(*size, 7) == dilation


def test_auto_dilation_follows_the_map():
    torch.manual_seed(0)
    layer = NeighborhoodAttention2d(8, 1, kernel_size=3, dilation="auto")
    x = torch.randn(1, 7, 13, 8)
    q, k, v = layer.qkv(x).view(1, 7, 13, 3, 1, 8).unbind(3)
    expected = layer.proj(na2d(q, k, v, 3, 2, rpb=layer.rpb).flatten(3))
    torch.testing.assert_close(layer(x), expected)


def test_loading_resizes_the_bias_of_another_kernel():
    torch.manual_seed(0)
    small, large = NeighborhoodAttention2d(8, 2, 7), NeighborhoodAttention2d(8, 2, 11)
    large.load_state_dict(small.state_dict())
    assert large.rpb.shape == (2, 21, 21)
    expected = F.interpolate(small.rpb[None], size=(21, 21), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(large.rpb, torch.nn.Parameter(expected))
    torch.testing.assert_close(resize_rpb(small.rpb, 7), small.rpb)
    assert small.rpb.shape == (2, 13, 13)
    other_heads = {**small.state_dict(), "rpb": torch.zeros(3, 13, 13)}
    with pytest.raises(RuntimeError, match="size mismatch for rpb"):
        large.load_state_dict(other_heads)


@pytest.mark.parametrize("padding", ["bias", "mask"])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 23)])
@pytest.mark.parametrize("dilation", [1, 3, (2, 1), "auto"])
def test_any_map_size(padding, size, dilation):
    layer = NeighborhoodAttention2d(8, 2, 5, dilation, padding=padding)
    out = layer(torch.randn(2, *size, 8))
    out.sum().backward()
    assert out.shape == (2, *size, 8)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_bfloat16_autocast_keeps_its_precision_with_padding():
    layer = NeighborhoodAttention2d(32, 1, 7)
    x = torch.randn(1, 5, 6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("size", [(9, 11), (3, 11)], ids=["as it is", "padded"])
def test_an_empty_batch(size):
    layer = NeighborhoodAttention2d(8, 2, 3, 2)
    x = torch.randn(0, *size, 8, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, *size, 8)
    assert not layer.rpb.grad.any()


def test_a_network_of_such_layers_takes_an_empty_batch():
    x = torch.zeros(0, 3, 96, 64, requires_grad=True)
    logits = timm.create_model("dinat_mini", num_classes=3)(x)
    logits.sum().backward()
    assert logits.shape == (0, 3)
    assert x.grad.shape == x.shape


def test_repr_shows_the_settings_of_the_layer():
    layer = NeighborhoodAttention2d(8, 2, [3, 5], dilation="auto", padding="mask")
    assert layer.extra_repr() == "num_heads=2, kernel_size=(3, 5), dilation=auto, padding='mask'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "dim must be a positive multiple of num_heads; got dim=8, num_heads=3"),
        (dict(num_heads=0), "dim must be a positive multiple of num_heads; got dim=8, num_heads=0"),
        (dict(num_heads=-2), "dim must be a positive multiple of num_heads; got dim=8, num_heads=-2"),
        (dict(num_heads=2.0), "dim must be a positive multiple of num_heads; got dim=8, num_heads=2.0"),
        (dict(num_heads=2, kernel_size=True), "kernel_size must be a positive whole number .*; got True"),
        (dict(num_heads=2, kernel_size=4), "kernel_size must be odd, .*; got 4"),
        (dict(num_heads=2, kernel_size=(3, 0)), r"kernel_size must be a positive whole number .*; got \(3, 0\)"),
        (dict(num_heads=2, dilation="7"), "dilation must be a positive whole number .*; got '7'"),
        (dict(num_heads=2, dilation=0), "dilation must be a positive whole number .*; got 0"),
        (dict(num_heads=2, padding="zeros"), "padding must be one of bias, mask; got 'zeros'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(8, **arguments)
