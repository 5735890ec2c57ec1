"""Softmax attention: one function, by PyTorch's fused one where that can be trusted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridzoo.layers import heads
from hybridzoo.layers.heads import softmax_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_a_bias_changes_no_value(dtype):
    """Masked keys included; gradients are those of PyTorch's fused attention."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (5, 7, 7))
    bias = torch.randn(1, 3, 5, 7, dtype=dtype, requires_grad=True)
    mask = torch.zeros(5, 7, dtype=dtype).masked_fill(torch.ones(5, 7).tril() == 0, float("-inf"))
    inputs = (query, key, value, bias)
    ours = softmax_attention(query, key, value, bias + mask)
    expected = F.scaled_dot_product_attention(query, key, value, bias + mask)
    grad = torch.randn_like(expected)
    close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours, expected, **close)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(expected, inputs, grad), **close
    )
    with torch.no_grad():
        torch.testing.assert_close(softmax_attention(query, key, value, bias + mask), expected, **close)


def test_dropout_drops_weights_while_a_bias_trains():
    query, key, value = torch.randn(3, 2, 3, 5, 8)
    bias = torch.randn(1, 3, 5, 5, requires_grad=True)
    assert not softmax_attention(query, key, value, bias, dropout=1.0).any()
    assert softmax_attention(query, key, value, bias).any()


CUDA = torch.backends.cuda


@pytest.fixture
def allowed(monkeypatch):
    """What may attend inside, as if a GPU trained; what PyTorch has the choice of is put back afterwards."""
    seen = []
    fused = F.scaled_dot_product_attention

    def look(*args, **kwargs):
        flags = CUDA.cudnn_sdp_enabled(), CUDA.flash_sdp_enabled(), CUDA.mem_efficient_sdp_enabled()
        seen.append((*flags, CUDA.math_sdp_enabled()))
        return fused(*args, **kwargs)

    monkeypatch.setattr(heads, "_trains_on_cuda", lambda query: torch.is_grad_enabled())
    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    before = CUDA.cudnn_sdp_enabled(), CUDA.flash_sdp_enabled()
    yield seen
    CUDA.enable_cudnn_sdp(before[0])
    CUDA.enable_flash_sdp(before[1])


@pytest.mark.parametrize(
    ("cudnn", "flash", "expected"),
    [
        (True, True, (False, True, True, True)),
        (True, False, (False, False, True, True)),  # who forbids another one, is heard
        (False, False, (False, False, True, True)),
    ],
)
def test_training_on_a_gpu_does_not_use_cudnns_attention(cudnn, flash, expected, allowed):
    CUDA.enable_cudnn_sdp(cudnn)
    CUDA.enable_flash_sdp(flash)
    query = torch.randn(1, 2, 5, 8)
    softmax_attention(query, query, query)
    assert allowed == [expected]
    assert (CUDA.cudnn_sdp_enabled(), CUDA.flash_sdp_enabled()) == (cudnn, flash)
    with torch.no_grad():
        softmax_attention(query, query, query)
    assert allowed[1] == (cudnn, flash, True, True)


def test_cudnns_attention_is_used_if_it_is_the_only_one_allowed(allowed):
    query = torch.randn(1, 2, 5, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError):
        softmax_attention(query, query, query)  # a CPU has no such thing
    assert allowed == [(True, False, False, False)]


def test_compiled_code_keeps_the_choice(monkeypatch):
    monkeypatch.setattr(heads, "_trains_on_cuda", lambda query: True)
    query, key, value = torch.randn(3, 1, 2, 5, 8, requires_grad=True).unbind(0)
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value), softmax_attention(query, key, value))
