"""What the Triton kernels of all operators share: launches, block sizes, loading and storing tokens.

Tensors are `(batch, height, width, heads, head_dim)`. A *launch* holds everything a kernel is called with; the tests
compile the very launches that calls make. Imported only when used: Triton is slow to import.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridzoo.kernels.tuning import Config

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)  # the hardware has a fast exp2, no fast exp
UNSEEN = tl.constexpr(-1.0e30)  # the score of a key that is not attended to: finite, so that no row makes inf - inf


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]  # of the compiler

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.options)


class Recipe(NamedTuple):
    """A launch without its tensors, which are all that changes between calls of a shape."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tensors: tuple[str, ...]  # the kernel's other arguments
    options: dict[str, Any]

    @classmethod
    def of(cls, kernel: Any, programs: int, arguments: dict[str, Any], config: Config) -> Recipe:
        """Of `arguments`, a kernel is passed those it has; the tensors are the rest of what it has."""
        known = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        return cls(kernel, programs, known, tuple(n for n in kernel.arg_names if n not in known), config.options)

    def launch(self, tensors: dict[str, Tensor]) -> Launch:
        arguments = self.arguments | {name: tensors[name] for name in self.tensors}
        return Launch(self.kernel, self.programs, arguments, self.options)


def launch(kernel: Any, programs: int, arguments: dict[str, Any], config: Config) -> Launch:
    """Of `arguments`, a kernel is passed those it has; their union is simpler to build than each one's own set."""
    return Launch(
        kernel, programs, {name: arguments[name] for name in kernel.arg_names if name in arguments}, config.options
    )


def unsupported(query: Tensor, widths: tuple[int, int] = (16, 128)) -> str | None:
    """Why no kernel of ours can take this map, of heads as wide as `widths` or of plain channels; None if they can."""
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} is none of float16, bfloat16, float32"
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        return "Triton's interpreter multiplies bfloat16 matrices as if they were integers"
    if query.ndim == 5 and not widths[0] <= query.shape[4] <= widths[1]:
        return f"head_dim {query.shape[4]} does not lie between {widths[0]} and {widths[1]}"
    reach = sum((size - 1) * abs(stride) for size, stride in zip(query.shape[1:], query.stride()[1:], strict=True))
    if max(reach, query[:1].numel()) >= 2**31:
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


def sizes(query: Tensor) -> dict[str, Any]:
    """Arguments of all kernels: sizes, strides, and what is fixed when compiling."""
    _, height, width, heads, head_dim = query.shape
    strides = dict(zip(("stride_b", "stride_h", "stride_w", "stride_n"), query.stride(), strict=False))
    return strides | dict(
        heads=heads, height=height, width=width,
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), PRECISION=precision(query),
    )  # fmt: skip


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
