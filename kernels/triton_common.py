"""Shared by the Triton kernels of all operators: launches, block sizes, loading and storing tokens.

Tensors are `(batch, height, width, heads, head_dim)`. A *launch* holds everything a kernel is called with; the tests
compile the same launches that calls make. This module is imported only when used, because Triton is slow to import.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridzoo.kernels.tuning import Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)  # the hardware has a fast exp2, but no fast exp
ALIGNMENT = 16  # bytes; Triton compiles different code for tensors that are not aligned
UNSEEN = tl.constexpr(-1.0e30)  # the score of a key that is not attended to: finite, so that no row makes inf - inf


@dataclass(frozen=True, eq=False)
class Recipe:
    """A launch without its tensors. Between calls with the same shape, dtype, strides and device, only they change."""

    kernel: Any
    programs: int
    tensors: tuple[str, ...]  # the kernel's first arguments
    arguments: dict[str, Any]  # the other arguments, in the kernel's order
    options: dict[str, Any]  # for the compiler
    compiled: dict[Any, Any] = field(default_factory=dict)  # by the tensors' dtypes and alignment

    @classmethod
    def of(cls, kernel: Any, programs: int, arguments: dict[str, Any], config: Config) -> Recipe:
        """The recipe for `kernel`, which receives those of `arguments` that it has; its other arguments are tensors."""
        tensors = tuple(name for name in kernel.arg_names if name not in arguments)
        rest = kernel.arg_names[len(tensors) :]
        assert not {*tensors} & {*rest}, f"{kernel} takes a tensor after other arguments"
        return cls(kernel, programs, tensors, {name: arguments[name] for name in rest}, config.options)

    def launch(self, tensors: dict[str, Tensor]) -> Launch:
        return Launch(self, tuple([tensors[name] for name in self.tensors]))


class Launch(NamedTuple):
    """One call of a kernel."""

    recipe: Recipe
    tensors: tuple[Tensor, ...]

    @property
    def kernel(self) -> Any:
        return self.recipe.kernel

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments, in the kernel's order."""
        return dict(zip(self.recipe.tensors, self.tensors, strict=True)) | self.recipe.arguments

    @property
    def options(self) -> dict[str, Any]:
        return self.recipe.options

    def run(self) -> None:
        """Launch the kernel.

        In every call, Triton examines all arguments to find the compiled kernel. Here only the tensors change, so the
        compiled kernel is kept for each combination of dtypes and alignment, and launched directly.
        """
        recipe = self.recipe
        alike = tuple([(t.dtype, t.data_ptr() % ALIGNMENT == 0) for t in self.tensors])
        compiled = recipe.compiled.get(alike)
        if compiled is not None:
            try:
                compiled[(recipe.programs, 1, 1)](*self.tensors, *recipe.arguments.values())
                return
            except (AttributeError, TypeError):  # a version of Triton whose compiled kernels are called otherwise
                recipe.compiled[alike] = None
        found = recipe.kernel[(recipe.programs,)](*self.arguments.values(), **recipe.options)
        # The interpreter returns nothing. AMD's code also depends on the size of the memory.
        if alike not in recipe.compiled and torch.version.hip is None:
            recipe.compiled[alike] = found


def unsupported(query: Tensor, widths: tuple[int, int] = (16, 128)) -> str | None:
    """The reason why none of our kernels supports this map, or None. `widths`: smallest and largest head_dim."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is not one of float16, bfloat16, float32"
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        return "Triton's interpreter multiplies bfloat16 matrices as if they were integers"
    if query.ndim == 5 and not widths[0] <= query.shape[4] <= widths[1]:
        return f"head_dim {query.shape[4]} does not lie between {widths[0]} and {widths[1]}"
    shape = query.shape[1:]
    reach = sum([(size - 1) * abs(stride) for size, stride in zip(shape, query.stride()[1:], strict=True)])
    if max(reach, math.prod(shape)) >= 2**31:
        return "an image has more elements than 32-bit offsets can address"
    if query.is_cuda and capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


capability = functools.cache(torch.cuda.get_device_capability)  # needed in every call


def same_strides(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """The three tensors with equal strides, which the kernels need. Views of a packed projection are not copied."""
    if not (query.stride() == key.stride() == value.stride() and query.stride(4) == 1):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return dict(query=query, key=key, value=value)


def precision(query: Tensor) -> str:
    """How products are computed: in TF32 for float32 inputs if the user allows it in PyTorch, otherwise exactly.

    PyTorch has three ways to allow TF32. After one was used, reading another one may raise. The newest attribute can
    always be read.
    """
    matmul = torch.backends.cuda.matmul
    if query.dtype != torch.float32:
        return "ieee"
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


@triton.jit
def load_tokens(tensor, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, exists=None):
    """`[n, BLOCK_D]`, zeros beyond HEAD_DIM and in tokens that do not exist, which are not read from memory."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    pointers = tensor + (offsets[:, None] + channel)  # one 64-bit addition for each address, not two
    if exists is not None:
        tokens = tl.load(pointers, mask=exists[:, None] & (channel < HEAD_DIM), other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tokens = tl.load(pointers)
    else:
        tokens = tl.load(pointers, mask=channel < HEAD_DIM, other=0.0)
    return tokens


@triton.jit
def store_tokens(tensor, offsets, exists, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = exists[:, None] & (channel < HEAD_DIM)
    tl.store(tensor + offsets[:, None] + channel, tokens.to(tensor.dtype.element_ty), mask=mask)
