"""Splits and merges the heads of an attention."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridzoo.kernels import arguments

BESIDES_CUDNN = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`(batch, tokens, dim)` -> `(batch, heads, tokens, head_dim)`, a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`(batch, heads, tokens, head_dim)` -> `(batch, tokens, dim)`; no copy of what fused attention returns."""
    x = x.transpose(1, 2)
    if arguments.exporting():
        # ONNX decomposes fused attention, whose result then has another memory order: a view recorded here would not
        # fit it.
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`softmax(scale * query @ key^T + bias) @ value`, all `(batch, heads, tokens, ...)`; `dropout` of the weights.

    PyTorch's fused attention. For training on a GPU, cuDNN's implementation is excluded: its backward pass failed with
    an illegal memory access on an H100 (PyTorch 2.11, bfloat16, 98 tokens of 32 channels in InLine-CSwin), and with a
    bias it may
    give NaN there (pytorch/pytorch#196678).

    `scale` is `head_dim ** -0.5` by default.
    """
    with _without_cudnn() if _trains_on_cuda(query) else contextlib.nullcontext():
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scale)


def _trains_on_cuda(query: Tensor) -> bool:
    return query.is_cuda and torch.is_grad_enabled()


def _without_cudnn() -> contextlib.AbstractContextManager[None]:
    """A context in which PyTorch chooses among the enabled implementations (compilers: among all), except cuDNN."""
    if torch.compiler.is_compiling():
        return sdpa_kernel(list(BESIDES_CUDNN))
    rest = [backend for backend, enabled in BESIDES_CUDNN.items() if enabled()]
    wanted = rest and torch.backends.cuda.cudnn_sdp_enabled()
    return sdpa_kernel(rest) if wanted else contextlib.nullcontext()
