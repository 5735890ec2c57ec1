"""Dynamic depthwise convolution: every form against the formula; Triton by its interpreter (or a GPU), and compiled."""

from __future__ import annotations

import pytest
import torch
import triton_builds
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_tests import DEVICE, INTERPRETED, assert_as_good, computes, results

from hybridzoo.kernels import dynamic_depthwise_conv2d, tuning
from hybridzoo.kernels.depthwise import operators, reference, torch_impl

plain = pytest.mark.skipif(INTERPRETED, reason="no Triton in it")


def leaves(batch, height, width, channels, dtype=torch.double, device="cpu"):
    """Maps, kernels and bias."""
    shapes = (batch, height, width, channels), (batch, channels, 9), (batch, channels)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


@plain
@pytest.mark.parametrize("form", ["by_taps", "by_images", "side_by_side", "by_groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_image_is_convolved_with_its_own_kernels(form, bias):
    """As a device or a compiler sees it: the same values and gradients."""
    *tensors, shift = leaves(3, 5, 6, 4)
    tensors.append(shift if bias else None)
    grad = torch.randn(3, 5, 6, 4, dtype=torch.double)
    expected = results(reference.dynamic_depthwise_conv2d, tensors, grad)
    torch.testing.assert_close(results(getattr(torch_impl, form), tensors, grad), expected)


@plain
@pytest.mark.parametrize(("side", "form"), [(1, "side_by_side"), (300, "by_images")])
def test_on_a_cpu_the_size_chooses_the_form(side, form, monkeypatch):
    for name in ("by_images", "side_by_side"):
        monkeypatch.setattr(torch_impl, name, lambda *args, name=name: name)
    assert dynamic_depthwise_conv2d(torch.zeros(2, side, side, 2), torch.zeros(2, 2, 9)) == form


@plain
def test_gradients_of_gradients_are_right_on_a_cpu():
    tensors = leaves(2, 3, 2, 2)
    assert torch.autograd.gradgradcheck(dynamic_depthwise_conv2d, tensors)


@plain
def test_compilers_and_exporters_see_no_custom_operator():
    def step(x, kernels):
        return dynamic_depthwise_conv2d(x, kernels)

    x, kernels, _ = (t.detach() for t in leaves(2, 4, 5, 3))
    program = torch.export.export(_Module(step), (x, kernels))
    assert "hybridzoo" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, kernels), step(x, kernels))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, kernels), step(x, kernels))


class _Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@plain
def test_kernels_are_rounded_to_the_maps_precision():
    x, kernels, bias = (t.detach() for t in leaves(2, 4, 5, 3, torch.float32))
    out = dynamic_depthwise_conv2d(x.bfloat16(), kernels, bias)
    assert out.dtype == torch.bfloat16
    expected = reference.dynamic_depthwise_conv2d(*(t.bfloat16().double() for t in (x, kernels, bias)))
    assert (out.double() - expected).abs().max() < 2e-2 * expected.abs().max()


@plain
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor; got list"),
        (dict(x=torch.zeros(2, 5, 3)), ValueError, r"x must have shape .*; got \(2, 5, 3\)"),
        (dict(x=torch.zeros(2, 0, 5, 3)), ValueError, r"x must have shape .*; got \(2, 0, 5, 3\)"),
        (dict(x=torch.zeros(2, 4, 5, 3, dtype=torch.int)), ValueError, "x must be a floating-point tensor"),
        (dict(kernels=torch.zeros(2, 3, 3, 3)), ValueError, r"kernels must have shape .*= \(2, 3, 9\); got"),
        (dict(kernels=torch.zeros(1, 3, 9)), ValueError, r"kernels must have shape .*; got \(1, 3, 9\)"),
        (dict(bias=torch.zeros(3)), ValueError, r"bias must have shape \(batch, channels\) = \(2, 3\); got \(3,\)"),
        (dict(impl="cuda"), ValueError, "impl must be one of auto, triton, torch; got 'cuda'"),
        (dict(impl="triton"), ValueError, "impl='triton' cannot run this call: the map is on cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = dict(x=torch.zeros(2, 4, 5, 3), kernels=torch.zeros(2, 3, 9)) | change
    with pytest.raises(error, match=message):
        dynamic_depthwise_conv2d(**arguments)


def by_triton(x, kernels, bias=None):
    return dynamic_depthwise_conv2d(x, kernels, bias, impl="triton")


def assert_as_good_as_the_definition(tensors):
    assert_as_good(by_triton, reference.dynamic_depthwise_conv2d, tensors)


@computes
@settings(max_examples=100 if DEVICE == "cuda" else 5, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 7),
    channels=st.sampled_from([1, 3, 40, 65, 96]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, height, width, channels, bias, dtype, seed):
    torch.manual_seed(seed)
    *tensors, shift = leaves(batch, height, width, channels, dtype, DEVICE)
    assert_as_good_as_the_definition([*tensors, shift if bias else None])


@computes
def test_half_precision():
    torch.manual_seed(0)
    assert_as_good_as_the_definition(leaves(1, 5, 7, 64, torch.float16, DEVICE))


@computes
@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_sums_are_complete_for_any_cut_of_the_images(programs, monkeypatch):
    from hybridzoo.kernels.depthwise import triton_impl

    monkeypatch.setattr(triton_impl, "PROGRAMS", programs)
    tuning.forget()
    torch.manual_seed(0)
    assert_as_good_as_the_definition(leaves(2, 13, 6, 32, torch.float32, DEVICE))


@computes
def test_kernels_read_only_their_inputs_and_write_all_outputs():
    """Views inside larger NaN buffers, and NaN in every fresh allocation."""
    torch.manual_seed(0)
    buffer = torch.full((4, 9, 10, 3, 24), torch.nan, device=DEVICE)
    view = buffer[1:3, 2:7, 1:9, 1, 4:20]
    view.copy_(torch.randn(view.shape))
    x = view.detach().requires_grad_()
    _, kernels, bias = leaves(2, 5, 8, 16, torch.float32, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()  # the trap is set
        out = by_triton(x, kernels, bias)
        grads = torch.autograd.grad(out.sin().sum(), (x, kernels, bias))
    finally:
        torch.use_deterministic_algorithms(False)
    exact = [t.detach().cpu().double().requires_grad_() for t in (x, kernels, bias)]
    expected = reference.dynamic_depthwise_conv2d(*exact)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    for grad, e in zip(grads, torch.autograd.grad(expected.sin().sum(), exact), strict=True):
        torch.testing.assert_close(grad.cpu().double(), e, rtol=1e-5, atol=1e-5)


@computes
def test_maps_kernels_and_gradients_may_have_any_strides():
    torch.manual_seed(0)
    x, kernels, bias = (t.detach() for t in leaves(2, 4, 6, 16, torch.float32, DEVICE))
    other = (
        x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        kernels.mT.contiguous().mT,
        bias.t().contiguous().t(),
    )
    grad = torch.randn(2, 16, 4, 6, device=DEVICE).permute(0, 2, 3, 1)
    one, two = (
        results(by_triton, [t.requires_grad_() for t in tensors], g)
        for tensors, g in (((x, kernels, bias), grad.contiguous()), (other, grad))
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@computes
def test_operators_are_well_formed():
    torch.manual_seed(0)
    x, kernels, bias = leaves(1, 2, 3, 16, torch.float32, DEVICE)
    torch.library.opcheck(operators.dynamic_depthwise_conv2d, (x, kernels, bias))
    torch.library.opcheck(operators.dynamic_depthwise_conv2d, (x, kernels, None))
    tensors = torch.randn_like(x), x.detach(), kernels.detach()
    torch.library.opcheck(operators.dynamic_depthwise_conv2d_backward, tensors)


@computes
def test_an_empty_batch_is_valid():
    tensors = leaves(0, 4, 5, 16, torch.float32, DEVICE)
    shapes = [tuple(t.shape) for t in results(by_triton, tensors, torch.empty(0, 4, 5, 16, device=DEVICE))]
    assert shapes == [(0, 4, 5, 16), (0, 4, 5, 16), (0, 16, 9), (0, 16)]


@computes
def test_a_second_derivative_raises():
    x, kernels, _ = leaves(1, 3, 3, 16, torch.float32, DEVICE)
    (grad,) = torch.autograd.grad(by_triton(x, kernels).sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="dynamic_depthwise_conv2d has no second derivative"):
        grad.sum().backward()


@computes
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_gradients_are_the_same_bits_every_time():
    tensors = leaves(16, 56, 56, 96, torch.bfloat16, DEVICE)
    grad = torch.randn_like(tensors[0])
    first, second = (results(by_triton, tensors, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@plain
@pytest.mark.parametrize("capability", triton_builds.CAPABILITIES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.exhaustive), torch.bfloat16], ids=str
)
def test_kernels_compile_without_spills(capability, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    from hybridzoo.kernels.depthwise import triton_impl

    for channels in (16, 96, 256):  # the blocks that there are
        x = torch.empty(64, 56, 56, channels, dtype=dtype, device="meta")
        kernels = torch.empty(64, channels, 9, dtype=dtype, device="meta")
        launches = [triton_impl.forward_launch(x, kernels, kernels[..., 0], x)]
        triton_builds.assert_builds(capability, [*launches, *triton_impl.backward_launches(x, x, kernels, x)[0]])
