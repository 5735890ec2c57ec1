"""Routed attention against its definition and the published implementation: values, gradients, odd shapes, errors."""

from __future__ import annotations

import math
import os

import goldens
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from hybridzoo.kernels import bi_level_route, routed_attention2d
from hybridzoo.kernels.routed import operators, reference, torch_impl
from hybridzoo.kernels.routed.grid import Grid

CORES = [n for n in goldens.names("ops", numeric=True) if n.startswith("bra_core_")]


@pytest.fixture(params=["dense", "by region"])
def grouping(request, monkeypatch):
    """Run a test through each of the two groupings, whatever the shapes would choose."""
    monkeypatch.setattr(torch_impl, "prefers_dense", lambda query, routes: request.param == "dense")


def maps(batch, height, width, heads, head_dim, **kwargs):
    return [torch.randn(batch, height, width, heads, head_dim, **kwargs) for _ in range(3)]


@pytest.mark.parametrize("name", CORES)
def test_published_values_and_gradients(name, grouping):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    grid, size = tuple(meta["regions"]), meta["region_size"]
    shape = data["q"].shape
    leaves = [data[n].clone().requires_grad_() for n in "qkv"]
    q, k, v = (t.unflatten(-1, (meta["heads"], -1)) for t in leaves)
    if grid == Grid.of(q, *grid)[:2] and tuple(size) == Grid.of(q, *grid)[2:]:
        routes = bi_level_route(q, k, grid, meta["topk"])
        assert torch.equal(routes.sort(-1).values, data["topk_index"])
    # The rewrite's zero tokens beyond the edge are attended to.
    fill = torch.zeros(2, *q.shape[3:]) if (grid[0] * size[0], grid[1] * size[1]) != shape[1:3] else None
    out = routed_attention2d(
        q, k, v, data["topk_index"], grid, region_size=tuple(size), fill=fill, scale=meta["scale"]
    ).flatten(3)
    goldens.assert_close(out, data["out"])
    grads = torch.autograd.grad(out, leaves, data["grad_out"])
    for grad, letter in zip(grads, "qkv", strict=True):
        goldens.assert_close(grad, data[f"grad_{letter}"])


@pytest.mark.parametrize("name", [n for n in CORES if "nchw" not in n])
def test_published_region_logits(name):
    meta, data = goldens.manifest("ops", name), goldens.numbers("ops", name)
    q, k = (data[n].unflatten(-1, (meta["heads"], -1)) for n in "qk")
    logits = reference.route_logits(q, k, Grid.of(q, *meta["regions"]), meta["scale"])
    goldens.assert_close(logits, data["region_logits"])


@st.composite
def grids(draw):
    """Rows and columns of regions, their size, a map that they cover, and whether tokens beyond it carry something."""
    rows, columns, height, width = (draw(st.integers(1, n)) for n in (4, 4, 3, 3))
    filled = draw(st.booleans())
    # Where nothing fills them, the last regions of an axis may be smaller, but hold at least one token.
    missing = [
        draw(st.integers(0, n * size - 1 if filled else size - 1)) for n, size in ((rows, height), (columns, width))
    ]
    return Grid(rows, columns, height, width), (rows * height - missing[0], columns * width - missing[1]), filled


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_equals_the_reference(data):
    grid, (height, width), filled = data.draw(grids(), "grid")
    topk = data.draw(st.integers(1, grid.regions + 1), "topk")  # longer than the list of regions: duplicates
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    batch, heads, head_dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    leaves = [t.requires_grad_() for t in maps(batch, height, width, heads, head_dim, dtype=torch.float64)]
    if filled:
        leaves.append(torch.randn(2, heads, head_dim, dtype=torch.float64, requires_grad=True))
    routes = torch.randint(0, grid.regions, (batch, grid.regions, topk))
    grad = torch.randn_like(leaves[0])

    def results(function, *rest):
        out = function(*leaves[:3], routes, *rest)
        # Where the map leaves no token beyond, nothing reaches the fill.
        return out, torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)

    fill = leaves[3] if filled else None
    expected, expected_grads = results(reference.routed_attention2d, grid, 0.7, fill)
    operator = lambda *args: operators.attend(*args[:-2], list(grid), 0.7, "torch")[0]  # noqa: E731
    for dense in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch_impl, "prefers_dense", lambda query, routes, dense=dense: dense)
            for function in (operator, torch_impl.forward):
                out, grads = results(function, fill, grid, 0.7)
                torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)


def test_fill_is_the_same_as_a_map_that_has_these_tokens(grouping):
    """Region 3 of each row, and the whole last row of regions, lie beyond the map."""
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in maps(2, 5, 7, 2, 3, dtype=torch.float64)]
    fill = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    routes = torch.randint(0, 16, (2, 16, 4))
    small = routed_attention2d(*leaves, routes, 4, region_size=2, fill=fill)
    grid = Grid(4, 4, 2, 2)
    whole = [reference.extended(t, grid, f) for t, f in zip(leaves, (None, *fill), strict=True)]
    large = routed_attention2d(*whole, routes, 4)[:, :5, :7]
    torch.testing.assert_close(small, large)
    grad = torch.randn_like(small)
    torch.testing.assert_close(
        torch.autograd.grad(small, [*leaves, fill], grad), torch.autograd.grad(large, [*leaves, fill], grad)
    )


def test_gradcheck(grouping):
    torch.manual_seed(0)
    qkv = [t.requires_grad_() for t in maps(1, 3, 5, 2, 2, dtype=torch.float64)]
    routes = torch.randint(0, 6, (1, 6, 3))
    assert torch.autograd.gradcheck(lambda *t: routed_attention2d(*t, routes, (2, 3)), qkv)
    fill = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: routed_attention2d(*t[:3], routes, (2, 3), fill=t[3]), (*qkv, fill))


def test_operators_are_well_formed(grouping):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in maps(2, 6, 8, 2, 4)]
    qkv, routes = [t.detach() for t in leaves], torch.randint(0, 4, (2, 4, 2))
    for fill, grid in ((None, [2, 2, 3, 4]), (torch.randn(2, 2, 4, requires_grad=True), [2, 2, 4, 4])):
        torch.library.opcheck(operators.routed_attention2d, (*leaves, routes, fill, grid, 0.5, "torch"))
        beyond = None if fill is None else fill.detach()
        for want_fill in {False, fill is not None}:
            args = (torch.randn_like(qkv[0]), *qkv, routes, beyond, None, None, grid, 0.5, "torch", want_fill)
            torch.library.opcheck(operators.routed_attention2d_backward, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_reference(dtype, grouping):
    torch.manual_seed(0)
    qkv = [t.requires_grad_() for t in maps(2, 9, 12, 2, 16, dtype=torch.float64)]
    low = [t.detach().to(dtype).requires_grad_() for t in qkv]
    routes = torch.randint(0, 12, (2, 12, 4))
    exact = reference.routed_attention2d(*qkv, routes, Grid(3, 4, 3, 3), 0.25)
    grad = torch.randn_like(exact)
    exact_all = (exact, *torch.autograd.grad(exact, qkv, grad))
    naive = reference.routed_attention2d(*low, routes, Grid(3, 4, 3, 3), 0.25)
    naive_all = (naive, *torch.autograd.grad(naive, low, grad.to(dtype)))
    ours = routed_attention2d(*low, routes, (3, 4), scale=0.25)
    ours_all = (ours, *torch.autograd.grad(ours, low, grad.to(dtype)))
    for e, n, o in zip(exact_all, naive_all, ours_all, strict=True):
        assert o.dtype == dtype
        allowed = 2 * (n.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        assert (o.double() - e).abs().max() <= allowed


@pytest.mark.parametrize("size", [8, 200])  # of scores: about 60, where half precision errs by some percent; 40,000
def test_gradients_of_large_float16_logits_are_as_accurate_as_in_float32(grouping, size):
    torch.manual_seed(0)
    low = [(t * size).half().requires_grad_() for t in maps(1, 9, 9, 2, 16)]
    routes = torch.randint(0, 9, (1, 9, 3))
    exact = [t.detach().double().requires_grad_() for t in low]
    grad = torch.randn(1, 9, 9, 2, 16).half()
    expected = torch.autograd.grad(
        reference.routed_attention2d(*exact, routes, Grid(3, 3, 3, 3), 0.25), exact, grad.double()
    )
    out = routed_attention2d(*low, routes, 3)
    assert out.isfinite().all()
    for ours, e in zip(torch.autograd.grad(out, low, grad), expected, strict=True):
        rounding = torch.finfo(torch.float16)
        assert (ours.double() - e).abs().max() <= 2 * rounding.eps * e.abs().max() + rounding.tiny


@pytest.mark.parametrize("filled", [False, True])
def test_an_empty_batch(grouping, filled):
    leaves = [t.requires_grad_() for t in maps(0, 7, 9, 2, 4)]
    if filled:
        leaves.append(torch.randn(2, 2, 4, requires_grad=True))
    routes = bi_level_route(*leaves[:2], 3, 2)
    assert routes.shape == (0, 9, 2)
    out = routed_attention2d(*leaves[:3], routes, 3, fill=leaves[3] if filled else None)
    assert out.shape == leaves[0].shape
    grads = torch.autograd.grad(out, leaves, out)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert not grads[-1].any()


def test_functional_derivatives(grouping):
    torch.manual_seed(0)
    qkv, routes = maps(2, 6, 6, 2, 4), torch.randint(0, 9, (2, 9, 2))

    def loss(q, k, v, routes=routes):
        return routed_attention2d(q, k, v, routes, 3).square().sum()

    leaves = [t.clone().requires_grad_() for t in qkv]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*qkv), expected)
    each = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(*(t[:, None] for t in (*qkv, routes)))
    torch.testing.assert_close([t[:, 0] for t in each], list(expected))


def test_derivatives_that_do_not_exist_are_named(grouping):
    q, k, v = maps(1, 6, 6, 2, 4)
    attend = lambda q: routed_attention2d(q, k, v, torch.zeros(1, 9, 2, dtype=torch.int64), 3)  # noqa: E731
    with pytest.raises(NotImplementedError, match="routed_attention2d has no forward-mode derivative"):
        torch.func.jvp(attend, (q,), (q,))
    q.requires_grad_()
    (once,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="routed_attention2d has no second derivative"):
        torch.autograd.grad(once.sum(), q)


@pytest.mark.parametrize("number", [-1, 9, 1 << 40])
def test_routes_out_of_range_are_named(grouping, number):
    routes = torch.zeros(2, 9, 2, dtype=torch.int64)
    routes[1, 3, 1] = number
    wrong = f"{min(number, 0)} to {max(number, 0)}"
    with pytest.raises(ValueError, match=f"routes must be region numbers from 0 to 8; got numbers from {wrong}"):
        routed_attention2d(*maps(2, 6, 6, 2, 4), routes, 3)


def test_strided_views_of_a_packed_projection(grouping):
    torch.manual_seed(0)
    packed = torch.randn(2, 6, 9, 3, 2, 4, requires_grad=True)
    routes = torch.randint(0, 9, (2, 9, 3))
    out = routed_attention2d(*packed.unbind(3), routes, 3)
    (grad,) = torch.autograd.grad(out.sin().sum(), packed)
    copies = [t.detach().contiguous().requires_grad_() for t in packed.unbind(3)]
    expected = routed_attention2d(*copies, routes, 3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad.unbind(3), torch.autograd.grad(expected.sin().sum(), copies))


def test_uninitialised_memory_is_never_read(grouping, monkeypatch):
    """Deterministic mode fills every fresh allocation with NaN; odd sizes have the padding where one would leak."""
    torch.manual_seed(0)
    qkv = [t.requires_grad_() for t in maps(2, 7, 10, 2, 4)]
    routes = torch.randint(0, 12, (2, 12, 2))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()  # the trap is set
        out = routed_attention2d(*qkv, routes, (3, 4))
        grads = torch.autograd.grad(out.sum(), qkv)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (out, *grads))


def test_gradients_are_the_same_bits_every_time(grouping):
    torch.manual_seed(0)
    qkv = [t.requires_grad_() for t in maps(4, 28, 28, 2, 16)]
    routes = torch.randint(0, 49, (4, 49, 8))
    first, second = (torch.autograd.grad(routed_attention2d(*qkv, routes, 7).square().sum(), qkv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_memory_stays_far_below_the_expanded_gather():
    """The published backward zero-fills a gradient of regions x map; ours holds at most topk copies of the map."""
    qkv = [t.requires_grad_() for t in maps(1, 56, 56, 2, 32)]
    routes = torch.randint(0, 49, (1, 49, 1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = routed_attention2d(*qkv, routes, 7)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (*qkv, routes)}
    grad = torch.randn_like(out)
    with _LargestTensor() as largest:
        torch_impl.region_backward(grad, *(t.detach() for t in qkv), routes, None, Grid(7, 7, 8, 8), 1.0, False)
    scores = 49 * 2 * 64 * 64
    assert largest.numel <= max(qkv[0].numel(), scores)
    assert largest.numel < 49 * qkv[0].numel() / 10


def test_chunks_do_not_change_the_gradient(grouping, monkeypatch):
    torch.manual_seed(0)
    args = [torch.randn(2, 8, 8, 2, 4, dtype=torch.float64) for _ in range(4)]
    routes = torch.randint(0, 16, (2, 16, 3))
    where = routes, None, Grid(4, 4, 2, 2), 0.5, False
    whole = torch_impl.backward(*args, *where)
    for chunk in ("CHUNK_SCORES", "CHUNK_DENSE"):
        monkeypatch.setattr(torch_impl, chunk, 1)
    torch.testing.assert_close(torch_impl.backward(*args, *where), whole)


def test_compiles_as_one_node_per_direction(grouping):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in maps(2, 6, 6, 2, 4)]
    routes, graphs = torch.randint(0, 9, (2, 9, 3)), []

    def keep(graph, example):
        graphs.append(graph)
        return torch._functorch.aot_autograd.make_boxed_func(graph)

    def gradients(attend):
        return torch.autograd.grad(attend(*leaves, routes, 3).sin().sum(), leaves)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    ours = gradients(torch.compile(routed_attention2d, fullgraph=True, backend=backend))
    torch.testing.assert_close(ours, gradients(routed_attention2d))
    nodes = [[str(n.target) for n in graph.graph.nodes if "hybridzoo" in str(n.target)] for graph in graphs]
    assert nodes == [["hybridzoo.routed_attention2d.default"], ["hybridzoo.routed_attention2d_backward.default"]]


def test_compiles_and_exports_without_our_operator(grouping):
    torch.manual_seed(0)
    qkv = maps(2, 28, 28, 2, 8)
    routes = torch.randint(0, 49, (2, 49, 4))

    def attend(q, k, v, routes):
        return routed_attention2d(q, k, v, routes, 7)

    expected = attend(*qkv, routes)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(*qkv, routes), expected)

    class Module(torch.nn.Module):
        def forward(self, q, k, v, routes):
            return attend(q, k, v, routes)

    program = torch.export.export(Module(), (*qkv, routes))
    assert not [n for n in program.graph.nodes if "hybridzoo" in str(n.target)]
    torch.testing.assert_close(program.module()(*qkv, routes), expected)
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(Module(), (*qkv, routes))
    torch.testing.assert_close(program.module()(*qkv, routes), expected)


def test_export_refuses_triton():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, routes):
            return routed_attention2d(q, k, v, routes, 3, impl="triton")

    with pytest.raises(ValueError, match=r"impl='triton' cannot run this call: .*(exported|not installed)"):
        torch.export.export(Module(), (*maps(1, 6, 6, 1, 16), torch.zeros(1, 9, 1, dtype=torch.int64)))


def test_routing_is_always_float32_without_gradient():
    torch.manual_seed(0)
    q, k, _ = maps(2, 14, 14, 2, 32)
    q.requires_grad_()
    plain = bi_level_route(q, k, 7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bi_level_route(q, k, 7, 16).sort().values, plain.sort().values)
    assert plain.dtype == torch.int64
    assert not plain.requires_grad
    # Half-precision inputs: the means and products may not round to half precision.
    q16, k16 = q.detach().bfloat16(), k.bfloat16()
    expected = reference.route_logits(q16.double(), k16.double(), Grid(7, 7, 2, 2), 1.0).topk(16).indices
    assert torch.equal(bi_level_route(q16, k16, 7, 16).sort().values, expected.sort().values)


def test_routing_of_odd_maps_averages_real_tokens_only():
    torch.manual_seed(0)
    q, k, _ = maps(2, 7, 10, 2, 8, dtype=torch.float64)
    grid = Grid(3, 4, 3, 3)
    expected = reference.route_logits(q, k, grid, 1.0).topk(5).indices
    assert torch.equal(bi_level_route(q, k, (3, 4), 5).sort().values, expected.sort().values)
    fill = torch.randn(2, 2, 8, dtype=torch.float64)
    with_fill = reference.route_logits(q, k, grid, 1.0, fill).topk(5).indices
    assert not torch.equal(with_fill.sort().values, expected.sort().values)
    assert torch.equal(bi_level_route(q, k, (3, 4), 5, fill=fill).sort().values, with_fill.sort().values)


def test_routing_counts_regions_that_are_all_fill():
    """Four rows of regions of three rows on a map of nine: the last is nothing but fill, and here the best key."""
    key = torch.zeros(1, 9, 4, 1, 2)
    fill = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]]])
    assert bi_level_route(key + 1, key, (4, 1), 1, fill=fill).flatten().tolist()[:3] == [3, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 8, 8, 16)), "query must have shape"),
        (dict(query=torch.zeros(2, 8, 8, 2, 8, dtype=torch.int32)), "query must be a floating-point"),
        (dict(key=torch.zeros(2, 8, 9, 2, 8)), "key must have the shape of query"),
        (dict(value=torch.zeros(2, 8, 8, 2, 8).double()), "value must share dtype"),
        (dict(routes=torch.zeros(2, 16, dtype=torch.int64)), "routes must have shape"),
        (dict(routes=torch.zeros(2, 9, 1, dtype=torch.int64)), r"routes must have shape .*regions=16"),
        (dict(query=torch.zeros(2, 8, 8, 2, 8, dtype=torch.float8_e5m2)), "query must be .*; got torch.float8_e5m2"),
        (dict(query=torch.zeros(2, 8, 8, 0, 8)), "query must have at least one row, column, head and channel"),
        (dict(query=torch.zeros(2, 8, 0, 2, 8)), "query must have at least one row, column, head and channel"),
        (dict(routes=torch.zeros(2, 16, 1, dtype=torch.int32)), "routes must be int64"),
        (
            dict(routes=torch.zeros(2, 16, 1, dtype=torch.int64, device="meta")),
            "routes must be .*, on cpu; got .* meta",
        ),
        (dict(regions=4.0), "regions must be a positive whole number or a pair .*; got 4.0"),
        (dict(regions=None), "regions must be a positive whole number or a pair .*; got None"),
        (dict(regions=(4, 4, 4)), r"regions must be a positive whole number or a pair .*; got \(4, 4, 4\)"),
        (dict(regions="4"), "regions must be a positive whole number or a pair .*; got '4'"),
        (dict(regions=(4, 4.0)), r"regions must be a positive whole number or a pair .*; got \(4, 4.0\)"),
        (dict(region_size=2.5), r"region_size must be .* a pair \(height, width\) of them; got 2.5"),
        (dict(scale=math.inf), "scale must be finite; got inf"),
        (dict(regions=0), "regions must be a positive whole number or a pair .*; got 0"),
        (dict(regions=5), "regions=5 leaves a region without tokens on a map of height 8"),
        (dict(regions=(4, 7)), "width 8"),
        (dict(impl="cuda"), "impl must be one of auto, triton, torch; got 'cuda'"),
        (dict(region_size=(2, 1)), r"region_size=\(2, 1\) must be large enough for 4 x 4 regions to cover .* 8 x 8"),
        (dict(region_size=3), "regions=4 leaves a region without tokens on a map of height 8"),
        (dict(fill=torch.zeros(2, 16)), r"fill must have shape \(2, heads, head_dim\) = \(2, 2, 8\); got \(2, 16\)"),
        (dict(fill=torch.zeros(2, 2, 8, dtype=torch.int32)), "fill must be floating-point, on cpu; got torch.int32"),
    ],
)
def test_bad_arguments_are_named(change, message):
    args = dict(
        query=torch.zeros(2, 8, 8, 2, 8), key=torch.zeros(2, 8, 8, 2, 8), value=torch.zeros(2, 8, 8, 2, 8),
        routes=torch.zeros(2, 16, 1, dtype=torch.int64), regions=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        routed_attention2d(**{**args, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=3), "query must be a tensor; got int"),
        (dict(routes=[[0]]), "routes must be a tensor; got list"),
        (dict(fill=1.0), "fill must be a tensor; got float"),
        (dict(scale="a"), "scale must be a number, or None for the default; got 'a'"),
        (dict(scale=torch.ones(())), "scale must be a number, got a tensor"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(change, message):
    args = dict(zip(("query", "key", "value"), maps(2, 8, 8, 2, 8), strict=True), regions=4)
    args["routes"] = torch.zeros(2, 16, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match=message):
        routed_attention2d(**{**args, **change})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes any device")
def test_an_explicit_choice_never_falls_back():
    q, k, v = torch.zeros(3, 1, 8, 8, 2, 16)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run this call: .*(not on CUDA|not installed)"):
        routed_attention2d(q, k, v, torch.zeros(1, 16, 1, dtype=torch.int64), 4, impl="triton")


@pytest.mark.parametrize("topk", [0, 17, 2.0, "2", True])
def test_topk_out_of_range_is_named(topk):
    with pytest.raises(
        ValueError, match=f"topk must be a whole number from 1 to the number of regions, 16; got {topk!r}"
    ):
        bi_level_route(torch.zeros(1, 8, 8, 1, 4), torch.zeros(1, 8, 8, 1, 4), 4, topk)


def test_autocast_does_not_change_the_precision(grouping):
    torch.manual_seed(0)
    qkv = [t.requires_grad_() for t in maps(1, 6, 6, 2, 8)]
    routes = torch.randint(0, 4, (1, 4, 2))
    expected = routed_attention2d(*qkv, routes, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_attention2d(*qkv, routes, 2)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("side", [3, 5])
def test_the_bias_on_a_gpu_has_aligned_rows(side, monkeypatch):
    """Rows of memory are multiples of 16 elements, and the values those of a CPU."""
    torch.manual_seed(0)
    q, k, _ = maps(2, side, side, 1, 4)
    routes, grid = torch.randint(0, 9, (2, 9, 4)), Grid.of(q, 3, 3)
    plain = torch_impl._routing_bias(routes, q, k, grid, torch.float16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    aligned = torch_impl._routing_bias(routes, q, k, grid, torch.float16)
    assert torch.equal(aligned, plain)
    assert aligned.stride(2) % 16 == 0
