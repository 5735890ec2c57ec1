"""The dynamic convolution of neighborhoods (torch path) against its definition and the published operator."""

from __future__ import annotations

import goldens
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.kernels import neighborhood_mix2d
from hybridzoo.kernels.mix import operators, reference, torch_impl
from hybridzoo.kernels.mix.given import Mix
from hybridzoo.kernels.neighborhood.given import Window

CASES = [name for name in goldens.names("ops", numeric=True) if name.startswith("contmix_core_")]


def inputs(batch, height, width, heads, head_dim, value_dim, kernel, **kwargs):
    """Query, taps, value, tap bias and position bias."""
    shapes = [
        (batch, height, width, heads, head_dim),
        (batch, heads, kernel[0] * kernel[1], head_dim),
        (batch, height, width, heads, value_dim),
        (heads, kernel[0] * kernel[1]),
        (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1),
    ]
    return [torch.randn(shape, **kwargs) for shape in shapes]


def result_and_gradients(function, leaves, grad):
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("name", CASES)
def test_published_values_and_gradients(name):
    """The published code projects likenesses to regions; here the regions are projected, once an image."""
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    small, large = meta["small_kernel"], meta["large_kernel"]
    names = ("q", "key", "proj_weight", "proj_bias", "rpb1", "rpb2", "v1", "v2")
    leaf = {key: data[key].requires_grad_() for key in names}
    taps = leaf["proj_weight"] @ leaf["key"]
    query, loss = leaf["q"].permute(0, 2, 3, 1, 4), 0
    for i, kernel, part in ((1, small, slice(small * small)), (2, large, slice(small * small, None))):
        out = neighborhood_mix2d(
            query,
            taps[:, :, part],
            leaf[f"v{i}"].permute(0, 2, 3, 1, 4),
            kernel,
            tap_bias=leaf["proj_bias"][part].expand(meta["groups"], -1),
            rpb=leaf[f"rpb{i}"],
            scale=meta["scale"],
        ).permute(0, 3, 1, 2, 4)
        goldens.assert_close(out, data[f"out{i}"])
        loss = loss + (out * data[f"grad_out{i}"]).sum()
    for key, grad in zip(names, torch.autograd.grad(loss, list(leaf.values())), strict=True):
        goldens.assert_close(grad, data[f"grad_{key}"])


sides, kernels, dilations = st.integers(1, 20), st.sampled_from([1, 3, 5, 7, 9]), st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(sides, sides), kernel=st.tuples(kernels, kernels), dilation=st.tuples(dilations, dilations),
    batch=st.integers(1, 2), heads=st.integers(1, 2), widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    biased=st.booleans(), seed=st.integers(0, 99), chunk=st.sampled_from([1, 3000, torch_impl.CHUNK]),
)  # fmt: skip
def test_any_shape_equals_the_reference(size, kernel, dilation, batch, heads, widths, biased, seed, chunk):
    torch.manual_seed(seed)
    leaves = inputs(batch, *size, heads, *widths, kernel, dtype=torch.float64)[: 5 if biased else 3]
    grad = torch.randn_like(leaves[2])

    def through(function):
        return lambda q, t, v, *tables: function(q, t, v, *(tables or (None, None)), kernel, dilation, 0.7)

    expected = result_and_gradients(through(reference.neighborhood_mix2d), leaves, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "CHUNK", chunk)
        ours = result_and_gradients(through(lambda *args: operators.mix(*args, "torch")[0]), leaves, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)

    def exportable(*args):
        return torch_impl.exportable_forward(Mix(*args[:5]), Window(*args[5:]))

    graph = result_and_gradients(through(exportable), leaves, grad)
    torch.testing.assert_close(graph, expected, rtol=1e-9, atol=1e-9)


def test_it_is_attention_to_the_places_of_the_window():
    """Where every window is the whole map, places are keys: attention with the taps as keys."""
    q, taps, v, tap_bias, rpb = inputs(2, 5, 3, 2, 4, 6, (5, 3), dtype=torch.float64)
    keys = taps.unflatten(2, (5, 3))
    scores = torch.einsum("byxhd,bhuvd->byxhuv", q, keys).flatten(-2) * 0.5 + tap_bias
    offsets = [torch.arange(n)[None] - torch.arange(n)[:, None] + n - 1 for n in (5, 3)]
    scores = scores + rpb[:, offsets[0][:, None, :, None], offsets[1][None, :, None, :]].permute(1, 2, 0, 3, 4).flatten(
        -2
    )
    expected = torch.einsum("byxht,bthe->byxhe", scores.softmax(-1), v.flatten(1, 2))
    out = neighborhood_mix2d(q, taps, v, (5, 3), tap_bias=tap_bias, rpb=rpb, scale=0.5)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("size", "kernel", "dilation"), [((4, 5), (3, 5), (1, 2)), ((7, 3), (3, 3), (1, 1))])
def test_gradcheck(size, kernel, dilation):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in inputs(1, *size, 2, 2, 1, kernel, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, t, v, b, r: neighborhood_mix2d(q, t, v, kernel, dilation, tap_bias=b, rpb=r), leaves
    )


@pytest.mark.parametrize("biased", [True, False])
def test_operators_are_well_formed(biased):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in inputs(2, 6, 8, 2, 4, 3, (3, 3))[: 5 if biased else 3]]
    where = [3, 3], [1, 2], 0.5, "torch"
    nothing = [] if biased else [None, None]
    torch.library.opcheck(operators.neighborhood_mix2d, (*leaves, *nothing, *where))
    tensors = [*(t.detach() for t in leaves), *nothing]
    out, lse = operators.neighborhood_mix2d(*tensors, *where)
    args = (torch.randn_like(out), *tensors, out, lse, *where)
    torch.library.opcheck(operators.neighborhood_mix2d_backward, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_reference(dtype):
    torch.manual_seed(0)
    leaves = inputs(2, 9, 8, 2, 8, 8, (5, 5), dtype=torch.float64)
    grad = torch.randn_like(leaves[2])

    def definition(q, t, v, b, r):
        return reference.neighborhood_mix2d(q, t, v, b, r, (5, 5), (1, 1), 0.25)

    def ours(q, t, v, b, r):
        return neighborhood_mix2d(q, t, v, 5, tap_bias=b, rpb=r, scale=0.25)

    low = [t.to(dtype) for t in leaves]
    exact = result_and_gradients(definition, leaves, grad)
    for e, n, o in zip(exact, *(result_and_gradients(f, low, grad) for f in (definition, ours)), strict=True):
        assert o.dtype == dtype
        allowed = (n.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        assert (o.double() - e).abs().max() <= allowed


@pytest.mark.parametrize(("size", "dilation"), [((19, 20), 1), ((13, 10), 3), ((4, 3), 2)])
def test_uninitialised_memory_is_never_read_and_two_runs_give_the_same_bits(size, dilation):
    """Deterministic mode fills every fresh allocation with NaN."""
    torch.manual_seed(0)
    leaves = inputs(2, *size, 2, 4, 3, (7, 5))
    grad = torch.randn_like(leaves[2])

    def run():
        return result_and_gradients(
            lambda q, t, v, b, r: neighborhood_mix2d(q, t, v, (7, 5), dilation, tap_bias=b, rpb=r), leaves, grad
        )

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()  # the trap is set
        made = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in made)
    assert all(torch.equal(a, b) for a, b in zip(made, run(), strict=True))


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_tensor_is_as_wide_as_a_window():
    leaves, window = inputs(1, 84, 84, 2, 8, 8, (13, 13)), Window((13, 13), (1, 1), 1.0)
    with _Largest() as mode:
        out = torch_impl.forward(Mix(*leaves), window)
        torch_impl.backward(out, Mix(*leaves), out, window)
    assert mode.bytes <= max(3 * leaves[0].untyped_storage().nbytes(), 8 * torch_impl.CHUNK)
    assert mode.bytes < 169 * leaves[0][..., 0].numel() * 4 / 4  # the scores of all places


def test_only_inputs_and_the_result_are_kept_with_any_strides():
    packed = torch.randn(2, 3, 2, 4, 11, 15, requires_grad=True).permute(0, 4, 5, 1, 2, 3)
    query, value, _ = packed.unbind(3)  # channels first: no axis where one expects it
    taps, saved = torch.randn(2, 2, 9, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = neighborhood_mix2d(query, taps, value, 3, 2)
    assert out.is_contiguous()
    assert {t.data_ptr() for t in saved if t.numel()} == {t.data_ptr() for t in (query, value, taps, out)}
    torch.testing.assert_close(out, neighborhood_mix2d(query.contiguous(), taps, value.contiguous(), 3, 2))


def test_counters_count_scores_and_sums():
    q, taps, v, *_ = inputs(2, 9, 8, 2, 4, 6, (3, 5))
    leaves = [t.requires_grad_() for t in (q, taps, v)]
    with FlopCounterMode(display=False) as counter:
        out = neighborhood_mix2d(*leaves, (3, 5))
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = 2 * 2 * 9 * 8 * 15
    assert forward == 2 * pairs * (4 + 6)
    assert counter.get_total_flops() == forward + 2 * pairs * (3 * 4 + 2 * 6)


def test_compiles_as_one_node_and_exports_into_plain_operators():
    torch.manual_seed(0)
    leaves = inputs(2, 12, 9, 2, 8, 8, (5, 5))

    class Mix(torch.nn.Module):
        def forward(self, q, t, v, b, r):
            return neighborhood_mix2d(q, t, v, 5, tap_bias=b, rpb=r)

    expected = Mix()(*leaves)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Mix(), fullgraph=True, backend="aot_eager")(*leaves), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch}, {0: batch}, {0: batch}, None, None)
    program = torch.export.export(Mix(), tuple(leaves), dynamic_shapes=shapes)
    assert not [n for n in program.graph.nodes if "hybridzoo" in str(n.target)]
    more = inputs(5, 12, 9, 2, 8, 8, (5, 5))
    torch.testing.assert_close(program.module()(*more), Mix()(*more))


def test_exports_for_any_height_and_width():
    torch.manual_seed(0)

    class Mix(torch.nn.Module):
        def forward(self, q, t, v, b, r):
            return neighborhood_mix2d(q, t, v, 3, 2, tap_bias=b, rpb=r)

    batch, open_side = torch.export.Dim("batch", min=1), torch.export.Dim.AUTO
    sides = {0: batch, 1: open_side, 2: open_side}
    given = inputs(2, 12, 19, 2, 4, 6, (3, 3))
    program = torch.export.export(Mix(), tuple(given), dynamic_shapes=(sides, {0: batch}, sides, None, None))
    assert not [n for n in program.graph.nodes if "hybridzoo" in str(n.target)]
    for size in ((5, 12, 19), (1, 31, 9), (2, 4, 40)):
        other = inputs(*size, 2, 4, 6, (3, 3))
        torch.testing.assert_close(program.module(check_guards=False)(*other), Mix()(*other))


def test_autocast_does_not_change_the_precision():
    leaves = inputs(1, 12, 15, 2, 16, 16, (3, 3))
    expected = neighborhood_mix2d(*leaves[:3], 3, rpb=leaves[4])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(neighborhood_mix2d(*leaves[:3], 3, rpb=leaves[4]), expected)


def test_an_empty_batch_has_an_empty_result():
    q, taps, v, tap_bias, rpb = (t.requires_grad_() for t in inputs(0, 6, 7, 2, 4, 3, (3, 3)))
    out = neighborhood_mix2d(q, taps, v, 3, tap_bias=tap_bias, rpb=rpb)
    assert out.shape == (0, 6, 7, 2, 3)
    out.sum().backward()
    assert not rpb.grad.any()
    assert not tap_bias.grad.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(query=torch.randn(2, 6, 7, 8)),
            ValueError,
            r"query must have shape \(batch, height, width, heads, head_dim",
        ),
        (
            dict(taps=torch.randn(2, 2, 8, 4)),
            ValueError,
            r"taps must have shape .* = \(2, 2, 9, 4\); got \(2, 2, 8, 4\)",
        ),
        (dict(taps=None), TypeError, "taps must be a tensor; got NoneType"),
        (dict(value=torch.randn(2, 6, 8, 2, 4)), ValueError, r"value must have shape .* = \(2, 6, 7, 2, 4\); got"),
        (dict(value=torch.randn(2, 6, 7, 2, 4).half()), ValueError, "value must share dtype and device with query"),
        (dict(tap_bias=torch.randn(9)), ValueError, r"tap_bias must have shape \(heads, rows \* columns\) = \(2, 9\)"),
        (dict(rpb=torch.randn(2, 5, 4)), ValueError, r"rpb must have shape .* = \(2, 5, 5\); got \(2, 5, 4\)"),
        (dict(kernel_size=4), ValueError, "kernel_size must be odd"),
        (dict(dilation=0), ValueError, "dilation must be a positive whole number"),
        (dict(impl="cuda"), ValueError, "impl must be one of auto, triton, torch; got 'cuda'"),
        (dict(impl="triton"), ValueError, "impl='triton' cannot run this call: .*; use impl='torch' or 'auto'"),
    ],
)
def test_bad_arguments_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = dict(
        query=torch.randn(2, 6, 7, 2, 4), taps=torch.randn(2, 2, 9, 4), value=torch.randn(2, 6, 7, 2, 4), kernel_size=3
    )
    with pytest.raises(error, match=message):
        neighborhood_mix2d(**arguments | change)


def test_a_second_derivative_is_refused():
    leaves = [t.requires_grad_() for t in inputs(1, 5, 5, 1, 2, 2, (3, 3))[:3]]
    (first,) = torch.autograd.grad(neighborhood_mix2d(*leaves, 3).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="neighborhood_mix2d has no second derivative"):
        torch.autograd.grad(first.sum(), leaves[0])
