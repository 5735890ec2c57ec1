"""Shared by the tests of all Triton kernels: the device, and the tolerances.

The interpreter must be chosen before Triton is imported, which another test of the process may have done, so processes
of their own run the files again with it (`run_interpreted`). On a GPU the tests run as they are, in bfloat16 as well.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
computes = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU; runs under the interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")

if INTERPRETED:
    # Triton would check every sum of integers for an overflow, in 40 % of the time, and drop the result.
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)

Function = Callable[..., Tensor]


def results(function: Function, tensors: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of all tensors that there are; zeros for one that the output does not need."""
    out = function(*tensors)
    leaves = [t for t in tensors if t is not None]
    return out, *torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)


def assert_as_good(ours: Function, definition: Function, tensors: Sequence[Tensor | None]) -> None:
    """Against float64, values and gradients of `ours` err at most twice as much as the definition in this precision.

    A few roundings of the largest of them are allowed besides: terms of about that size may cancel (the score of a
    single key has no gradient, which the definition hits exactly).
    """
    grad = torch.randn_like(tensors[0])
    found = results(ours, tensors, grad)
    copies = [None if t is None else t.detach().cpu() for t in tensors]
    exact, naive = (
        results(
            definition,
            [None if t is None else t.to(dtype).requires_grad_() for t in copies],
            grad.cpu().to(dtype),
        )
        for dtype in (torch.float64, grad.dtype)
    )
    rounding = torch.finfo(grad.dtype).eps * max(e.abs().max() for e in exact)
    for f, n, e in zip(found, naive, exact, strict=True):
        allowed = 2 * (n.double() - e).abs().max() + 4 * rounding
        assert (f.cpu().double() - e).abs().max() <= allowed


def run_interpreted(request: pytest.FixtureRequest, files: list[Path], at_least: int) -> None:
    """Every test of these files that computes, in a process where Triton interprets its kernels on the CPU."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    environment |= dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    options = ["-m", request.config.option.markexpr, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *options, *map(str, files)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= at_least, run.stdout
