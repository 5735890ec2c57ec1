"""What the Triton kernels of all operators share: launches, block sizes, loading and storing tokens.

Tensors are `(batch, height, width, heads, head_dim)`. A *launch* holds everything a kernel is called with; the tests
compile the very launches that calls make. Imported only when used: Triton is slow to import.
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
LOG2E = tl.constexpr(1.4426950408889634)  # the hardware has a fast exp2, no fast exp
ALIGNMENT = 16  # bytes; Triton compiles other code for tensors that begin elsewhere
UNSEEN = tl.constexpr(-1.0e30)  # the score of a key that is not attended to: finite, so that no row makes inf - inf


@dataclass(frozen=True, eq=False)
class Recipe:
    """A launch without its tensors, which are all that changes between calls of a shape, dtype, strides and device."""

    kernel: Any
    programs: int
    tensors: tuple[str, ...]  # the kernel's first arguments
    arguments: dict[str, Any]  # the others, in its order
    options: dict[str, Any]  # of the compiler
    compiled: dict[Any, Any] = field(default_factory=dict)  # by what Triton asks of tensors

    @classmethod
    def of(cls, kernel: Any, programs: int, arguments: dict[str, Any], config: Config) -> Recipe:
        """Of `arguments`, a kernel is passed those it has; the tensors are the rest of what it has."""
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
        """All of them, in the kernel's order."""
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
        if compiled is not None and torch.version.hip is None:  # AMD's code depends on the memory's size too
            compiled[(recipe.programs, 1, 1)](*self.tensors, *recipe.arguments.values())
        else:  # the interpreter returns nothing
            recipe.compiled[alike] = recipe.kernel[(recipe.programs,)](*self.arguments.values(), **recipe.options)


def unsupported(query: Tensor, widths: tuple[int, int] = (16, 128)) -> str | None:
    """Why no kernel of ours can take this map, of heads as wide as `widths` or of plain channels; None if they can."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is none of float16, bfloat16, float32"
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        return "Triton's interpreter multiplies bfloat16 matrices as if they were integers"
    if query.ndim == 5 and not widths[0] <= query.shape[4] <= widths[1]:
        return f"head_dim {query.shape[4]} does not lie between {widths[0]} and {widths[1]}"
    shape = query.shape[1:]
    reach = sum([(size - 1) * abs(stride) for size, stride in zip(shape, query.stride()[1:], strict=True)])
    if max(reach, math.prod(shape)) >= 2**31:
        return "an image has more elements than 32-bit offsets reach"
    if query.is_cuda and capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


capability = functools.cache(torch.cuda.get_device_capability)  # asked for in every call


def same_strides(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """The three with one set of strides, as the kernels want them: views of a packed projection pass as they are."""
    if not (query.stride() == key.stride() == value.stride() and query.stride(4) == 1):
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return dict(query=query, key=key, value=value)


def precision(query: Tensor) -> str:
    """How float32 products are taken: as PyTorch's own are, exactly unless the user allows TF32; others have no choice.

    PyTorch has three ways to allow it, and refuses to answer by one of them once another was used. The newest attribute
    always answers.
    """
    matmul = torch.backends.cuda.matmul
    if query.dtype != torch.float32:
        return "ieee"
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


@triton.jit
def load_tokens(tensor, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, exists=None):
    """`[n, BLOCK_D]`, zeros beyond HEAD_DIM, and in tokens that do not exist, which cost no transfer."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    pointers = tensor + offsets[:, None] + channel
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
