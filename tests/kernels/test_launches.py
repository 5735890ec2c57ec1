"""How a kernel is launched: by Triton the first time, directly afterwards, by Triton again where that is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from hybridzoo.kernels.triton_common import Recipe
from hybridzoo.kernels.tuning import Config


class Kernel:
    """Stands for a function of `triton.jit`; what it compiles to takes what `refusal` says."""

    arg_names = ("x", "rows", "BLOCK")

    def __init__(self, refusal: type[Exception] | None = None) -> None:
        self.refusal, self.said = refusal, []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.said.append(("Triton", grid, len(arguments), options["num_warps"]))
            return Compiled(self)

        return call


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*arguments):
            if self.kernel.refusal:
                raise self.kernel.refusal
            self.kernel.said.append(("directly", grid, len(arguments)))

        return call


def said(kernel: Kernel, times: int) -> list[tuple]:
    launch = Recipe.of(kernel, 7, dict(rows=2, BLOCK=16), Config(0, 0, 4, 1)).launch(dict(x=torch.empty(4)))
    for _ in range(times):
        launch.run()
    return kernel.said


def test_a_compiled_kernel_is_launched_directly():
    assert said(Kernel(), 3) == [("Triton", (7,), 3, 4), *[("directly", (7, 1, 1), 3)] * 2]


@pytest.mark.parametrize("refusal", [TypeError, AttributeError])
def test_what_another_version_of_triton_refuses_is_left_to_it(refusal):
    assert said(Kernel(refusal), 4) == [("Triton", (7,), 3, 4)] * 4


def test_an_error_of_the_gpu_is_not_tried_again():
    with pytest.raises(RuntimeError):
        said(Kernel(RuntimeError), 2)
