"""InLine attention against the published modules, and the local kernels every image makes."""

from __future__ import annotations

import goldens
import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers import InLineAttention
from hybridzoo.layers.inline_attention import deviation

CORES = [n for n in goldens.names("ops", numeric=True) if n.startswith("inline_core_")]
MODULES = [n for n in goldens.names("ops", numeric=True) if n.startswith("inline_module_")]


def inline_attention(q, k, v):
    return deviation(q, k, v) + v.mean(2, keepdim=True)


@pytest.mark.parametrize("name", CORES)
def test_published_operator_values_and_gradients(name):
    data = goldens.numbers("ops", name)
    inputs = [data[k].requires_grad_() for k in "qkv"]
    out = inline_attention(*inputs)
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    for key, tensor in zip("qkv", inputs, strict=True):
        expected = data[f"grad_{key}"]
        goldens.assert_close(tensor.grad, expected, std=max(expected.std().item(), 1e-3))  # one token: exact zeros


def test_equals_attention_with_an_explicit_map():
    q, k, v = torch.randn(3, 2, 3, 20, 8, dtype=torch.double)
    scores = q @ k.transpose(2, 3) * 8**-0.5 / 20
    weights = scores - scores.mean(-1, keepdim=True) + 1 / 20
    torch.testing.assert_close(inline_attention(q, k, v), weights @ v)


@pytest.mark.parametrize("name", MODULES)
def test_published_module_values_and_gradients(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    for group in ("param.", "grad."):
        for part in ("weight", "bias"):
            if f"{group}kv.{part}" in data:  # PVT projects queries, and keys with values
                both = [data.pop(f"{group}{which}.{part}") for which in ("q", "kv")]
                data[f"{group}qkv.{part}"] = torch.cat(both)
    layer = InLineAttention(data["x"].shape[-1], meta["heads"], class_token="deit" in name).double()
    layer.load_state_dict({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    x = data["x"].requires_grad_()
    out = layer(x, tuple(meta.get("map_size", meta.get("window"))))
    goldens.assert_close(out, data["out"])
    out.backward(data["grad_out"])
    goldens.assert_close(x.grad, data["grad_x"])
    for key, parameter in layer.named_parameters():
        goldens.assert_close(parameter.grad, data[f"grad.{key}"])


def test_an_empty_batch_is_valid():
    layer = InLineAttention(16, 2, static_kernel=True)
    assert layer(torch.empty(0, 5, 6, 16)).shape == (0, 5, 6, 16)
    with torch.no_grad():
        assert layer(torch.empty(0, 5, 6, 16)).shape == (0, 5, 6, 16)


def test_a_map_is_its_tokens():
    layer = InLineAttention(16, 2).double()
    x = torch.randn(2, 5, 7, 16, dtype=torch.double)
    torch.testing.assert_close(layer(x).flatten(1, 2), layer(x.flatten(1, 2), (5, 7)))


def test_the_static_kernel_is_a_depthwise_convolution_of_the_values():
    torch.manual_seed(0)
    layer = InLineAttention(16, 2, static_kernel=True).double()
    plain = InLineAttention(16, 2).double()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("dwc")})
    x = torch.randn(2, 6, 7, 16, dtype=torch.double)
    value = layer.qkv(x)[..., 32:].permute(0, 3, 1, 2)
    local = F.linear(layer.dwc(value).permute(0, 2, 3, 1), layer.proj.weight)
    torch.testing.assert_close(layer(x), plain(x) + local)


def test_a_summary_replaces_the_token_mean():
    layer = InLineAttention(16, 2)
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(layer(x, (3, 4)), layer(x, (3, 4), summary=x.mean(1)))
    assert not torch.allclose(layer(x, (3, 4)), layer(x, (3, 4), summary=x.amax(1)))


def test_large_means_do_not_reduce_the_accuracy_in_bfloat16():
    """Keys and values with a mean of five standard deviations: a difference of large sums would be noise."""
    torch.manual_seed(0)
    q, k, v = (t.bfloat16() for t in torch.randn(3, 4, 2, 196, 32))
    k, v = k + 5, v + 5
    exact = inline_attention(q.double(), k.double(), v.double())

    def error(out: torch.Tensor) -> float:
        return (out.double() - exact).square().mean().sqrt().item()

    scale = 32**-0.5
    plain = scale * q @ (k.mT @ v / 196) + (1 - scale * q @ k.mean(2, keepdim=True).mT) * v.mean(2, keepdim=True)
    ours = error(inline_attention(q, k, v))
    assert ours < 2 * error(exact.bfloat16())  # rounding the result alone costs as much
    assert ours < 0.2 * error(plain)


def test_large_maps_fit_into_float16():
    """Keys that go with the values: the plain sum over 16,384 tokens would not."""
    torch.manual_seed(0)
    layer = InLineAttention(64, 2)
    x = 3 * torch.randn(1, 128, 128, 1) * torch.randn(64) + torch.randn(1, 128, 128, 64)
    with torch.no_grad():
        torch.nn.init.normal_(layer.qkv.weight, std=0.1)
        expected = layer(x)
        with torch.autocast("cpu", torch.float16):
            outs = [layer(x)]
            with torch.enable_grad():
                outs.append(layer(x))
        outs.append(layer.half()(x.half()))
    for out in outs:
        assert (out.float() - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.parametrize("class_token", [False, True])
def test_tokens_without_their_size_are_refused(class_token):
    layer = InLineAttention(16, 2, class_token=class_token)
    with pytest.raises(ValueError, match="size must be"):
        layer(torch.randn(1, 31, 16), (5, 7))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        InLineAttention(15, 2)
