"""Neighborhood attention (torch path) against its definition and the published operator: values, gradients, errors."""

from __future__ import annotations

import builtins
import math

import goldens
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hybridzoo.kernels import arguments, na2d, na2d_packed
from hybridzoo.kernels.neighborhood import any_size, operators, reference, torch_impl
from hybridzoo.kernels.neighborhood.given import Maps, Window

INDEX = goldens.manifest("ops", "na2d")
CASES = [name for name, case in INDEX["cases"].items() if case["kind"] == "op"]


def inputs(batch, height, width, heads, head_dim, kernel=None, **kwargs):
    """query, key, value and, where a kernel is given, rpb."""
    made = [torch.randn(batch, height, width, heads, head_dim, **kwargs) for _ in range(3)]
    if kernel is not None:
        made.append(torch.randn(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, **kwargs))
    return made


def result_and_gradients(function, leaves, grad):
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("name", CASES)
def test_published_values_and_gradients(name):
    case, data = INDEX["cases"][name], goldens.numbers("ops", name)
    leaves = [data[letter].permute(0, 2, 3, 1, 4) for letter in "qkv"] + ([data["rpb"]] if case["has_rpb"] else [])

    def attend(q, k, v, rpb=None):
        return na2d(q, k, v, tuple(case["kernel"]), tuple(case["dilation"]), rpb=rpb, scale=case["scale"])

    out, *grads = result_and_gradients(attend, leaves, data["grad_out"].permute(0, 2, 3, 1, 4))
    goldens.assert_close(out.permute(0, 3, 1, 2, 4), data["out"])
    for letter, grad in zip("qkv", grads, strict=False):
        goldens.assert_close(grad.permute(0, 3, 1, 2, 4), data[f"d{letter}"])
    if case["has_rpb"]:
        goldens.assert_close(grads[3], data["drpb"])


@pytest.mark.parametrize("table", INDEX["axis_tables"], ids=lambda t: f"L{t['L']}k{t['kernel']}d{t['dilation']}")
def test_published_neighborhoods(table):
    keys, entries = zip(*reference.axis_table(table["L"], table["kernel"], table["dilation"]), strict=True)
    assert list(keys) == table["keys"]
    assert list(entries) == table["rpb_index"]


def test_a_window_wider_than_its_group_is_the_whole_group():
    # 5 tokens, dilation 2: groups {0, 2, 4} and {1, 3}, both smaller than 7.
    table = reference.axis_table(5, 7, 2)
    assert [keys for keys, _ in table] == [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3], [0, 2, 4]]
    assert table[2][1] == [5, 6, 7]  # steps -1, 0, 1 around the middle of 13 entries


sides, kernels, dilations = st.integers(1, 26), st.sampled_from([1, 3, 5, 7, 9]), st.integers(1, 4)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(sides, sides), kernel=st.tuples(kernels, kernels), dilation=st.tuples(dilations, dilations),
    batch=st.integers(1, 2), heads=st.integers(1, 2), head_dim=st.integers(1, 5), biased=st.booleans(),
    seed=st.integers(0, 99), chunk=st.sampled_from([1, 3000, torch_impl.CHUNK_BACKWARD]),
)  # fmt: skip
def test_any_shape_equals_the_reference(size, kernel, dilation, batch, heads, head_dim, biased, seed, chunk):
    torch.manual_seed(seed)
    leaves = inputs(batch, *size, heads, head_dim, kernel if biased else None, dtype=torch.float64)
    grad = torch.randn_like(leaves[0])
    where = (kernel, dilation, 0.7)

    def through(function):
        return lambda q, k, v, rpb=None: function(q, k, v, rpb, *where)

    expected = result_and_gradients(through(reference.na2d), leaves, grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "CHUNK_FORWARD", chunk)
        patch.setattr(torch_impl, "CHUNK_BACKWARD", chunk)
        ours = result_and_gradients(through(lambda *args: operators.attend(*args, "torch", False)[0]), leaves, grad)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        packed = through(
            lambda q, k, v, *rest: na2d_packed(torch.stack((q, k, v), 3), *rest[1:3], rpb=rest[0], scale=0.7)
        )
        torch.testing.assert_close(result_and_gradients(packed, leaves, grad), ours)

    def exportable(q, k, v, rpb, *where):
        return torch_impl.exportable_forward(Maps(q, k, v), rpb, Window(*where))[0]

    graph = result_and_gradients(through(exportable), leaves, grad)
    torch.testing.assert_close(graph, expected, rtol=1e-9, atol=1e-9)

    def of_any_size(q, k, v, rpb=None):
        return any_size.forward(q, k, v, rpb, None, *where)

    torch.testing.assert_close(result_and_gradients(of_any_size, leaves, grad), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.tuples(kernels, kernels),
    dilation=st.tuples(dilations, dilations), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_fill_equals_a_map_that_has_these_tokens(size, kernel, dilation, biased, seed):
    torch.manual_seed(seed)
    leaves = inputs(2, *size, 2, 3, kernel if biased else None, dtype=torch.float64)
    leaves.append(torch.randn(2, 2, 3, dtype=torch.float64))
    grad = torch.randn_like(leaves[0])

    def definition(q, k, v, *rest):
        rpb, fill = (None, *rest)[-2:]
        return reference.na2d(q, k, v, rpb, kernel, dilation, 0.7, fill)

    def ours(q, k, v, *rest):
        rpb, fill = (None, *rest)[-2:]
        # Where nothing lies beyond, nothing reaches the fill.
        return na2d(q, k, v, kernel, dilation, rpb=rpb, fill=fill, scale=0.7) + 0 * fill.sum()

    def of_any_size(q, k, v, *rest):
        return any_size.forward(q, k, v, *(None, *rest)[-2:], kernel, dilation, 0.7) + 0 * rest[-1].sum()

    expected = result_and_gradients(lambda *args: definition(*args) + 0 * args[-1].sum(), leaves, grad)
    torch.testing.assert_close(result_and_gradients(ours, leaves, grad), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result_and_gradients(of_any_size, leaves, grad), expected, rtol=1e-9, atol=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "exporting", lambda: True)
        torch.testing.assert_close(result_and_gradients(ours, leaves, grad), expected, rtol=1e-9, atol=1e-9)


def test_fill_costs_little():
    """What the published code appends would make 49 times the map here, and as many products."""
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = torch.randn(3, 8, 8, 8, 2, 32)
    counts = []
    for fill in (None, torch.randn(2, 2, 32)):
        with FlopCounterMode(display=False) as counter:
            na2d(q, k, v, 7, 8, fill=fill)
        counts.append(counter.get_total_flops())
    assert 0 < counts[0] < counts[1] < 1.5 * counts[0]


@pytest.mark.parametrize(("size", "kernel", "dilation"), [((4, 5), (3, 5), (1, 2)), ((13, 3), (3, 3), (1, 1))])
def test_gradcheck(size, kernel, dilation):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in inputs(1, *size, 2, 2, kernel, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v, rpb: na2d(q, k, v, kernel, dilation, rpb=rpb), leaves)


@pytest.mark.parametrize("biased", [True, False])
def test_operators_are_well_formed(biased):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in inputs(2, 6, 8, 2, 4, (3, 3) if biased else None)]
    where = [3, 3], [1, 2], 0.5, "torch"
    tensors = [t.detach() for t in leaves] + ([] if biased else [None])
    for with_lse in (False, True):
        torch.library.opcheck(operators.na2d, (*leaves, *([] if biased else [None]), *where, with_lse))
        out, lse = operators.na2d(*tensors, *where, with_lse)
        grads = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
        for want_rpb in {False, biased}:
            args = (grads[0], *tensors, out, lse, grads[1], *where, want_rpb)
            torch.library.opcheck(operators.na2d_backward, args)
    packed = torch.stack(leaves[:3], 3).detach().requires_grad_(), None, None, leaves[3] if biased else None
    torch.library.opcheck(operators.na2d, (*packed, *where, False))
    detached = [None if t is None else t.detach() for t in packed]
    args = (grads[0], *detached, out, lse, None, *where, biased)
    torch.library.opcheck(operators.na2d_backward, args)


def test_the_gradient_of_a_packed_projection_is_not_concatenated():
    """Nothing copies three gradients into one; in low precision too, where sums are wider."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(1, 9, 8, 3, 2, 4, dtype=dtype, requires_grad=True)
        found = []
        for attend in (lambda t: na2d(*t.unbind(3), 3, rpb=rpb), lambda t: na2d_packed(t, 3, rpb=rpb)):
            out = attend(qkv)
            with Names() as mode:
                found.append(torch.autograd.grad(out.float().sin().sum(), (qkv, rpb)))
        assert "na2d_backward" in mode.seen
        assert not mode.seen & {"stack", "cat"}
        torch.testing.assert_close(*found)


def test_a_packed_projection_is_checked_compiled_exported_and_filled():
    torch.manual_seed(0)
    qkv, fill = torch.randn(1, 6, 9, 3, 2, 4), torch.randn(2, 2, 4)
    attend = lambda qkv: na2d_packed(qkv, 3, (2, 1))  # noqa: E731
    expected = na2d(*qkv.unbind(3), 3, (2, 1))
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(qkv), expected)
    torch.testing.assert_close(torch.func.vmap(attend)(qkv[:, None])[:, 0], expected)
    assert torch.equal(na2d_packed(qkv, 7, fill=fill), na2d(*qkv.unbind(3), 7, fill=fill))
    with pytest.raises(ValueError, match=r"qkv must have shape \(batch, height, width, 3, heads, head_dim\); got"):
        na2d_packed(qkv[:, :, :, 0], 3)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        na2d_packed(qkv, 4)
    with pytest.raises(TypeError, match="qkv must be a tensor"):
        na2d_packed(None, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_reference(dtype):
    torch.manual_seed(0)
    leaves = inputs(2, 17, 12, 2, 16, (5, 5), dtype=torch.float64)
    low = [t.to(dtype) for t in leaves]
    grad = torch.randn_like(leaves[0])

    def definition(q, k, v, rpb):
        return reference.na2d(q, k, v, rpb, (5, 5), (1, 2), 0.25)

    exact = result_and_gradients(definition, leaves, grad)
    naive = result_and_gradients(definition, low, grad)
    ours = result_and_gradients(lambda q, k, v, rpb: na2d(q, k, v, 5, (1, 2), rpb=rpb, scale=0.25), low, grad)
    for e, n, o in zip(exact, naive, ours, strict=True):
        assert o.dtype == dtype
        allowed = (n.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        assert (o.double() - e).abs().max() <= allowed


def test_autocast_does_not_change_the_precision():
    """Half maps from an autocast projection meet a float32 bias; float32 maps are computed in float32 throughout."""
    torch.manual_seed(0)
    q, k, v, rpb = inputs(1, 12, 15, 2, 16, (3, 3))
    rpb.requires_grad_()
    expected = na2d(q, k, v, 3, rpb=rpb)
    with torch.autocast("cpu", torch.bfloat16):
        out, half = na2d(q, k, v, 3, rpb=rpb), na2d(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3, rpb=rpb)
    assert torch.equal(out, expected)
    assert half.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(half.float().sum(), rpb)
    assert grad.dtype == torch.float32


def test_strided_views_of_a_packed_projection():
    torch.manual_seed(0)
    packed = torch.randn(2, 3, 2, 4, 11, 15, requires_grad=True)  # channels first: no axis where one expects it
    views = packed.permute(0, 4, 5, 1, 2, 3)[:, 1:, ::2].unbind(3)
    out = na2d(*views, 3, 2)
    (grad,) = torch.autograd.grad(out.sin().sum(), packed)
    copies = [t.detach().contiguous().requires_grad_() for t in views]
    expected = na2d(*copies, 3, 2)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(expected.sin().sum(), copies)
    torch.testing.assert_close(grad.permute(0, 4, 5, 1, 2, 3)[:, 1:, ::2].unbind(3), grads)
    assert out.is_contiguous()


def test_gradients_may_have_any_strides():
    torch.manual_seed(0)
    leaves = inputs(1, 6, 7, 2, 4, (3, 3))
    grad = torch.randn(1, 2, 4, 6, 7).permute(0, 3, 4, 1, 2)

    def attend(q, k, v, rpb):
        return na2d(q, k, v, 3, rpb=rpb)

    torch.testing.assert_close(
        result_and_gradients(attend, leaves, grad), result_and_gradients(attend, leaves, grad.contiguous())
    )
    (of_sum,) = torch.autograd.grad(attend(*[t.requires_grad_() for t in leaves]).sum(), leaves[2])  # strides all 0
    torch.testing.assert_close(of_sum.sum(), torch.tensor(float(of_sum.numel())))  # every query's weights sum to 1


@pytest.mark.parametrize(("size", "dilation"), [((19, 30), 1), ((13, 10), 3), ((4, 3), 2)])
def test_uninitialised_memory_is_never_read(size, dilation):
    """Deterministic mode fills every fresh allocation with NaN."""
    torch.manual_seed(0)
    leaves = inputs(2, *size, 2, 4, (7, 5))
    grad = torch.randn_like(leaves[0])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()  # the trap is set
        made = result_and_gradients(lambda q, k, v, rpb: na2d(q, k, v, (7, 5), dilation, rpb=rpb), leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in made)


def test_gradients_are_the_same_bits_every_time():
    torch.manual_seed(0)
    leaves = inputs(2, 40, 33, 2, 16, (7, 7))
    grad = torch.randn_like(leaves[0])
    first, second = (
        result_and_gradients(lambda q, k, v, rpb: na2d(q, k, v, 7, rpb=rpb), leaves, grad) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_frozen_bias_needs_no_gradient(monkeypatch):
    q, k, v, rpb = inputs(1, 6, 6, 1, 4, (3, 3))
    wanted = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.hybridzoo.na2d_backward.default:
                wanted.append(args[-1])
            return func(*args, **(kwargs or {}))

    for trains in (False, True):
        out = na2d(q.requires_grad_(), k, v, 3, rpb=rpb.requires_grad_(trains))
        with Watch():
            out.sum().backward()
    assert wanted == [False, True]


def test_no_gradient_of_the_bias_without_a_bias():
    q, k, v = (t.requires_grad_() for t in inputs(1, 8, 8, 1, 4))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(na2d(q, k, v, 3).square().sum(), (q, k, v)))
    frozen = torch.zeros(1, 5, 5)
    na2d(q, k, v, 3, rpb=frozen).sum().backward()
    assert frozen.grad is None


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dilation", [1, 3])
def test_memory_is_linear_in_tokens_and_far_below_gathered_neighborhoods(dilation):
    largest = []
    for side in (56, 112):
        q, k, v, rpb = inputs(1, side, side, 1, 8, (7, 7))
        window = Window((7, 7), (dilation, dilation), 1.0)
        with _Largest() as mode:
            maps = Maps(q, k, v)
            out, _ = torch_impl.forward(maps, rpb, window)
            torch_impl.backward(out, maps, rpb, out, None, window, Maps(*map(torch.empty_like, maps)), True)
        allowed = max(3 * q.untyped_storage().nbytes(), 4 * torch_impl.CHUNK_BACKWARD)
        assert mode.bytes <= allowed  # neighborhoods of the keys alone: 49 times the map
        largest.append(mode.bytes)
    assert largest[1] <= 4.2 * largest[0]


def test_between_the_passes_only_inputs_and_the_result_are_kept():
    leaves = [t.requires_grad_() for t in inputs(1, 20, 20, 2, 8, (7, 7))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = na2d(*leaves[:3], 7, rpb=leaves[3])
    kept = {t.data_ptr() for t in saved if t.numel()}
    assert kept == {t.data_ptr() for t in (*leaves, out)}


def test_compiles_as_one_node_per_direction():
    torch.manual_seed(0)
    leaves = inputs(2, 12, 9, 2, 8, (5, 5))
    grad, graphs = torch.randn_like(leaves[0]), []

    def attend(q, k, v, rpb):
        return na2d(q, k, v, 5, (1, 2), rpb=rpb) * 2

    def keep(graph, example):
        graphs.append(graph)
        return torch._functorch.aot_autograd.make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    ours, expected = (result_and_gradients(f, leaves, grad) for f in (compiled, attend))
    torch.testing.assert_close(ours, expected)
    nodes = [[str(n.target) for n in graph.graph.nodes if "hybridzoo" in str(n.target)] for graph in graphs]
    assert nodes == [["hybridzoo.na2d.default"], ["hybridzoo.na2d_backward.default"]]


@pytest.mark.filterwarnings("ignore")  # of a trace, that it holds for one size, and is deprecated
def test_compilers_accept_one_tensor_as_query_key_and_value():
    x = torch.randn(1, 6, 7, 2, 4)
    attend = lambda x: na2d(x, x, x, 3, scale=0.5)  # noqa: E731
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(x), attend(x))
    assert "hybridzoo::" not in str(torch.jit.trace(attend, x).graph)
    qkv = torch.randn(1, 6, 7, 3, 2, 4)
    packed = lambda qkv: na2d_packed(qkv, 3)  # noqa: E731  # in a trace, the default scale is a tensor
    torch.testing.assert_close(torch.jit.trace(packed, qkv)(qkv), packed(qkv))


def test_compiles_once_for_all_sizes():
    compiled = torch.compile(lambda q, k, v: na2d(q, k, v, 3), fullgraph=True, dynamic=True, backend=CompileCounter())
    for size in ((8, 9), (11, 6), (2, 5)):
        q, k, v = inputs(2, *size, 2, 4)
        torch.testing.assert_close(compiled(q, k, v), na2d(q, k, v, 3))


def test_functional_derivatives():
    torch.manual_seed(0)
    leaves = inputs(2, 5, 6, 2, 4, (3, 3))

    def loss(q, k, v, rpb):
        return na2d(q, k, v, 3, rpb=rpb).square().sum()

    expected = result_and_gradients(loss, leaves, torch.ones(()))[1:]
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2, 3))(*leaves), expected)
    torch.testing.assert_close(torch.func.vjp(loss, *leaves)[1](torch.ones(())), expected)
    per_image = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, 0, None))
    each = per_image(*(t[:, None] for t in leaves[:3]), leaves[3])
    torch.testing.assert_close([t[:, 0] for t in each], list(expected[:3]))


def test_derivatives_that_do_not_exist_are_named():
    q, k, v, rpb = inputs(1, 5, 6, 2, 4, (3, 3))
    attend = lambda q: na2d(q, k, v, 3, rpb=rpb)  # noqa: E731
    with pytest.raises(NotImplementedError, match="na2d has no forward-mode derivative"):
        torch.func.jvp(attend, (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="na2d has no forward-mode"):
        attend(torch.autograd.forward_ad.make_dual(q, q))
    q.requires_grad_()
    (once,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="na2d has no second derivative"):
        torch.autograd.grad(once.sum(), q)
    with pytest.raises(NotImplementedError, match="na2d has no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: attend(q).square().sum())(q).sum())(q)


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    leaves = inputs(1, 5, 6, 2, 4, (3, 3))
    attend = lambda *t: na2d(*t[:3], 3, rpb=t[3])  # noqa: E731
    again = lambda *t: torch.utils.checkpoint.checkpoint(attend, *t, use_reentrant=False)  # noqa: E731
    grad = torch.randn_like(leaves[0])
    kept, recomputed = (result_and_gradients(f, leaves, grad) for f in (attend, again))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("biased", [True, False])
def test_an_empty_batch(biased):
    leaves = inputs(0, 9, 11, 2, 4, (3, 3) if biased else None)
    out, *grads = result_and_gradients(
        lambda q, k, v, rpb=None: na2d(q, k, v, 3, 2, rpb=rpb), leaves, torch.zeros(0, 9, 11, 2, 4)
    )
    assert out.shape == (0, 9, 11, 2, 4)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert not grads[-1].any()


class _Attend(torch.nn.Module):
    def __init__(self, dilation):
        super().__init__()
        self.rpb, self.dilation = torch.nn.Parameter(torch.randn(2, 13, 13)), dilation
        self.impl = "auto"

    def forward(self, qkv):
        return na2d(*qkv.unbind(3), 7, self.dilation, rpb=self.rpb, impl=self.impl)


@pytest.mark.parametrize("dilation", [1, 3])
def test_exports_without_our_operator_for_any_batch(dilation):
    torch.manual_seed(0)
    module, qkv = _Attend(dilation).eval(), torch.randn(2, 20, 31, 3, 2, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (qkv,), dynamic_shapes=({0: batch},))
    assert not [n for n in program.graph.nodes if "hybridzoo" in str(n.target)]
    assert len(program.graph.nodes) < 400
    more = torch.randn(5, 20, 31, 3, 2, 8)
    torch.testing.assert_close(program.module()(more), module(more))


@pytest.mark.parametrize("dilation", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_exports_for_any_height_and_width(dilation):
    torch.manual_seed(0)
    module, qkv = _Attend(dilation).eval(), torch.randn(2, 20, 31, 3, 2, 8)
    sides = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(module, (qkv,), dynamic_shapes=(sides,))
    assert not [n for n in program.graph.nodes if "hybridzoo" in str(n.target)]
    for size in ((5, 20, 31), (1, 50, 9), (2, 4, 70)):
        other = torch.randn(*size, 3, 2, 8)
        torch.testing.assert_close(program.module()(other), module(other))


def test_unsupported_exports_are_named():
    module, qkv = _Attend(1).eval(), torch.randn(2, 20, 31, 3, 2, 8)
    module.impl = "triton"
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this call: .*(exported|not installed)"):
        torch.export.export(module, (qkv,))


def test_an_export_under_autocast_keeps_the_inputs_precision():
    torch.manual_seed(0)
    module, qkv = _Attend(1).eval(), torch.randn(2, 20, 31, 3, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(module, (qkv,))
    out = program.module()(qkv)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(qkv))


def test_flop_counters_count_multiplications_and_additions():
    def count(size, kernel, dilation):
        leaves = [t.requires_grad_() for t in inputs(2, *size, 3, 4)]
        with FlopCounterMode(display=False) as counter:
            na2d(*leaves, kernel, dilation).sum().backward()
        counted = counter.get_flop_counts()["Global"]
        return [counted[op] for op in (torch.ops.hybridzoo.na2d, torch.ops.hybridzoo.na2d_backward)]

    pairs = 2 * 3 * 14 * 15 * 5 * 7 * 4  # every query meets kernel x kernel keys
    assert count((14, 15), (5, 7), (2, 1)) == [4 * pairs, 10 * pairs]
    seen = [sum(len(keys) for keys, _ in reference.axis_table(side, 7, 2)) for side in (5, 12)]  # groups of 2, 3 and 6
    assert count((5, 12), 7, 2)[0] == 4 * 2 * 3 * math.prod(seen) * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 8, 8, 16)), "query must have shape"),
        (dict(query=torch.zeros(2, 8, 8, 2, 8, dtype=torch.int32)), "query must be a floating-point"),
        (dict(query=torch.zeros(2, 8, 8, 2, 8, dtype=torch.float8_e5m2)), "query must be .*; got torch.float8_e5m2"),
        (dict(query=torch.zeros(2, 0, 8, 2, 8)), "query must have at least one row, column, head and channel"),
        (dict(query=torch.zeros(2, 8, 8, 0, 8)), r"query must have at least one row.*got \(2, 8, 8, 0, 8\)"),
        (dict(query=torch.zeros(2, 8, 8, 2, 0)), "query must have at least one row"),
        (dict(key=torch.zeros(2, 8, 9, 2, 8)), "key must have the shape of query"),
        (dict(value=torch.zeros(2, 8, 8, 2, 8).double()), "value must share dtype"),
        (dict(kernel_size=4), "kernel_size must be odd, .*; got 4"),
        (dict(kernel_size=(3, 2)), r"kernel_size must be odd, .*; got \(3, 2\)"),
        (dict(kernel_size=-3), "kernel_size must be a positive whole number or a pair .*; got -3"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size must be a positive whole number or a pair"),
        (dict(dilation=0), "dilation must be a positive whole number or a pair .*; got 0"),
        (dict(kernel_size=True), "kernel_size must be a positive whole number or a pair .*; got True"),
        (dict(kernel_size=None), "kernel_size must be a positive whole number or a pair .*; got None"),
        (dict(scale=math.nan), "scale must be finite; got nan"),
        (dict(impl=None), "impl must be one of auto, triton, torch; got None"),
        (dict(dilation=1.5), "dilation must be a positive whole number or a pair .*; got 1.5"),
        (dict(rpb=torch.zeros(2, 5, 7)), r"rpb must have shape .* = \(2, 5, 5\); got \(2, 5, 7\)"),
        (dict(rpb=torch.zeros(2, 5, 5, dtype=torch.int32)), "rpb must be floating-point"),
        (dict(impl="cuda"), "impl must be one of auto, triton, torch; got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(
        query=torch.zeros(2, 8, 8, 2, 8), key=torch.zeros(2, 8, 8, 2, 8), value=torch.zeros(2, 8, 8, 2, 8),
        kernel_size=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        na2d(**{**args, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=None), "query must be a tensor; got NoneType"),
        (dict(key=[1.0]), "key must be a tensor; got list"),
        (dict(rpb="no"), "rpb must be a tensor; got str"),
        (dict(scale="a"), "scale must be a number, or None for the default; got 'a'"),
        (dict(scale=torch.ones(())), "scale must be a number, got a tensor, .* Multiply query by the tensor"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(change, message):
    args = dict(zip(("query", "key", "value"), inputs(2, 8, 8, 2, 8), strict=True), kernel_size=3)
    with pytest.raises(TypeError, match=message):
        na2d(**{**args, **change})


def test_numbers_may_have_any_type():
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(0)
    q, k, v = inputs(1, 8, 9, 2, 8)
    same = na2d(q, k, v, [numpy.int64(3), 5], numpy.int32(2), scale=numpy.float32(0.5))
    assert torch.equal(same, na2d(q, k, v, (3, 5), 2, scale=0.5))


def test_windows_that_triton_does_not_support_are_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v = inputs(1, 8, 8, 1, 16)
    with pytest.raises(ValueError, match=r"cannot run this call: kernel_size \(3, 15\) does not lie between 3 and 13"):
        na2d(q, k, v, (3, 15), impl="triton")


def test_explicit_triton_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = inputs(1, 8, 8, 1, 16)
    with pytest.raises(
        ValueError, match=r"impl='triton' cannot run this call: .* cpu, not on CUDA, .*use impl='torch'"
    ):
        na2d(q, k, v, 3, impl="triton")
    monkeypatch.setattr(arguments, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="impl='triton' cannot run this call: Triton is not installed"):
        na2d(q, k, v, 3, impl="triton")


def test_the_torch_path_does_not_import_triton(monkeypatch):
    genuine = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert "triton" not in name, name
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for impl in ("auto", "torch"):
        na2d(*inputs(1, 8, 8, 1, 16), 3, impl=impl)
