"""HiLo attention and deformable token merging against the published modules and torchvision's operator."""

from __future__ import annotations

import goldens
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from hybridzoo.checkpoints import convert
from hybridzoo.layers import DeformableMerging, DepthwiseMlp, HiLoAttention
from hybridzoo.layers.deformable_merging import deform


def deformable_conv2x2(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    moved = deform(x.permute(0, 2, 3, 1), offset.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.conv2d(moved, weight, bias, stride=2)


NAMES = goldens.names("ops", numeric=True)


def ours(data: dict[str, Tensor], group: str, theirs: str, our: str) -> dict[str, Tensor]:
    """A module's published parameters, buffers or gradients under our names."""
    published = {theirs + k.removeprefix(group): v for k, v in data.items() if k.startswith(group)}
    return {k.removeprefix(our): v for k, v in convert(published, "litv2_small").items()}


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("hilo_module_")])
def test_published_module_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    names = ("layers.2.blocks.0.attn.", "stages.2.blocks.0.attn.branch.update.")
    layer = HiLoAttention(meta["C"], meta["heads"], meta["window"], meta["alpha"]).double()
    assert (layer.low_heads, layer.high_heads) == (meta["l_heads"], meta["h_heads"])
    layer.load_state_dict(ours(data, "param.", *names))
    x = data["x"].requires_grad_()
    out = layer(x.unflatten(1, meta["map_size"])).flatten(1, 2)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    grads = ours(data, "grad.", *names)
    for key, parameter in layer.named_parameters():  # that of a key's bias is zero but for rounding
        goldens.assert_close(parameter.grad, grads[key], std=max(1.0, grads[key].std().item()))


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("dtm_module_")])
def test_published_merging_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    names = ("layers.0.downsample.", "stages.1.downsample.")
    layer = DeformableMerging(meta["C"], 2 * meta["C"]).double().eval()
    state = ours(data, "param.", *names) | ours(data, "buffer.", *names)
    layer.load_state_dict(state | {"norm.num_batches_tracked": torch.tensor(0)})
    x = data["x"].requires_grad_()
    out = layer(x.unflatten(1, meta["map_size"])).flatten(1, 2)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    grads = ours(data, "grad.", *names)
    for key, parameter in layer.named_parameters():
        goldens.assert_close(parameter.grad, grads[key])


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("deform2x2s2_")])
def test_published_operator_values_and_gradients(name):
    data = goldens.numbers("ops", name)
    inputs = {key: data[key].requires_grad_() for key in ("x", "offset", "weight", "bias")}
    out = deformable_conv2x2(**inputs)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    for key, tensor in inputs.items():
        goldens.assert_close(tensor.grad, data[f"grad_{key}"])


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 8), (9, 31)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_equals_torchvisions_operator(size, spread):
    """Far outside the map too."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    offset = spread * torch.randn(2, 8, size[0] // 2, size[1] // 2, dtype=torch.float64)
    weight, bias = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for b in (bias, None):
        expected = deform_conv2d(x, offset, weight, b, stride=2)
        torch.testing.assert_close(deformable_conv2x2(x, offset, weight, b), expected)


def test_half_precision_finds_its_pixels_on_large_maps():
    torch.manual_seed(0)
    x, offset = torch.randn(1, 4, 2, 2000), torch.randn(1, 8, 1, 1000)
    weight = torch.randn(3, 4, 2, 2)
    half = deformable_conv2x2(x.bfloat16(), offset.bfloat16(), weight.bfloat16())
    exact = deformable_conv2x2(x.bfloat16().float(), offset.bfloat16().float(), weight.bfloat16().float())
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_depthwise_mlps_need_the_position_of_the_convolution():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    for residual in (False, True):
        for act_first in (False, True):
            mlp = DepthwiseMlp(6, 8, residual=residual, act_first=act_first).double()
            hidden = mlp.act(mlp.fc1(x)) if act_first else mlp.fc1(x)
            mixed = mlp.conv(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + (hidden if residual else 0)
            torch.testing.assert_close(mlp(x), mlp.fc2(mixed if act_first else mlp.act(mixed)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dim=30, num_heads=4), "dim must be a multiple of num_heads"),
        (dict(dim=32, num_heads=4, window=0), "window must be positive; got 0"),
        (dict(dim=32, num_heads=4, alpha=-0.1), r"alpha must be in 0\.\.1; got -0\.1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiLoAttention(**arguments)
