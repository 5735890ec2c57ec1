"""Multi-scale linear attention against its formula, and in low precision."""

from __future__ import annotations

import pytest
import torch

from hybridzoo.layers import MultiScaleLinearAttention
from hybridzoo.layers.linear_attention import relu_linear_attention


def quadratic(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition, token by token: `(..., tokens, head_dim)`."""
    weights = query @ key.mT  # queries x keys
    return weights / (weights.sum(-1, keepdim=True) + 1e-15) @ value


def inputs(tokens: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    return [(query.relu() * scale).to(dtype), (key.relu() * scale).to(dtype), value.to(dtype)]


@pytest.mark.parametrize("tokens", [1, 4, 8, 50])
def test_equals_the_definition(tokens):
    query, key, value = inputs(tokens)
    torch.testing.assert_close(relu_linear_attention(query, key, value), quadratic(query, key, value))


def test_queries_without_any_weight_give_zero_and_finite_gradients():
    query, key, value = inputs(20, torch.float32)
    query[..., 3, :] = 0
    key[:, 1] = 0
    for t in (query, key, value):
        t.requires_grad_()
    out = relu_linear_attention(query, key, value)
    assert not out[..., 3, :].any()
    assert not out[:, 1].any()
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_only_rounds_the_result(dtype, limit, autocast):
    """Products and sums here pass 65504 a thousand times over: in half precision they would be infinite."""
    query, key, value = inputs(1000, dtype, scale=200.0)
    expected = quadratic(query.double(), key.double(), value.double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = relu_linear_attention(query, key, value)
    assert out.dtype == dtype
    assert (key.double() @ query.double().mT).max() > 65504
    assert (out.double() - expected).abs().max() < limit * expected.abs().max()


def test_channels_are_ordered_by_scale_and_then_by_head():
    torch.manual_seed(0)
    layer = MultiScaleLinearAttention(16, head_dim=8, scales=(3, 5)).double().eval()
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        qkv = layer.qkv(x)
        heads = torch.cat([qkv, *(branch(qkv) for branch in layer.aggregate)], dim=1).reshape(2, 6, 3, 8, 35).mT
        expected = quadratic(heads[:, :, 0].relu(), heads[:, :, 1].relu(), heads[:, :, 2]).mT.reshape(2, 48, 5, 7)
        torch.testing.assert_close(layer(x), layer.proj(expected))


def test_an_empty_batch_is_valid():
    assert MultiScaleLinearAttention(16, 8)(torch.empty(0, 16, 5, 6)).shape == (0, 16, 5, 6)


def test_gradients():
    torch.manual_seed(0)
    layer = MultiScaleLinearAttention(8, head_dim=4).double().eval()
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="head_dim"):
        MultiScaleLinearAttention(30, head_dim=16)
    with pytest.raises(ValueError, match="scales"):
        MultiScaleLinearAttention(32, head_dim=16, scales=(4,))
