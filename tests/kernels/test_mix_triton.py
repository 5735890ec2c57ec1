"""The dynamic convolution of neighborhoods in Triton: interpreted (or on a GPU), and compiled for 3 chips."""

from __future__ import annotations

import pytest
import torch
import triton_builds
from triton_tests import DEVICE, INTERPRETED, assert_as_good, compiles, computes

pytest.importorskip("triton", reason="Triton is not installed")

from hybridzoo.kernels import neighborhood_mix2d, triton_common, tuning
from hybridzoo.kernels.mix import api, operators, reference, triton_impl
from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood.given import Window

CASES = {  # batch, height, width, heads, head_dim, value_dim, kernel, dilation, tap bias, position bias
    "a group is a window": (2, 3, 3, 2, 16, 16, (3, 3), (1, 1), True, True),
    "smaller than the window": (1, 4, 5, 1, 16, 10, (7, 7), (1, 1), True, True),
    "more places than one part": (1, 9, 5, 1, 8, 8, (9, 9), (1, 1), True, True),
    "dilated, classes of two sizes": (1, 5, 7, 1, 4, 6, (3, 5), (2, 1), True, False),
    "more classes than rows": (1, 3, 9, 1, 20, 14, (5, 3), (4, 2), False, True),
    "no tables": (2, 6, 4, 1, 16, 16, (3, 3), (1, 1), False, False),
}


@pytest.fixture(autouse=True)
def _fresh_plans():
    """What a test changes of the tables is not kept for others."""
    tuning.forget()
    yield
    tuning.forget()


def leaves(batch, height, width, heads, head_dim, value_dim, kernel, tap_bias, bias, dtype):
    """Value, query, taps, and tables (or None), which stay float32."""
    places = kernel[0] * kernel[1]
    shapes = (batch, height, width, heads, value_dim), (batch, height, width, heads, head_dim)
    maps = [torch.randn(s).to(DEVICE, dtype).requires_grad_() for s in (*shapes, (batch, heads, places, head_dim))]
    tables = [(heads, places), (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)]
    wanted = zip(tables, (tap_bias, bias), strict=True)
    return [*maps, *(torch.randn(shape).to(DEVICE).requires_grad_() if there else None for shape, there in wanted)]


def assert_as_good_as_the_definition(tensors, kernel, dilation):
    assert_as_good(
        lambda v, q, t, b, r: neighborhood_mix2d(
            q, t, v, kernel, dilation, tap_bias=b, rpb=r, scale=0.3, impl="triton"
        ),
        lambda v, q, t, b, r: reference.neighborhood_mix2d(q, t, v, b, r, kernel, dilation, 0.3),
        tensors,
    )


@computes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(case, dtype):
    *shape, kernel, dilation, tap_bias, bias = CASES[case]
    torch.manual_seed(0)
    tensors = leaves(*shape, kernel, tap_bias, bias, dtype)
    if reason := triton_common.unsupported(tensors[1], api.TRITON_WIDTHS):
        pytest.skip(reason)
    if INTERPRETED and dtype == torch.float16 and "a group" not in case:
        pytest.skip("slow to interpret; float32 covers the shape")
    assert_as_good_as_the_definition(tensors, kernel, dilation)


@computes
@pytest.mark.parametrize("programs", [1, 1000])
def test_sums_are_complete_for_any_number_of_programs(programs, monkeypatch):
    """And a class may have no token in its last tile."""
    monkeypatch.setattr(triton_impl, "PROGRAMS", programs / 132)
    torch.manual_seed(0)
    assert_as_good_as_the_definition(leaves(1, 25, 1, 1, 16, 16, (3, 3), True, True, torch.float32), (3, 3), (2, 1))


@computes
def test_kernels_read_only_their_inputs_and_write_all_outputs():
    """Views inside a larger NaN buffer, and NaN in every fresh allocation."""
    torch.manual_seed(0)
    buffer = torch.full((2, 6, 8, 3, 3, 19), torch.nan, device=DEVICE)
    packed = buffer[:, 1:5, 1:7, :2, 1:, 3:15]
    packed.copy_(torch.randn(packed.shape))
    inside = packed.detach().requires_grad_()
    taps = torch.randn(2, 2, 15, 12, device=DEVICE, requires_grad=True)
    rpb = torch.randn(2, 5, 9, device=DEVICE, requires_grad=True)
    query, value = inside.unbind(3)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()  # the trap is set
        out = neighborhood_mix2d(query, taps, value, (3, 5), rpb=rpb, scale=0.3, impl="triton")
        grads = torch.autograd.grad(out.sin().sum(), (inside, taps, rpb))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = [t.detach().cpu().double().requires_grad_() for t in (packed, taps, rpb)]
    expected = reference.neighborhood_mix2d(
        exact[0][:, :, :, 0], exact[1], exact[0][:, :, :, 1], None, exact[2], (3, 5), (1, 1), 0.3
    )
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    for grad, e in zip(grads, torch.autograd.grad(expected.sin().sum(), exact), strict=True):
        torch.testing.assert_close(grad.cpu().double(), e, rtol=1e-5, atol=1e-5)


@computes
def test_operators_are_well_formed():
    torch.manual_seed(0)
    value, query, taps, tap_bias, rpb = leaves(1, 2, 3, 1, 16, 8, (3, 3), True, True, torch.float32)
    where = [3, 3], [1, 1], 0.3, "triton"
    torch.library.opcheck(operators.neighborhood_mix2d, (query, taps, value, tap_bias, rpb, *where))
    tensors = [t.detach() for t in (query, taps, value, tap_bias, rpb)]
    out, lse = operators.neighborhood_mix2d(*tensors, *where)
    args = (torch.randn_like(out), *tensors, out, lse, *where)
    torch.library.opcheck(operators.neighborhood_mix2d_backward, args)


def launches(side, heads, width, kernel, dtype, tables=True):
    """What a training step on 128 images launches. Nothing is allocated."""
    shape = (128, side, side, heads, width)
    query, out = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))
    value = torch.empty(*shape[:3], 2, *shape[3:], dtype=dtype, device="meta")[:, :, :, 0]
    taps = torch.empty(128, heads, kernel * kernel, width, dtype=dtype, device="meta")
    tap_bias = torch.empty(heads, kernel * kernel, device="meta") if tables else None
    rpb = torch.empty(heads, 2 * kernel - 1, 2 * kernel - 1, device="meta") if tables else None
    lse, window = torch.empty(shape[:4], device="meta"), Window((kernel, kernel), (1, 1), 0.3)
    given = Mix(query, taps, value, tap_bias, rpb)
    forward = triton_impl.forward_launch(given, out, lse, window)
    backward, _ = triton_impl.backward_launches(out, given, out, lse, query, out, window)
    return [forward, *backward]


@compiles
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
def test_the_kernels_of_overlock_compile(capability):
    """Stage 3 of the tiny network; windows of 5 and 7 change constants only, and take less."""
    triton_builds.assert_builds(capability, launches(14, 8, 16, 13, torch.bfloat16))


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "kernel", "tables"), [(16, 5, False), (16, 13, True), (32, 13, True)])
def test_the_kernels_at_their_limits_compile(capability, dtype, width, kernel, tables):
    triton_builds.assert_builds(capability, launches(14, 8, width, kernel, dtype, tables))
