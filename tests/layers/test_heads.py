"""Attention with a bias: one function in two forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers.heads import biased_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_a_bias_changes_no_value(dtype):
    """Masked keys included; gradients are those of PyTorch's fused attention."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (5, 7, 7))
    bias = torch.randn(1, 3, 5, 7, dtype=dtype, requires_grad=True)
    mask = torch.zeros(5, 7, dtype=dtype).masked_fill(torch.ones(5, 7).tril() == 0, float("-inf"))
    inputs = (query, key, value, bias)
    ours = biased_attention(query, key, value, bias + mask)
    expected = F.scaled_dot_product_attention(query, key, value, bias + mask)
    grad = torch.randn_like(expected)
    close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, expected, **close)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), **close
    )
    with torch.no_grad():
        torch.testing.assert_close(biased_attention(query, key, value, bias + mask), expected, **close)
